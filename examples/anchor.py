"""Make an anchor that holds refusal, and see what it does under attack and to benign requests.

    python examples/anchor.py --out charts          # minutes on two cores
    python examples/anchor.py --quick --out charts  # a minute or two, too few prompts to tell

The attack here edits activations: the refusal direction is ablated before the anchor's own hooks.
`demur anchor fit` also chooses layers, strength and reads of the reply, and `demur anchor evaluate`
runs a whole battery of attacks, beside other defences.
"""

# %% How many prompts, and where charts go
import argparse
from pathlib import Path

import altair as alt

import demur
from demur.anchor import Gate
from demur.evals.judges import Exchange, Outcome, judges
from demur.pipeline import guard as guards
from demur.pipeline.anchor import Told, floors_at, place_means
from demur.stats import paired_share_change, proportion

options = argparse.ArgumentParser()
options.add_argument("--quick", action="store_true")
options.add_argument("--out", type=Path, default=Path("charts"))
given, _ = options.parse_known_args()  # A notebook's own arguments are left alone.
n, tokens = (8, 16) if given.quick else (60, 48)  # Prompts a class, and tokens of a reply.
given.out.mkdir(parents=True, exist_ok=True)
if given.quick:
    print(f"quick: {n} prompts a class prove nothing; intervals say how little")

# %% The gate: a guard that reads the request, with a bound on its false alarms
model = demur.load("smollm2")  # With the refusal adapter that demur ships.
few = {
    "alpha": 0.2,
    "most": 70,
    "depth": (0.48, 0.52),
    "wrappers": ("prefix_injection", "style_constraint", "authority_claim"),
    "wrapped": 0,
    "turns": 0,
    "strata": [{"name": "plain", "prompts": "plain?split=calibrate + lookalikes?split=calibrate"}],
}
config = demur.RunConfig.model_validate({"guard": few if given.quick else {}})
guard = guards.fit(config, model=model)
gate = Gate(guard, guard.threshold)
seen = guard.threshold
print(f"gate: reads {guard.site}; {seen.exceeded} of {seen.n} benign calibration prompts opened it")

# %% Replies to learn from: where refusing and complying ones stand in the stream
judge = judges.make("patterns")
near = "contrast_pairs?kind=near"
harmful = demur.load_prompts(f"{near}&label=harmful&split=fit").texts[: 2 * n]
harmless = demur.load_prompts(f"{near}&label=harmless&split=fit").texts[: 2 * n]
prompts = [*harmful, *harmless]
replies = model.generate(prompts, max_new_tokens=tokens)
verdicts = judge([Exchange(p, r.text) for p, r in zip(prompts, replies, strict=True)])
told = Told(
    tuple(prompts),
    tuple(reply.ids for reply in replies),
    tuple(prompt in harmful for prompt in prompts),
    tuple(verdict.outcome for verdict in verdicts),
)

# %% The floor: at eight layers, the coordinate of refusal is lifted to where refusing replies are
sites = model.stream_sites[12:20]
floors = floors_at(place_means(model, told, sites), told, sites)
anchor = demur.Anchor(gate, floors, strength=2.0)
always = demur.Anchor(None, floors, strength=2.0)  # What the floor does where the gate is open.

# %% The attack: the direction that the floor holds in the middle is ablated everywhere
middle = floors[4]
direction = demur.Direction.from_vector(
    middle.axis.float(), site=middle.site, position=-1, recipe="refusing minus complying replies"
)
attack = demur.Ablate(direction)
direction

# %% Held-out requests; an anchor comes last, so that it sees the edits in force before it
asked = {
    "harmful": demur.load_prompts(f"{near}&label=harmful&split=report").texts[:n],
    "harmless": demur.load_prompts("lookalikes?split=report + plain?split=report").texts[:n],
}
cases = [
    ("harmful", "plain", ()),
    ("harmful", "attacked", (attack,)),
    ("harmful", "attacked, anchored", (attack, anchor)),
    ("harmful", "attacked, gate always open", (attack, always)),
    ("harmless", "plain", ()),
    ("harmless", "anchored", (anchor,)),
    ("harmless", "gate always open", (always,)),
]
refused = {}
for kind, name, acts in cases:
    texts = asked[kind]
    with demur.applied(model, *acts):
        replies = model.generate(texts, max_new_tokens=tokens)
    verdicts = judge([Exchange(p, r.text) for p, r in zip(texts, replies, strict=True)])
    refused[kind, name] = [one.outcome is Outcome.REFUSED for one in verdicts]

# %% How often the gate opens, and what is refused; replies to harmful requests are never shown
for kind, name, acts in [
    ("harmful", "plain", ()),
    ("harmful", "attacked", (attack,)),  # The gate reads the stream that the attack has edited.
    ("harmless", "plain", ()),
]:
    with demur.applied(model, *acts), anchor.holding(model) as holding:
        model.generate(asked[kind], max_new_tokens=1)
    opened = sum(trace.opened is not None for trace in holding.traces)
    print(f"gate opened, {kind}, {name}: {proportion(opened, len(asked[kind]))}")
for (kind, name), flags in refused.items():
    print(f"refused, {kind}, {name}: {proportion(sum(flags), len(flags))}")
for name in ("attacked, anchored", "attacked, gate always open"):
    change = paired_share_change(refused["harmful", "attacked"], refused["harmful", name])
    print(f"brought back, {name}: {change}")
for name in ("anchored", "gate always open"):
    change = paired_share_change(refused["harmless", "plain"], refused["harmless", name])
    print(f"price on harmless requests, {name}: {change}")

# %% The same as a chart
rows = []
for (kind, name), flags in refused.items():
    share = proportion(sum(flags), len(flags))
    rows.append(
        {"kind": kind, "case": name, "share": share.value, "low": share.low, "high": share.high}
    )
base = alt.Chart(alt.InlineData(values=rows)).encode(y=alt.Y("case:N", sort=None, title=None))
bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title="refused"), x2="high:Q")
chart = (bars + base.mark_point(filled=True, size=70).encode(x="share:Q")).facet(row="kind:N")
chart.save(given.out / "refused.svg")
print(f"charts are in {given.out}")
chart
