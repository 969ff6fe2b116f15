"""Writing an export, and reading one back for the model that it was made for."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demur.errors import ConfigError, DemurError, StoreError
from demur.exports.base import (
    CARD,
    FORMAT,
    RECORD,
    Imported,
    Job,
    describe,
    exporters,
    of_model,
    read_record,
    write_record,
)
from demur.exports.card import Evidence, card
from demur.exports.files import finite
from demur.exports.steering import Carried, Steering, carried, check_fits
from demur.interventions import Add
from demur.models import Model
from demur.models.fingerprint import borrowed, check_made_on
from demur.store import atomic_write, file_digests, whole_folder


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """What was written.

    Attributes:
        kind: The format.
        folder: Files of the consumer, the record `demur.json` and the card `README.md`.
        files: Their names.
        about: The record.
    """

    kind: str
    folder: Path
    files: tuple[str, ...]
    about: Mapping[str, Any]


def export(
    model: Model,
    steering: Steering,
    folder: Path,
    kind: str,
    *,
    lossy: Collection[str] = (),
    source: Mapping[str, Any] | None = None,
    evidence: Evidence | None = None,
    load: Mapping[str, Any] | None = None,
    borrowed: Sequence[str] = (),
) -> Exported:
    """Write a steering in the format of a consumer, with a record and a card.

    Args:
        model: The model that it is for, with its adapter.
        steering: What is done, and where.
        folder: Where to; must not exist.
        kind: The format, one of `exporters`.
        lossy: What may be lost, by name, see `demur.exports.LOSSES`.
        source: The sidecar of the direction, of which the record keeps what it can.
        evidence: An audit's figures for the card; "not measured" without.
        load: How the model was loaded, arguments of `demur.models.load`, kept in the record.
        borrowed: That the direction was made on another model: for record and card.

    Raises:
        UnknownNameError: There is no such format.
        ConfigError: Something would be lost that was not asked for by name; the folder exists; the
            direction does not fit the model; or nothing would be added.
        FamilyError: The architecture cannot carry it, or the format not at that site.
        StoreError: The evidence is of another model or direction, or a file cannot be written.
    """
    exporter = exporters.make(kind)
    folder = Path(folder).expanduser()
    if folder.exists():
        raise ConfigError(f"{folder} exists already", "name a new folder")
    check_fits(model, steering)
    kept = carried(
        steering, exporter.carries, to=f"the format `{kind}`", spans=exporter.spans, lossy=lossy
    )
    if not kept.acts or any(isinstance(act, Add) and act.strength == 0.0 for act in kept.acts):
        raise ConfigError("an addition of strength 0 is no edit", "give another strength")
    about = _about(model, kept, kind, exporter.exact, load) | {"borrowed": list(borrowed)}
    if evidence is not None:
        told = evidence.results.model.fingerprint  # Of an older audit it is an older one.
        evidence.belongs_to({**about, "fingerprint": told} if model.is_called(told) else about)
    try:
        with whole_folder(folder) as draft:
            extra = dict(exporter.write(Job(model, kept, draft, source or {}, about)))
            about = {**about, **extra, "evidence": None if evidence is None else evidence.record()}
            about["files"] = file_digests(draft)
            write_record(draft, about)
            atomic_write(draft / CARD, card(about, use=exporter.use, evidence=evidence))
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{folder} was not written: {error.strerror or error}",
            "free some space or name another",
        ) from error
    names = tuple(sorted(one.name for one in folder.iterdir()))
    return Exported(kind, folder, names, about)


def _about(
    model: Model, kept: Carried, kind: str, exact: str, load: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "demur": importlib.metadata.version("demur"),
        "kind": kind,
        **of_model(model),
        "family": model.family.name,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "tied": model.tied,
        "load": dict(load) if load is not None else None,
        "sign": "points from harmless to harmful; adding it raises refusal",
        "convention": "L.resid_pre is the input of block L, L.resid_post its output, from 0",
        "acts": [describe(act) for act in kept.acts],
        "where": [str(span) for span in kept.where],
        "exact": exact if not kept.losses else "no: see losses",
        "losses": dict(kept.losses),
    }


def read_export(
    path: Path,
    model: Model | None = None,
    *,
    kind: str | None = None,
    any_model: bool = False,
) -> Imported:
    """Read an export back, or a file of one of its consumers.

    Args:
        path: The folder of an export, or a file of another tool.
        model: If given, the export must be for this very model (weights, data type, template); what
            `merged` wrote may also be loaded itself. A file without a record says of no model, and
            only its width and layers are checked.
        kind: Format of a file without a record; None: found from the path.
        any_model: Only its width and layers must be those of the model; `Imported.borrowed` says
            what differs.

    Raises:
        StoreError: It is damaged, of no known format, or for another model.
        UnknownNameError: There is no such format.
    """
    path = Path(path).expanduser()
    about: dict[str, Any] = {}
    if (path / RECORD).is_file():
        about = read_record(path)
        kind = str(about.get("kind"))
    elif not path.exists():
        raise StoreError(f"there is no {path}", "check the path")
    elif kind is None:
        fitting = [name for name in exporters if exporters.make(name).fits(path)]
        if len(fitting) != 1:
            raise StoreError(
                f"{path} is of no format that demur exports",
                f"name a folder of `demur export`, or say which it is: {', '.join(exporters)}",
            )
        kind = fitting[0]
    exporter = exporters.make(kind)
    try:
        found = exporter.read(path, about)
    except DemurError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(
            f"{path} is damaged: {type(error).__name__} {error}", "export it again"
        ) from error
    if about.get("files"):  # Whoever reads it has said by now what is wrong, if it knows.
        _whole(path, about["files"])
    for one in found.directions:
        finite(path, one.unit)
    return found if model is None else _belonging(path, found, model, any_model=any_model)


def _whole(path: Path, told: Mapping[str, Any]) -> None:
    own = file_digests(path)
    changed = sorted(name for name, digest in told.items() if own.get(name) != digest)
    if changed:
        raise StoreError(
            f"{', '.join(changed)} in {path} was changed after the export", "export it again"
        )


def _belonging(path: Path, found: Imported, model: Model, *, any_model: bool) -> Imported:
    about = found.about
    # What `merged` wrote may be loaded itself.
    edited = str(about.get("edited_fingerprint") or "")
    if about.get("fingerprint") and not (edited and model.is_called(edited)):
        if not any_model:
            check_made_on(str(path), about, model, again="demur export")
        found = replace(found, borrowed=borrowed(str(path), about, model))
    try:
        check_fits(model, found.steering)
    except ConfigError as error:
        raise StoreError(f"{path} is for another model: {error.fact}", error.hint) from error
    return found
