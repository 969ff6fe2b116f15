"""The record of a run on features, `features.json`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from demur.features.rows.discover import (
    DiscoveryRow,
    HeldOutRow,
    MinimalRow,
    StabilityRow,
    VerificationRow,
)
from demur.features.rows.dose import ArmReply, DoseResponse, Multiturn
from demur.features.rows.sanity import BankCheck
from demur.features.rows.sensor import SensorReport
from demur.results import SCHEMA_VERSION, read_record


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class UsedBank(_Row):
    """A bank, and whether its latents may be ranked.

    Attributes:
        name: What tables call it.
        site: What it reads.
        writes: Where its decoder writes.
        width: Latents.
        held: How many of them were loaded.
        activation: How it chooses which are active.
        check: How well it fits the model; None if it was not checked.
        refused: Why its latents were not ranked; None if they were.
        link: Page of the bank's latents on Neuronpedia, without the number; None if the bank names
            none.
    """

    name: str
    site: str
    writes: str
    width: int
    held: int
    activation: str
    check: BankCheck | None
    refused: str | None
    link: str | None


class Finding(_Row):
    """One thing that was asked, and what was found.

    Attributes:
        question: In words.
        answer: In one or two words.
        because: The figures that it rests on.
    """

    question: str
    answer: str
    because: str


class FeaturesRecord(_Row):
    """Which latents carry refusal, what clamping them does and costs, what they tell beforehand.

    Attributes:
        schema_version: Of the format.
        demur: Version that wrote it.
        model: Name.
        fingerprint: Of the model.
        dtype: Of its weights.
        seed: Of every draw.
        harmful: Where harmful prompts came from; likewise `harmless`.
        sizes: Harmful and harmless prompts by split: "discover" finds candidates, "verify" changes
            and chooses, "calibrate" sets thresholds, "report" is measured on.
        openers: What refusals begin with, as text.
        learned: Whether these were learned from the model's own refusals.
        banks: All that were named.
        discovery: Latents compared between classes; None if no bank may be ranked.
        verification: Latents really changed; None without candidates.
        minimal: The set that was chosen; None if no latent promotes refusal.
        stability: How much of it comes back on resampled prompts.
        held_out: What it does on prompts of their own.
        dense_site: Where the dense direction was read that the set is held against.
        dose: The set clamped at several doses.
        multiturn: Scripted conversations.
        sensor: Latents as a detector of harmful requests.
        seconds: Wall-clock time by part.
        notes: What a reader should know.
        findings: What a reader with five minutes should know.
    """

    schema_version: int = SCHEMA_VERSION
    demur: str
    model: str
    fingerprint: str
    dtype: str
    seed: int
    harmful: str
    harmless: str
    sizes: dict[str, tuple[int, int]]
    openers: tuple[str, ...]
    learned: bool
    banks: tuple[UsedBank, ...]
    discovery: DiscoveryRow | None
    verification: VerificationRow | None
    minimal: MinimalRow | None
    stability: StabilityRow | None
    held_out: HeldOutRow | None
    dense_site: str | None
    dose: DoseResponse | None
    multiturn: Multiturn | None
    sensor: SensorReport | None
    seconds: dict[str, float]
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]


class FeatureReply(_Row):
    """One line of `features-replies.jsonl`; see `ArmReply`.

    Attributes:
        part: "dose" or "multiturn".
        row: The reply.
    """

    part: str
    row: ArmReply


def read_features(path: Path) -> FeaturesRecord:
    """Read `features.json`.

    Raises:
        StoreError: The file is missing, damaged, or of another version.
    """
    return read_record(path, FeaturesRecord, "demur features find")
