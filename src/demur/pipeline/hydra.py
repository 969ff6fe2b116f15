"""The hydra experiment on a model: the stages behind `demur hydra`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from demur import prompts as prompt_sets
from demur.causal import stable_seed
from demur.config import DataSettings, RunConfig
from demur.errors import ConfigError, UnknownNameError
from demur.features.bank import Bank
from demur.features.formats import fits, load_banks
from demur.features.sanity import check_bank, rankable
from demur.hydra.bed import Bed
from demur.hydra.experiment import Classes, Splits, hydra, steps
from demur.hydra.record import HydraRun
from demur.hydra.rows import HydraRecord
from demur.hydra.stages import Settings
from demur.hydra.units import ComponentUnits, DirectionUnits, LatentUnits, Units
from demur.models import Model
from demur.pipeline.kept import Kept, kept_openers
from demur.pipeline.splits import make_splits, source_name
from demur.progress import Listener, Quiet
from demur.results import sealed_json
from demur.store import Store, atomic_write

RECORD = "hydra.json"
KINDS = ("directions", "components", "latents")
_OPENERS = 40  # Prompts of each class whose replies tell what refusals begin with.
_WIDEST = 2048  # Latents of a bank that are all taken as units.
_CHECKED = 64  # Prompts on which a bank of other weights must reconstruct the model.


@dataclass(frozen=True, slots=True)
class HydraSettings:
    """What decides a run, besides the model.

    Attributes:
        units: Kinds of unit, each an experiment of its own.
        banks: Folder, file or packaged name of banks, for "latents".
        harmful: Spec of harmful prompts; likewise `harmless`.
        discover: Prompts of each class that choose (split A).
        detect: Prompts of each class that find backups (split B).
        test: Prompts of each class that measure (split C).
        experiment: Sizes and limits of the experiment.
        controls: Whether controls are run.
        judge: Of replies, from which the first tokens of refusals are learned.
        seed: Of every draw.
    """

    units: tuple[str, ...] = ("directions", "components")
    banks: str | None = None
    harmful: str = DataSettings().harmful
    harmless: str = DataSettings().harmless
    discover: int = 48
    detect: int = 48
    test: int = 48
    experiment: Settings = field(default_factory=Settings)
    controls: bool = True
    judge: str = "patterns"
    seed: int = 0


_DEFAULTS = HydraSettings()


def hydra_run(
    model: Model,
    folder: Path,
    settings: HydraSettings = _DEFAULTS,
    *,
    listener: Listener | None = None,
) -> HydraRun:
    """Ask whether anything stands in for what refusal hangs on, and when.

    Args:
        model: Unedited.
        folder: Of the run: stages and, last of all, `hydra.json`.
        settings: What else decides it.
        listener: Hears stages and steps.

    Raises:
        UnknownNameError: There is no such kind of unit.
        ConfigError: Latents are asked for and no bank is named, or a bank is of another model.
        TooFewPromptsError: There are too few prompts for three splits.
        StoreError: The folder cannot be written, or a bank cannot be read.
    """
    listener = listener or Quiet()
    for kind in settings.units:
        if kind not in KINDS:
            raise UnknownNameError.among(KINDS, kind="unit", name=kind)
    banks, notes = _banks(model, settings)
    splits, parts = _splits(settings)
    kept = Kept(Store(folder / "stages"), model=model.fingerprint, seed=settings.seed)
    prompts = [[one.fingerprint for one in side] for side in parts]
    tokens = kept_openers(
        kept,
        model,
        [*splits.discover.harmful[:_OPENERS], *splits.discover.harmless[:_OPENERS]],
        judge=settings.judge,
        listener=listener,
        about={"prompts": prompts},
    )
    own = replace(settings.experiment, seed=stable_seed(settings.seed, "hydra"))
    found: list[HydraRecord] = []
    seconds: dict[str, float] = {}
    for kind in settings.units:
        make = _makers(banks)[kind]
        total = steps(_count(model, kind, banks), own)

        def compute(
            make: Callable[[Model, Bed, Bed], Units] = make, kind: str = kind, total: int = total
        ) -> tuple[dict[str, Any], dict[str, Tensor]]:
            began = time.monotonic()
            with listener.stage(f"{kind}: ablated, held and injected", total) as advance:
                record = hydra(
                    model,
                    make,
                    splits,
                    tokens.ids,
                    settings=own,
                    with_controls=settings.controls,
                    progress=advance,
                )
            return {"record": asdict(record), "seconds": time.monotonic() - began}, {}

        about = {
            "units": kind,
            "banks": [_identity(bank) for bank in banks] if kind == "latents" else [],
            "prompts": prompts,
            "tokens": list(tokens.ids),
            "settings": asdict(own),
            "controls": settings.controls,
        }
        summary, _ = kept.stage("experiment", about, compute)
        found.append(TypeAdapter(HydraRecord).validate_python(summary["record"]))
        seconds[kind] = summary["seconds"]
    result = HydraRun(
        demur=metadata.version("demur"),
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        seed=settings.seed,
        harmful=source_name(settings.harmful),
        harmless=source_name(settings.harmless),
        openers=tokens.texts,
        learned=tokens.learned,
        banks=tuple(bank.name for bank in banks),
        experiments=tuple(found),
        seconds=seconds,
        notes=tuple(notes),
    )
    # Last: a folder with it is a finished run.
    atomic_write(folder / RECORD, sealed_json(result))
    return result


def _splits(settings: HydraSettings) -> tuple[Splits, list[list[Any]]]:
    dealt = make_splits(
        RunConfig.model_validate(
            {
                "data": {
                    "harmful": settings.harmful,
                    "harmless": settings.harmless,
                    "fit": settings.discover,
                    "select": settings.detect,
                    "calibrate": 4,
                    "report": settings.test,
                },
                "seed": settings.seed,
            }
        )
    )
    names = ("fit", "select", "report")
    classes = [
        Classes(tuple(dealt.harmful[name].texts), tuple(dealt.harmless[name].texts))
        for name in names
    ]
    parts = [[side[name] for name in names] for side in (dealt.harmful, dealt.harmless)]
    return Splits(*classes), parts


def _banks(model: Model, settings: HydraSettings) -> tuple[tuple[Bank, ...], list[str]]:
    if "latents" not in settings.units:
        return (), []
    if settings.banks is None:
        raise ConfigError(
            "latents are of banks, and none was named",
            "name them with `--banks`, train some with `demur features train`, or leave latents "
            "out",
        )
    notes: list[str] = []
    found: list[Bank] = []
    for bank in load_banks(settings.banks):
        notes += [f"{bank.name}: {note}" for note in fits(bank, model)]
        told = bank.about.get("fingerprint")
        if told and not model.is_called(str(told)):  # A verdict on latents that say nothing of it.
            texts = prompt_sets.load("contrast_pairs?kind=near").take(_CHECKED, 0).texts
            if (reason := rankable(check_bank(bank, model, texts))) is not None:
                raise ConfigError(
                    f"{bank.name} was trained on other weights than {model.name}, and {reason}",
                    "train one with `demur features train`, or take one of this very model",
                )
        if len(bank) > _WIDEST:
            # The largest writers along what harmful prompts change would need a pass of their own;
            # decoder norms need none and favour nothing.
            order = bank.decoder.norm(dim=1).argsort(descending=True)[:_WIDEST]
            notes.append(f"{bank.name}: of {len(bank)} latents the {_WIDEST} that write most")
            found.append(bank.sliced(bank.ids[order.sort().values]))
        else:
            found.append(bank)
    return tuple(found), notes


def _identity(bank: Bank) -> list[Any]:
    return [bank.name, str(bank.site), len(bank), float(bank.encoder.double().sum())]


def _makers(banks: Sequence[Bank]) -> dict[str, Callable[[Model, Bed, Bed], Units]]:
    def latents(model: Model, harmful: Bed, harmless: Bed) -> Units:
        return LatentUnits(model, banks, harmful, harmless)

    return {"directions": DirectionUnits, "components": ComponentUnits, "latents": latents}


def _count(model: Model, kind: str, banks: Sequence[Bank]) -> int:
    if kind == "latents":
        return sum(map(len, banks))
    heads = model.n_heads if kind == "components" and model.family.linear_writes else 1
    return model.n_layers * (heads + 1) if kind == "components" else model.n_layers
