"""`python -m bench.faults.rounding --model smollm2`: how far other precision moves a guard's read.

A linear read of the stream (a drawn direction, at the middle of the depth) scores benign prompts
on a model in float32, on the same checkpoint in bfloat16, and with every matrix rounded to eight
and to four bits a row, as quantised files leave it. Its threshold is the conformal one for 5 %
false alarms in float32. Printed are the shift of the scores, in their standard deviations, and how
many prompts get another verdict: why a guard is refused on its checkpoint in another data type.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import torch

from demur.guard import Fisher, Guard, Rarity, Read, Threshold, calibrate
from demur.models import Model, load
from demur.prompts import load as prompts
from demur.sites import Site
from demur.stats import mean


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", default="plain")
    parser.add_argument("--n", type=int, default=100)
    asked = parser.parse_args()
    texts = prompts(asked.prompts).texts[: asked.n]
    base = load(asked.model, dtype="float32")
    guard = _guard(base)
    plain = guard.raw(base, texts)["span"]
    spread, threshold = plain.std(), calibrate(plain, 0.05).value
    for name, other in _others(base):
        found = guard.raw(other, texts)["span"]
        shift = np.abs(found - plain) / spread
        told, turned = mean(shift), int(((found > threshold) != (plain > threshold)).sum())
        print(
            f"{name:9} shift {told.value:.3f} [{told.low:.3f}, {told.high:.3f}] sd, at most "
            f"{shift.max():.3f}; other verdicts {turned} of {len(texts)}",
            flush=True,
        )


def _guard(model: Model) -> Guard:
    """One read of a drawn direction; the threshold is not used."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(model.d_model, generator=rng, dtype=torch.float64)
    rarity = Rarity(torch.linspace(0, 1, 91, dtype=torch.float64), 1.0)
    reads = (Read("span", Fisher(weight, 0.0, 1.0), rarity, True),)
    site = Site(model.n_layers // 2, "resid_post")
    return Guard(site, reads, 8, 4, Threshold(0.0, 0.05, 20, 1, 0.1), {})


def _others(base: Model) -> Iterator[tuple[str, Model]]:
    yield "bfloat16", base.twin(torch.bfloat16)
    for bits in (8, 4):
        hf = deepcopy(base.hf)
        levels = 2 ** (bits - 1) - 1
        with torch.no_grad():
            for parameter in hf.parameters():
                if parameter.ndim == 2:
                    step = parameter.abs().amax(1, keepdim=True).clamp(min=1e-12) / levels
                    parameter.copy_((parameter / step).round() * step)
        yield f"{bits} bits", Model(hf, base.family, base.template, name=base.name)


if __name__ == "__main__":
    main()
