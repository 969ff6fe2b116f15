"""Do two directions of a model have anything in common, beyond what any two have?

    python examples/compare.py --out charts          # minutes on two cores
    python examples/compare.py --quick --out charts  # under a minute, on too few prompts to tell

Refusal is read at the prompt's last token, harm at the last token of the instruction, where the
model has not begun to answer. Both come from the same prompts, so that some cosine is no surprise:
the nulls say how much. `demur compare refusal harm` asks more, and writes a page.
"""

# %% How many prompts, and where charts go
import argparse
from pathlib import Path

import demur
from demur.compare.extract import asked, harm, read_prompts, refusal, t_inst
from demur.compare.geometry import compare_layers
from demur.compare.library import load_library, read_library
from demur.compare.rows.geometry import plot_by_depth

options = argparse.ArgumentParser()
options.add_argument("--quick", action="store_true")
options.add_argument("--out", type=Path, default=Path("charts"))
given, _ = options.parse_known_args()  # A notebook's own arguments are left alone.
n = 16 if given.quick else 160
given.out.mkdir(parents=True, exist_ok=True)
if given.quick:
    print(f"quick: {n} prompts a class prove nothing; intervals say how little")

# %% The model, and both classes of prompts; near copies of one another are resampled together
model = demur.load("smollm2")  # With the refusal adapter that demur ships.
near = "contrast_pairs?kind=near&split=fit"
prompts = asked(
    demur.load_prompts(f"{near}&label=harmful").take(n, seed=0),
    demur.load_prompts(f"{near}&label=harmless").take(n, seed=0),
)

# %% Read both directions, with the rows behind them, at a few depths
sites = model.stream_sites[6:27:10] if given.quick else model.stream_sites[3:30:3]
rows = read_prompts(model, prompts, sites=sites)
refusals = {site: refusal(rows, prompts)[site, -1] for site in sites}
harms = {site: harm(rows, prompts)[site, t_inst(model)] for site in sites}

# %% What contrasts that have nothing to do with either have in common with them: the null
library = load_library()
if given.quick:
    library = dict(list(library.items())[:4])
unrelated = read_library(model, library, sites=sites, position=-1)
beside = {site: {name: grid[site] for name, grid in unrelated.items()} for site in sites}

# %% Compare them at every depth; a verdict needs more than a cosine
draws = 200 if given.quick else 2000
comparisons = compare_layers(refusals, harms, library=beside, draws=draws, seed=0)
for row in comparisons:
    print(f"{row.site}: cosine {row.interval}; unbiased {row.unbiased}; {row.verdict}")

# %% One of them in full
middle = comparisons[len(comparisons) // 2]
middle

# %% Its cosines, also with likely causes taken out, before what each null would give
chart = middle.plot()
chart.save(given.out / "cosines.svg")
chart

# %% All depths before the band of unrelated contrasts
chart = plot_by_depth({"refusal and harm": comparisons})
chart.save(given.out / "depth.svg")
chart.save(given.out / "depth.html", inline=True)
chart

# %% The same vectors without their rows: cosines alone, and the isotropic band, easy to leave
last = sites[-1]
chart = (
    refusals[last]
    .direction()
    .plot(
        {"harm": harms[last].direction()}
        | {name: one.direction() for name, one in beside[last].items()}
    )
)
chart.save(given.out / "plain-cosines.svg")
print(f"charts are in {given.out}")
chart
