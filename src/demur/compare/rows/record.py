"""The record of a comparison, `compare.json`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from demur.compare.rows.behaviour import Behaviour, MediationRow
from demur.compare.rows.checkpoints import Across, Projected
from demur.compare.rows.circuits import (
    AttributionRow,
    CircuitComparison,
    PatchingRow,
    ReadWriteRow,
)
from demur.compare.rows.dimensions import Cone, Dimension, Independence
from demur.compare.rows.geometry import Alignment, Comparison, Overlap, plot_by_depth
from demur.compare.rows.objects import ObjectRow
from demur.errors import UnknownNameError
from demur.results import SCHEMA_VERSION, read_record

if TYPE_CHECKING:
    import altair as alt


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Placed(_Row):
    """A comparison, and where it was made.

    Attributes:
        pair: What the two are to each other: "em and refusal", "em and harm", "harm and refusal",
            "two organisms", "twin and refusal", "in the organism" for what was read on an organism,
            or "stored" for vectors from files.
        place: At which tokens, in words.
        read_on: "base", or the name of an organism.
        row: The comparison.
    """

    pair: str
    place: str
    read_on: str
    row: Comparison


class PlacedAlignment(_Row):
    """Whether base and organism arrange the same prompts alike at a site."""

    site: str
    prompts: Literal["harmful", "harmless"]
    row: Alignment


class PlacedOverlap(_Row):
    """Two subspaces at a site."""

    site: str
    place: str
    row: Overlap


class Counted(_Row):
    """How many directions refusal takes at one site, by one way of looking for them."""

    site: str
    method: str
    cone: Cone
    dimensions: tuple[Dimension, ...]
    independence: tuple[Independence, ...]


class NamedAttribution(_Row):
    """A difference of activations as a sum over components.

    Attributes:
        difference: What it is the difference of, in words.
        row: The sum.
    """

    difference: str
    row: AttributionRow


class Needed(_Row):
    """What replacing each component does to refusal and to the margin of bad answers.

    Attributes:
        patchings: Of refusal; and of the margin, where there is an organism.
        compared: The two; None where one of them was not measured.
    """

    patchings: tuple[PatchingRow, ...]
    compared: CircuitComparison | None


class Circuits(_Row):
    """Which heads and MLPs write two directions, and which of them two behaviours need.

    Attributes:
        a: Name of the one direction.
        b: Name of the other.
        site: Where writes are summed.
        attributions: Of both differences to components, along both directions.
        written: The two, compared.
        patchings: What replacing each component does to refusal and to the margin.
        needed: The two, compared; None where one of them was not measured.
        read_write: What the adapter reads and writes.
    """

    a: str
    b: str
    site: str
    attributions: tuple[NamedAttribution, ...]
    written: CircuitComparison | None
    patchings: tuple[PatchingRow, ...]
    needed: CircuitComparison | None
    read_write: tuple[ReadWriteRow, ...]


class Finding(_Row):
    """One line of what was found, in words.

    Attributes:
        question: What was asked.
        answer: In a few words, as a verdict.
        because: With numbers.
        headline: Whether it is among those that a reader sees first.
    """

    question: str
    answer: str
    because: str
    headline: bool


class CompareRecord(_Row):
    """All of `compare.json`: directions of one base, compared.

    Attributes:
        objects: What was compared.
        harmful: Where harmful prompts came from; likewise `harmless`, and `items` for questions
            with a bad and a good answer each.
        fit: Prompts of each class that directions were read on; `select` that the site was chosen
            on, `report` that behaviour was measured on. They share none.
        questions: Questions that directions were read on, and others that margins were asked of.
        library: Names of the unrelated contrasts.
        sites: Where directions were read.
        site: Where they act and are taken apart; None where nothing acts.
        site_why: How it was chosen.
        seconds: That each part took, where it was computed anew.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["compare"] = "compare"
    demur: str
    model: str
    fingerprint: str
    dtype: str
    seed: int
    objects: tuple[ObjectRow, ...]
    harmful: str
    harmless: str
    items: tuple[str, ...]
    fit: tuple[int, int]
    select: tuple[int, int]
    report: tuple[int, int]
    questions: tuple[int, int]
    library: tuple[str, ...]
    sites: tuple[str, ...]
    site: str | None
    site_why: str
    findings: tuple[Finding, ...]
    comparisons: tuple[Placed, ...]
    overlaps: tuple[PlacedOverlap, ...]
    alignments: tuple[PlacedAlignment, ...]
    across: tuple[Across, ...]
    projected: tuple[Projected, ...]
    counted: tuple[Counted, ...]
    behaviours: tuple[Behaviour, ...]
    mediations: tuple[MediationRow, ...]
    circuits: tuple[Circuits, ...]
    seconds: dict[str, float]
    notes: tuple[str, ...]

    def _repr_html_(self) -> str:
        from demur.notebook import table

        rows = [(one.question, one.answer, one.because) for one in self.findings if one.headline]
        harmful, harmless = self.fit
        note = (
            f"Read on {harmful} harmful and {harmless} harmless prompts at {len(self.sites)} "
            f"sites; {len(self.comparisons)} comparisons, {len(self.library)} unrelated contrasts."
        )
        head = ("question", "answer", "because")
        return table(f"Comparison of directions of {self.model}", rows, head=head, note=note)

    def plot(self, pair: str | None = None) -> alt.LayerChart:
        """Draw the cosines of one kind of pair by depth, before the null's band; an Altair chart.

        Args:
            pair: As in `Placed`, such as "em and refusal"; None: the first that was compared.

        Raises:
            UnknownNameError: No such pair was compared.
            ConfigError: Nothing was.
        """
        lines: dict[str, dict[str, list[Comparison]]] = {}
        for one in self.comparisons:
            on = "" if one.read_on == "base" else f", on {one.read_on}"
            name = f"{one.row.a} and {one.row.b}, {one.place}{on}"
            lines.setdefault(one.pair, {}).setdefault(name, []).append(one.row)
        if pair is not None and pair not in lines:
            raise UnknownNameError.among(lines, kind="compared pair", name=pair)
        return plot_by_depth(lines[pair or next(iter(lines))] if lines else {})


def read_compare(path: Path) -> CompareRecord:
    """Read the record of a comparison.

    Raises:
        StoreError: It is missing, cut short, or of another schema version.
    """
    return read_record(path, CompareRecord, "demur compare")
