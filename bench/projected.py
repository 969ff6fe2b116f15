"""`python -m bench.projected`: does the test for projected-out directions tell edits from the rest?

Checkpoints with a known history are made of one model: 20 that nothing was projected out of (its
refusal adapter at several scales, noise, other data types, interpolations) and 20 with a direction
projected out (refusal or a random one; of all weights, of some layers, at half strength, with norms
restored, before and after noise and rounding). Prints how often each test says "projected out".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch

from demur.activations import collect
from demur.attacks import interpolated
from demur.compare.checkpoints import Case, detection
from demur.directions import Direction
from demur.edits import Delta, as_delta, edited
from demur.interventions import Ablate
from demur.models import Model, load
from demur.prompts import load as load_prompts
from demur.sites import Site


def noisy(model: Model, share: float, seed: int) -> Model:
    """A copy with noise on every matrix, in standard deviations of its entries."""
    copy = Model(deepcopy(model.hf), model.family, model.template, name=model.name)
    rng = torch.Generator().manual_seed(seed)
    for weight in copy.hf.parameters():
        if weight.ndim > 1:
            wide = weight.data.float()
            drawn = torch.randn(wide.shape, generator=rng)
            weight.data = (wide + share * wide.std() * drawn).to(weight.dtype)
    return copy


def cut(
    model: Model,
    direction: Direction,
    *,
    strength: float = 1.0,
    where: Callable[[int], bool] | None = None,
) -> Model:
    """A copy with a direction projected out of the weights of some layers, in part or whole."""
    delta = as_delta(model, Ablate(direction))
    names = [name for name in delta.up if where is None or where(_layer(name))]
    return edited(
        model,
        Delta({k: strength * delta.up[k] for k in names}, {k: delta.down[k] for k in names}),
    )


def norms_kept(model: Model, direction: Direction, *, rows: bool) -> Model:
    """The same with the norms of rows or columns put back, as some tools do."""
    out = cut(model, direction)
    before = dict(model.hf.named_parameters())
    for name, weight in out.hf.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            now, old = weight.data.float(), before[name].float()
            axis = 1 if rows else 0
            scale = old.norm(dim=axis, keepdim=True) / now.norm(dim=axis, keepdim=True)
            weight.data = (now * scale).to(weight.dtype)
    return out


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".", maxsplit=1)[0]) if ".layers." in name else -1


def cases(name: str, dtype: str) -> list[Case]:
    """The 40 checkpoints, edited and untouched in turn."""
    bare, refusing = load(name, dtype=dtype, adapter=None), load(name, dtype=dtype)
    n = bare.n_layers
    site = Site(n // 2, "resid_pre")

    def rows(label: str) -> torch.Tensor:
        texts = load_prompts(f"refusal_train?label={label}&split=train").texts[:64]
        return collect(refusing, texts, sites=[site], positions=[-1]).at(site, -1).double()

    gap = rows("harmful").mean(0) - rows("harmless").mean(0)
    refusal = Direction.from_vector(gap, site=site, position=-1, recipe="difference of means")

    def drawn(seed: int) -> Direction:
        rng = torch.Generator().manual_seed(seed)
        vector = torch.randn(bare.d_model, generator=rng, dtype=torch.float64)
        return Direction.from_vector(vector, site=site, position=-1, recipe="drawn")

    plain: list[tuple[str, Callable[[], Model]]] = [
        ("as it is", lambda: bare),
        ("adapter", lambda: refusing),
        *(
            (f"adapter at {share}", partial(interpolated, bare, refusing, share))
            for share in (0.25, 0.5, 0.75, 1.5)
        ),
        ("float16", partial(bare.twin, torch.float16)),
        ("adapter, float16", partial(refusing.twin, torch.float16)),
        *(
            (f"noise of {share}", partial(noisy, bare, share, seed))
            for seed, share in enumerate((0.003, 0.01, 0.03, 0.1, 0.3, 0.02))
        ),
        *(
            (f"adapter, noise of {share}", partial(noisy, refusing, share, seed))
            for seed, share in enumerate((0.003, 0.01, 0.03, 0.1, 0.3, 0.02), 10)
        ),
    ]
    edits: list[tuple[str, Callable[[], Model], Direction, Model]] = [
        ("refusal", partial(cut, refusing, refusal), refusal, refusing),
        ("refusal", partial(cut, bare, refusal), refusal, bare),
        ("refusal, base without adapter", partial(cut, refusing, refusal), refusal, bare),
        *(
            (f"random {i}", partial(cut, one, drawn(i)), drawn(i), one)
            for i, one in enumerate((bare, refusing, bare, refusing))
        ),
        *(
            (
                f"noise of {share} after",
                lambda s=share: noisy(cut(refusing, refusal), s, 1),
                refusal,
                refusing,
            )
            for share in (0.003, 0.01, 0.05)
        ),
        (
            "noise of 0.05 before",
            lambda: cut(noisy(refusing, 0.05, 3), refusal),
            refusal,
            refusing,
        ),
        (
            "float16 after",
            lambda: cut(refusing, refusal).twin(torch.float16),
            refusal,
            refusing,
        ),
        (
            "last half of the layers",
            partial(cut, refusing, refusal, where=lambda layer: layer >= n // 2),
            refusal,
            refusing,
        ),
        (
            "middle third of the layers",
            partial(cut, refusing, refusal, where=lambda layer: n // 3 <= layer < 2 * n // 3),
            refusal,
            refusing,
        ),
        (
            "columns keep norms",
            partial(norms_kept, refusing, refusal, rows=False),
            refusal,
            refusing,
        ),
        ("rows keep norms", partial(norms_kept, refusing, refusal, rows=True), refusal, refusing),
        ("half strength", partial(cut, refusing, refusal, strength=0.5), refusal, refusing),
        ("half strength, random", partial(cut, bare, drawn(9), strength=0.5), drawn(9), bare),
        ("0.8 of it", partial(cut, refusing, refusal, strength=0.8), refusal, refusing),
        ("more than it", partial(cut, refusing, refusal, strength=1.2), refusal, refusing),
    ]
    out: list[Case] = []
    for (kind, make, direction, base), (left, same) in zip(edits, plain, strict=True):
        out.append(Case(kind, True, make, base, direction))
        out.append(Case(left, False, same, bare, refusal))
    return out


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="bench.projected", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="one with a packaged adapter")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    made = cases(args.model, args.dtype)
    started, done = time.monotonic(), 0

    def progress(n: int) -> None:
        nonlocal done
        done += n
        left = (time.monotonic() - started) / done * (len(made) - done)
        print(f"\r{done} of {len(made)} checkpoints, {left:.0f} s left  ", end="", flush=True)

    rows, said = detection(made, progress=progress)
    print(f"\r{len(made)} checkpoints of {args.model} in {time.monotonic() - started:.0f} s    ")
    for row in rows:
        if row.kind == "all":
            share = row.found
            print(
                f"{row.test:<34} {'edited' if row.edited else 'untouched':<10} "
                f"{share.value:4.0%} [{share.low:.0%}, {share.high:.0%}], n={share.n}, "
                f"undetermined {row.undetermined}"
            )
    for case, own in said:
        wrong = [one for one in own if (one.verdict == "projected out") != case.edited]
        for one in wrong:
            print(f"  not as it is: {case.kind}: {one.test}: {one.verdict}, p {one.p}")


if __name__ == "__main__":
    main()
