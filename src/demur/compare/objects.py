"""Objects that can be compared: vectors on disk, ours and those of other tools.

Each format is one entry of the registry `formats`. It says which tensor its layers stand for, what
its sign means, and what its files leave open; a vector of unknown base has an empty fingerprint,
and `contrasts.mismatches` tells so. Nothing that runs code on load is read: PyTorch files are
opened with `weights_only=True`, and what needs more than that is refused with a way to save it
again.

=================== ============================================ ==================================
format              files                                        layer l, position
=================== ============================================ ==================================
`demur-direction`   `directions.safetensors` and its sidecar     as the sidecar says
`demur-run`         run folder of `demur audit`                  the same, and all candidates
`demur-export`      folder of `demur export`                     as its record says
`demur-em-deltas`   `em.directions.save_deltas`, with its rows   as the sidecar says; answers
`adapter`           PEFT LoRA or organism, its writes            what the module adds, no position
`control-vector`    repeng's GGUF, `direction.l`                 output of block l, unknown
`steering-vector`   steering-vectors, `.pt` or safetensors       output of block l, unknown
`refusal-direction` `direction.pt`, `mean_diffs.pt` (Arditi)     input of block l, as the file says
=================== ============================================ ==================================

References:
    Zou et al. 2023, arXiv:2310.01405 (control vectors); Rimsky et al. 2023, arXiv:2312.06681
    (steering vectors); Arditi et al. 2024, arXiv:2406.11717 (refusal direction).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor

from demur.compare.contrasts import ANSWER, Contrast, place_name
from demur.compare.rows.objects import ObjectRow
from demur.directions import load_direction
from demur.em.adapter import Component, components
from demur.em.directions import KINDS, Delta, load_deltas
from demur.em.organism import CONFIG, VECTOR, Organism, read_organism
from demur.errors import StoreError
from demur.exports import read_export
from demur.exports.base import RECORD
from demur.exports.control_vector import read_control_vector
from demur.exports.files import by_layer, finite, flat, header, torch_file
from demur.exports.refusal_direction import read_place
from demur.exports.steering_vectors import LAYER_TYPES, read_layers
from demur.models.families import FAMILIES
from demur.registry import Registry
from demur.sites import Site, SiteKind
from demur.store import Store

_DIRECTION, _DELTAS = "demur-direction-1", "demur-em-deltas-1"
_RUN_DIRECTION, _RUN_RESULTS = "directions.safetensors", "results.json"
_WRITES: Mapping[str, SiteKind] = {
    path: cast(SiteKind, kind)
    for family in FAMILIES.values()
    if family.linear_writes
    for path, kind in ((family.attn_out, "attn_out"), (family.mlp_out, "mlp_out"))
}
_ONE_AXIS = 0.99


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """What one file or folder holds.

    Attributes:
        spec: The path.
        kind: Its format.
        named: By name, one contrast a site (and position); bare vectors but for EM deltas.
        notes: Site convention, sign, and what the files leave open.
    """

    spec: str
    kind: str
    named: Mapping[str, tuple[Contrast, ...]]
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[Contrast]:
        return (one for several in self.named.values() for one in several)

    def __len__(self) -> int:
        return sum(map(len, self.named.values()))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site that a vector is of, in order."""
        return tuple(sorted({one.site for one in self}))

    def at(self, site: Site) -> tuple[Contrast, ...]:
        """The vectors of one site; empty if there are none."""
        return tuple(one for one in self if one.site == site)


class Format(Protocol):
    """One kind of file."""

    def fits(self, path: Path) -> bool:
        """Whether a path that exists looks like it; opens no more than a header."""
        ...

    def read(self, path: Path, name: str) -> Vectors:
        """Read it.

        Raises:
            DemurError: It is damaged, of other shapes, or needs pickle.
        """
        ...


formats: Registry[Format] = Registry("vector format")


