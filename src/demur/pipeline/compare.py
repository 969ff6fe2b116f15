"""A comparison of directions: the stages behind `demur compare`.

Directions are read on one base at the same sites, at every place where each of them can be read;
what can be compared is, beside its nulls. Then, at one site, it is asked what they do, how many
there are, what goes through them, and which parts of the model make them.

Every stage keeps what it found in the run folder under a key of what decides it, so that an
interrupted comparison goes on where it stopped, and one with another organism only adds what is
new.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from demur.compare.objects import object_row, object_rows
from demur.compare.rows.objects import ObjectRow
from demur.compare.rows.record import (
    CompareRecord,
)
from demur.errors import ConfigError, UnknownNameError
from demur.models import Model
from demur.models import load as load_model
from demur.pipeline import compare_acts
from demur.pipeline.compare_findings import findings_of
from demur.pipeline.compare_geometry import alignments, checkpoints, geometry, overlaps
from demur.pipeline.compare_state import (
    BASE,
    PARTS,
    RECORD,
    WORDS,
    CompareSettings,
    Run,
    Things,
    at_position,
    begin,
    find_things,
    shift_name,
)
from demur.pipeline.splits import source_name
from demur.progress import Listener, Quiet
from demur.results import sealed_json
from demur.store import atomic_write

__all__ = [
    "BASE",
    "PARTS",
    "RECORD",
    "WORDS",
    "CompareSettings",
    "Things",
    "compare_run",
    "find_things",
    "shift_name",
]

_DEFAULTS = CompareSettings()


def compare_run(
    base: Model,
    things: Things,
    folder: Path,
    settings: CompareSettings = _DEFAULTS,
    *,
    listener: Listener | None = None,
    load: Callable[[str], Model] = load_model,
    any_model: bool = False,
) -> CompareRecord:
    """Compare directions of one base.

    Args:
        base: The model that all of them are of, unedited.
        things: As `find_things` gives them.
        folder: Of the run: stages and, last of all, `compare.json`.
        settings: What else decides it.
        listener: Hears stages and steps.
        load: Loads further checkpoints by name.
        any_model: Take organisms that were trained on other weights; the record's notes say so.

    Raises:
        ConfigError: An organism was trained on another base, or a number is out of range.
        TooFewPromptsError: Too few prompts, or questions that no organism was trained on.
        StoreError: The folder cannot be written, or holds damaged stages.
    """
    listener = listener or Quiet()
    for name in settings.skip:
        if name not in PARTS:
            raise UnknownNameError.among(PARTS, kind="part", name=name)
    if not settings.kl > 0:
        raise ConfigError(f"an edit cannot cost {settings.kl} nats per token", "give 0.05 or so")
    run = begin(base, things, folder, settings, listener=listener, load=load, any_model=any_model)
    with run.timed("geometry"):
        comparisons = geometry(run)
        alike, shared = alignments(run), overlaps(run)
    with run.timed("checkpoints"):
        same, projected = checkpoints(run)
    parts = compare_acts.parts(run)
    record = CompareRecord(
        demur=metadata.version("demur"),
        model=base.name,
        fingerprint=base.fingerprint,
        dtype=str(base.dtype).removeprefix("torch."),
        seed=settings.seed,
        objects=_objects(run),
        harmful=source_name(settings.harmful),
        harmless=source_name(settings.harmless),
        items=settings.items,
        fit=_sizes(run, "fit"),
        select=_sizes(run, "select"),
        report=_sizes(run, "report"),
        questions=(len(run.items[0]), len(run.items[1])),
        library=tuple(run.library) if run.part("library") else (),
        sites=tuple(map(str, run.sites)),
        comparisons=tuple(comparisons),
        overlaps=tuple(shared),
        alignments=tuple(alike),
        across=same,
        projected=projected,
        seconds=run.seconds,
        notes=tuple(run.notes),
        findings=(),
        **parts,
    )
    record = record.model_copy(update={"findings": findings_of(record)})
    # Last: a folder with it is a finished comparison.
    atomic_write(folder / RECORD, sealed_json(record))
    return record


def _sizes(run: Run, name: str) -> tuple[int, int]:
    return len(run.prompts["harmful"][name]), len(run.prompts["harmless"][name])


def _objects(run: Run) -> tuple[ObjectRow, ...]:
    found: list[ObjectRow] = []
    for name, grid in run.grids().items():
        for position in sorted({position for _, position in grid}):
            own = at_position(grid, position)
            last = own[max(own)]
            found.append(object_row(last, kind="read on the model", spec=name))
    for vectors in run.things.stored:
        found.extend(object_rows(vectors)[:8])
    return tuple(found)
