"""Find a model's refusal direction, and test it on prompts that it was not found with.

    python examples/audit.py --out charts          # minutes on two cores
    python examples/audit.py --quick --out charts  # under a minute, on too few prompts to tell

The cells open as a notebook (VS Code, PyCharm, or `jupytext --to ipynb examples/audit.py`).
`demur audit smollm2` does all this with more prompts, more controls and a page at the end.
"""

# %% How many prompts, and where charts go
import argparse
from pathlib import Path

import demur
from demur.causal import null_directions
from demur.evals.judges import Exchange, Outcome, judges
from demur.selection import openers
from demur.stats import paired_share_change, proportion

options = argparse.ArgumentParser()
options.add_argument("--quick", action="store_true")
options.add_argument("--out", type=Path, default=Path("charts"))
given, _ = options.parse_known_args()  # A notebook's own arguments are left alone.
n = 12 if given.quick else 100
given.out.mkdir(parents=True, exist_ok=True)
if given.quick:
    print(f"quick: {n} prompts a class prove nothing; intervals say how little")

# %% The model, and pairs of requests that differ in a word or two
model = demur.load("smollm2")  # With the refusal adapter that demur ships.
near = "contrast_pairs?kind=near"
fit_harmful = demur.load_prompts(f"{near}&label=harmful&split=fit").texts[: 2 * n]
fit_harmless = demur.load_prompts(f"{near}&label=harmless&split=fit").texts[: 2 * n]
harmful = demur.load_prompts(f"{near}&label=harmful&split=select").texts[:n]
harmless = demur.load_prompts(f"{near}&label=harmless&split=select").texts[:n]
held_out = demur.load_prompts(f"{near}&label=harmful&split=report").texts[:n]

# %% Read the stream, and estimate a direction at each site and position
sites = model.stream_sites[6:24:3] if given.quick else model.stream_sites
positions = [-1] if given.quick else [-5, -4, -3, -2, -1]  # From the end of the prompt.
positive = demur.collect(model, fit_harmful, sites=sites, positions=positions)
negative = demur.collect(model, fit_harmless, sites=sites, positions=positions)
candidates = demur.candidates(positive, negative, demur.estimators.DifferenceOfMeans())

# %% Choose the one whose ablation lowers refusal most, for little else
judge = judges.make("patterns")
tokens = openers(model, fit_harmful[:n] + fit_harmless[:n], judge, max_new_tokens=24)
selection = demur.select(model, candidates, harmful=harmful, harmless=harmless, tokens=tokens)
direction = selection.direction
selection

# %% All candidates: each shows its three scores under the pointer
chart = selection.plot()
chart.save(given.out / "candidates.svg")
chart.save(given.out / "candidates.html", inline=True)
chart

# %% Where prompts lie along it: those it was fitted on, so that they are apart is no proof
chart = direction.plot({"harmful": positive, "harmless": negative})
chart.save(given.out / "projections.svg")
chart

# %% The test: replies to held-out requests, unedited, with it ablated, with random ones ablated
at = direction.site, direction.position
nulls = null_directions(
    direction, harmful=positive.at(*at), harmless=negative.at(*at), each=1, seed=0
)
edits = {"unedited": (), "direction ablated": (demur.Ablate(direction),)}
edits |= {f"random ({kind}) ablated": (demur.Ablate(one),) for kind, (one,) in nulls.items()}
outcomes = {}
for name, edit in edits.items():
    with demur.applied(model, *edit):
        replies = model.generate(held_out, max_new_tokens=24)
    verdicts = judge([Exchange(p, r.text) for p, r in zip(held_out, replies, strict=True)])
    outcomes[name] = [verdict.outcome for verdict in verdicts]

# %% Replies to harmful requests are judged and never shown. A random direction that takes as many
# refusals away, or a reply that is no language, would say that ablation broke the model instead.
refused = {name: [one is Outcome.REFUSED for one in own] for name, own in outcomes.items()}
for name, flags in refused.items():
    broken = outcomes[name].count(Outcome.DEGENERATE)
    print(f"refused, {name}: {proportion(sum(flags), len(flags))}; {broken} degenerate")
for name in list(refused)[1:]:
    print(f"change, {name}: {paired_share_change(refused['unedited'], refused[name])}")
print(f"charts are in {given.out}")