def read_vectors(path: Path, *, kind: str | None = None, name: str | None = None) -> Vectors:
    """Read stored vectors, of whatever kind they are.

    Args:
        path: A file or folder.
        kind: Name of the format; None: found from the path.
        name: What the vectors are called, the file's name without it; where a file holds several
            kinds, it stands in front of theirs.

    Raises:
        StoreError: There is no such path, no format or several fit it, or it is damaged.
        UnknownNameError: There is no such format.
        ModelLoadError: An adapter is damaged, or no plain LoRA.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise StoreError(f"there is no {path}", "check the path")
    if kind is None:
        fitting = [one for one in formats if formats.make(one).fits(path)]
        if len(fitting) != 1:
            what = f"fits several kinds, {', '.join(fitting)}" if fitting else "is of no known kind"
            raise StoreError(
                f"{path} {what} of vectors",
                f"name its kind, one of: {', '.join(formats)}",
            )
        kind = fitting[0]
    own = name or (path.name if path.is_dir() else path.stem)
    return formats.make(kind).read(path, own)


def object_row(one: Contrast, *, kind: str, spec: str, notes: Iterable[str] = ()) -> ObjectRow:
    """A contrast as a table shows it, wherever it was read.

    Raises:
        DegenerateVectorError: Its difference is zero.
    """
    return ObjectRow(
        name=one.name,
        kind=kind,
        spec=spec,
        site=str(one.site),
        position=place_name(one.position),
        n=one.n,
        d_model=one.d_model,
        model=one.model,
        norm=one.direction().norm,
        recipe=one.recipe,
        notes=tuple(notes),
    )


def object_rows(vectors: Vectors) -> tuple[ObjectRow, ...]:
    """One row a vector."""
    return tuple(
        object_row(one, kind=vectors.kind, spec=vectors.spec, notes=vectors.notes)
        for one in vectors
    )


# Ours --------------------------------------------------------------------------------------------


@formats.register("demur-direction")
@dataclass(frozen=True, slots=True)
class DirectionFile:
    """A direction that demur wrote; its sidecar says all there is to know."""

    def fits(self, path: Path) -> bool:
        """Whether the file's own header says so."""
        return header(path) == _DIRECTION

    def read(self, path: Path, name: str) -> Vectors:
        """Read the file and its sidecar; errors are those of `load_direction`."""
        direction, about = load_direction(path)
        one = _bare(
            path,
            name,
            direction.unit.double() * direction.norm,
            direction.site,
            direction.position,
            model=str(about.get("fingerprint") or ""),
            recipe=direction.recipe,
        )
        notes = [f"sign: {about.get('sign', 'not told')}"]
        if not about.get("fingerprint"):
            notes.append("the sidecar does not say which model it is of")
        return Vectors(str(path), "demur-direction", {name: (one,)}, tuple(notes))


@formats.register("demur-run")
@dataclass(frozen=True, slots=True)
class RunFile:
    """A run folder of `demur audit`: the direction it chose, and all candidates of its search."""

    def fits(self, path: Path) -> bool:
        """Whether the folder holds a direction and results."""
        return (path / _RUN_DIRECTION).is_file() and (path / _RUN_RESULTS).is_file()

    def read(self, path: Path, name: str) -> Vectors:
        """Read the chosen direction first, then the other candidates where they are stored."""
        chosen = DirectionFile().read(path / _RUN_DIRECTION, name)
        first = chosen.named[name][0]
        others = tuple(
            one
            for one in self._candidates(path, first)
            if (one.site, one.position) != (first.site, first.position)
        )
        notes = list(chosen.notes)
        if others:
            notes.append(
                f"the run chose {first.site}, {place_name(first.position)}; the other "
                f"{len(others)} are the candidates of its search, not validated ones"
            )
        return Vectors(str(path), "demur-run", {name: (first, *others)}, tuple(notes))

    def _candidates(self, path: Path, first: Contrast) -> list[Contrast]:
        store = Store(path / "stages")
        try:
            refs = store.find("extract")
            if not refs:
                return []
            record, units = store.get(refs[0]), store.tensors(refs[0])["units"]
            assert record is not None
            readings = [
                (Site.parse(row["site"]), int(row["position"]), float(row["norm"]))
                for row in record.summary["readings"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"the candidates of {path} cannot be read: {error}", "run the audit again"
            ) from error
        if units.shape != (len(readings), first.d_model):
            raise StoreError(
                f"{path} stores {tuple(units.shape)} numbers for {len(readings)} candidates",
                "run the audit again",
            )
        return [
            _bare(
                path,
                first.name,
                unit.double() * norm,
                site,
                position,
                model=first.model,
                recipe=first.recipe,
            )
            for unit, (site, position, norm) in zip(units, readings, strict=True)
        ]


@formats.register("demur-export")
@dataclass(frozen=True, slots=True)
class ExportFolder:
    """What `demur export` wrote, whatever its format: the directions that it acts with."""

    def fits(self, path: Path) -> bool:
        """Whether it is a folder with the record of an export."""
        return (path / RECORD).is_file()

    def read(self, path: Path, name: str) -> Vectors:
        """Read it; errors are those of `read_export`."""
        found = read_export(path)
        several = tuple(
            _bare(
                path,
                name,
                one.unit.double() * one.norm,
                one.site,
                one.position,
                model=str(found.about.get("fingerprint") or ""),
                recipe=one.recipe,
            )
            for one in found.directions
        )
        notes = (f"sign: {found.about.get('sign', 'not told')}", *found.notes)
        return Vectors(str(path), "demur-export", {name: several}, notes)


@formats.register("demur-em-deltas")
@dataclass(frozen=True, slots=True)
class DeltasFile:
    """The 2x2 of a base and an organism, with the rows it was taken from."""

    def fits(self, path: Path) -> bool:
        """Whether the file's own header says so."""
        return header(path) == _DELTAS

    def read(self, path: Path, name: str) -> Vectors:
        """Read all four differences, in pairs; errors are those of `load_deltas`."""
        found, _ = load_deltas(path)
        named: dict[str, tuple[Contrast, ...]] = {}
        zero = 0
        for kind in KINDS:
            delta: Delta = getattr(found, kind)
            several: list[Contrast] = []
            for site in delta.sites:
                plus, minus = delta.plus.at(site), delta.minus.at(site)
                if torch.equal(plus, minus):
                    zero += 1
                    continue
                several.append(
                    Contrast.of_pairs(
                        f"{name} {kind}",
                        plus,
                        minus,
                        site=site,
                        position=ANSWER,
                        # Of two models the base's stream is the common one.
                        model=delta.plus.model if kind == "text_organism" else found.base.bad.model,
                        recipe=f"EM {kind}: {delta.plus.which} answers of {delta.plus.name} - "
                        f"{delta.minus.which} answers of {delta.minus.name}, {len(delta)} items",
                        clusters=delta.groups,
                    )
                )
            named[f"{name} {kind}"] = tuple(several)
        notes = ["sign: towards the bad answers, or towards the organism"]
        if found.weighting == "tokens":
            notes.append("stored as means over tokens; here every item weighs the same")
        if zero:
            notes.append(
                f"{zero} differences are zero, as in front of an adapter, and are left out"
            )
        if not any(named.values()):
            raise StoreError(f"all differences in {path} are zero", "is the organism its own base?")
        return Vectors(str(path), "demur-em-deltas", named, tuple(notes))


# Weights -----------------------------------------------------------------------------------------


@formats.register("adapter")
@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A LoRA in PEFT's format or an organism of ours: what it writes to the stream.

    Of each factor `scale * B A` whose map ends in the stream (o_proj, down_proj and their like) the
    columns of B are taken at rank 1, and at a higher rank the left singular vectors of B A, since
    any basis of the same span is the same adapter. Each stands at the tensor that the module adds
    (`l.mlp_out`, `l.attn_out`) and again at `l.resid_post`, which it reaches unchanged, beside
    whatever the rest of the block makes of it. Its length is the Frobenius norm of the change it
    makes to the weight.

    Adapters that take a direction v out of every writer, B = -w v and A = v^T W, as those of
    heretic, are read in the same way: v is the axis of B.
    """

    def fits(self, path: Path) -> bool:
        """Whether it is a folder with an adapter."""
        if not path.is_dir() or (path / RECORD).is_file():  # An ablation that demur exported.
            return False
        return (path / CONFIG).is_file() or (path / VECTOR).is_file()

    def read(self, path: Path, name: str) -> Vectors:
        """Read all factors that write to the stream; errors are those of `read_organism`."""
        organism = read_organism(path)
        if name == path.name:  # Folders are called `bad` and `good`; cards know better.
            name = organism.name
        parts = [part for part in components(organism) if _writes(part) is not None]
        if not parts:
            modules = sorted({factor.module for factor in organism.factors})
            raise StoreError(
                f"nothing in {path} writes to the stream: it adapts {', '.join(modules)}",
                f"vectors are read from {', '.join(sorted(_WRITES))}",
            )
        named: dict[str, tuple[Contrast, ...]] = {}
        zero = 0
        for part in parts:
            size = part.scale * (1.0 if part.read is None else float(part.read.norm()))
            vector = size * part.write
            if not bool(vector.any()):
                zero += 1
                continue
            own = f"B of {name} {part.layer}.{part.module} #{part.index}"
            kind = _writes(part)
            assert kind is not None
            named[own] = tuple(
                _bare(
                    path,
                    own,
                    vector,
                    Site(part.layer, place),
                    None,
                    model=organism.base_fingerprint,
                    recipe=f"write of a LoRA on {organism.base or 'a model it does not name'}"
                    if part.read is not None
                    else f"steering vector trained on {organism.base}",
                )
                for place in (kind, cast(SiteKind, "resid_post"))
            )
        if not named:
            raise StoreError(f"all of {path} is zero", "was it saved before it was trained?")
        return Vectors(
            str(path), "adapter", named, tuple(_adapter_notes(organism, parts, named, zero))
        )


def _writes(part: Component) -> SiteKind | None:
    return "mlp_out" if part.read is None else _WRITES.get(part.module)


def _adapter_notes(
    organism: Organism, parts: list[Component], named: Mapping[str, tuple[Contrast, ...]], zero: int
) -> Iterator[str]:
    if any(part.read is not None for part in parts):
        yield "sign: none, (A, B) and (-A, -B) are the same adapter; compare |cos|"
        yield (
            "where a norm stands behind the module (Gemma 2 and 3, OLMo 2) it is not what the "
            "block adds"
        )
    else:
        yield "sign: what is added at every token"
    if max(factor.b.shape[1] for factor in organism.factors) > 1:
        yield "#0, #1, ... are left singular vectors of B A, the largest first"
    others = sorted({f.module for f in organism.factors} - {part.module for part in parts})
    if others:
        yield f"left out, since they do not write to the stream: {', '.join(others)}"
    if zero:
        yield f"{zero} of its writes are zero and left out"
    if not organism.base_fingerprint:
        yield "the folder does not say which weights it was trained on"
    first = [several[0] for own, several in named.items() if own.endswith("#0")]
    if len(first) >= 4:
        units = torch.stack([torch.nn.functional.normalize(one.vector(), dim=0) for one in first])
        least = float((units @ units.T).abs().min())
        if least >= _ONE_AXIS:
            yield (
                f"all {len(first)} writes lie along one axis (least |cos| {least:.3f}), as in "
                "adapters that take one direction out of every writer, such as heretic's: B is "
                "that direction up to sign"
            )


# Vectors of others -------------------------------------------------------------------------------


@formats.register("control-vector")
@dataclass(frozen=True, slots=True)
class ControlVectorFile:
    """repeng's GGUF: a tensor `direction.l` for each block.

    repeng reads `hidden_states[l + 1]`, the output of block l, at the last token of its training
    texts, and adds its vector there: `l.resid_post`. In the last block it reads behind the final
    norm. Vectors are first principal components of norm 1, signed so that most positive texts lie
    above their negative ones.
    """

    def fits(self, path: Path) -> bool:
        """Whether it is a GGUF file."""
        return path.is_file() and path.suffix == ".gguf"

    def read(self, path: Path, name: str) -> Vectors:
        """Read it.

        Raises:
            StoreError: It is damaged, a model, or its vectors are quantised.
        """
        found = read_control_vector(path)
        return _by_layer(
            path,
            name,
            found.layers,
            kind="control-vector",
            place="resid_post",
            recipe=f"control vector for a model of type {found.hint or 'unknown'}",
            notes=(
                "layer l is the output of block l, counted from 0; the last block's was read "
                "behind the final norm",
                "sign: towards the positive texts of its training set; norm 1 by construction, "
                "unless vectors were added up",
                "read at the last token of texts that the file does not name, so its position is "
                "unknown, and so are weights and chat template",
            ),
        )


@formats.register("steering-vector")
@dataclass(frozen=True, slots=True)
class SteeringVectorFile:
    """steering-vectors: a tensor for each layer, saved without its class.

    Its layers count the modules of one type, from 0, and vectors are of their outputs: of
    `decoder_block` `l.resid_post`, of `self_attn` `l.attn_out`, of `mlp` `l.mlp_out`.
    """

    def fits(self, path: Path) -> bool:
        """Whether it is a PyTorch or safetensors file of no other kind."""
        if not path.is_file():
            return False
        if path.suffix == ".safetensors":
            return header(path) is None
        return path.suffix in (".pt", ".pth", ".bin") and not _of_arditi(path)

    def read(self, path: Path, name: str) -> Vectors:
        """Read it.

        Raises:
            StoreError: It is damaged, needs pickle, or is of a layer type that is no site.
        """
        kind, layers = read_layers(path)
        notes = [
            f"layer l is the output of block l's {kind}, counted from 0",
            "sign: towards the positive texts of its training set",
            "read at a token of texts that the file does not name, so its position is unknown, and "
            "so are weights and chat template",
        ]
        if kind != "decoder_block":
            notes.append(
                "where a norm stands behind the module (Gemma 2 and 3, OLMo 2) it is not what the "
                "block adds"
            )
        return _by_layer(
            path,
            name,
            layers,
            kind="steering-vector",
            place=LAYER_TYPES[kind],
            recipe=f"steering vector, {kind}",
            notes=tuple(notes),
        )


@formats.register("refusal-direction")
@dataclass(frozen=True, slots=True)
class RefusalDirectionFile:
    """Arditi et al.: `direction.pt` with its metadata, and `mean_diffs.pt` of all candidates.

    Layer l is the input of block l, `l.resid_pre`. Of `mean_diffs.pt`, of shape (position, layer,
    d_model), the positions are the last ones of the prompt.
    """

    def fits(self, path: Path) -> bool:
        """Whether it is one of the two files, or a folder of the run that wrote them."""
        if path.is_dir():
            others = (CONFIG, RECORD)
            return (path / "direction.pt").is_file() and not any(
                (path / one).is_file() for one in others
            )
        return path.suffix == ".pt" and path.is_file() and _of_arditi(path)

    def read(self, path: Path, name: str) -> Vectors:
        """Read it.

        Raises:
            StoreError: It is damaged, of another shape, needs pickle, or has no metadata.
        """
        file = path / "direction.pt" if path.is_dir() else path
        found = torch_file(file)
        if not isinstance(found, Tensor):
            raise StoreError(
                f"{file} holds a {type(found).__name__}, no tensor", "name the file of a direction"
            )
        notes = [
            "layer l is the input of block l, counted from 0",
            "sign: from harmless to harmful",
            "the file does not say which weights and chat template it was read with",
        ]
        several: list[Contrast] = []
        recipe = "difference of means, harmful - harmless"
        if found.ndim == 3:
            finite(file, found)
            n, depth, _ = found.shape
            zero = 0
            for i in range(n):
                for layer in range(depth):
                    if not bool(found[i, layer].any()):
                        zero += 1
                        continue
                    several.append(
                        _bare(
                            file,
                            name,
                            found[i, layer],
                            Site(layer, "resid_pre"),
                            i - n,
                            recipe=recipe,
                        )
                    )
            if zero:
                notes.append(f"{zero} differences are zero, as at the embedding, and are left out")
            if not several:
                raise StoreError(f"all of {file} is zero", "get it again")
        else:
            layer, position = read_place(file)
            several.append(
                _bare(
                    file,
                    name,
                    flat(file, file.name, found),
                    Site(layer, "resid_pre"),
                    position,
                    recipe=recipe,
                )
            )
        return Vectors(str(path), "refusal-direction", {name: tuple(several)}, tuple(notes))


def _of_arditi(path: Path) -> bool:
    named = path.name in ("direction.pt", "mean_diffs.pt")
    return named or path.with_name(f"{path.stem}_metadata.json").is_file()


# Files -------------------------------------------------------------------------------------------


def _bare(
    path: Path,
    name: str,
    vector: Float[Tensor, " d_model"],
    site: Site,
    position: int | None,
    *,
    model: str = "",
    recipe: str = "",
) -> Contrast:
    finite(path, vector)
    if not bool(vector.any()):
        raise StoreError(f"the vector at {site} in {path} is zero", "make it again")
    return Contrast.of_vector(
        name, vector, site=site, position=position, model=model, recipe=recipe
    )


def _by_layer(
    path: Path,
    name: str,
    layers: Mapping[int, Tensor],
    *,
    kind: str,
    place: SiteKind,
    recipe: str,
    notes: tuple[str, ...],
) -> Vectors:
    """A vector for each layer, of one width; zero ones are left out."""
    kept, zero = by_layer(path, layers)
    if zero:
        notes = (*notes, f"{zero} vectors are zero and left out")
    found = tuple(
        _bare(path, name, value, Site(layer, place), None, recipe=recipe)
        for layer, value in kept.items()
    )
    return Vectors(str(path), kind, {name: found}, notes)
