"""The record of a run, `hydra.json`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from demur.hydra.rows import HydraRecord
from demur.results import SCHEMA_VERSION, read_record


class HydraRun(BaseModel):
    """Experiments on one model, one for each kind of unit.

    Attributes:
        schema_version: Of the format.
        demur: Version that wrote it.
        model: Name.
        fingerprint: Of the model.
        dtype: Of its weights.
        seed: Of every draw.
        harmful: Where harmful prompts came from; likewise `harmless`.
        openers: What refusals begin with, as text.
        learned: Whether these were learned from the model's own refusals.
        banks: Names of the banks whose latents were units.
        experiments: In the order run.
        seconds: Wall-clock time of each kind of unit.
        notes: What a reader should know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: int = SCHEMA_VERSION
    demur: str
    model: str
    fingerprint: str
    dtype: str
    seed: int
    harmful: str
    harmless: str
    openers: tuple[str, ...]
    learned: bool
    banks: tuple[str, ...]
    experiments: tuple[HydraRecord, ...]
    seconds: dict[str, float]
    notes: tuple[str, ...]


def read_hydra(path: Path) -> HydraRun:
    """Read `hydra.json`.

    Raises:
        StoreError: The file is missing, damaged, or of another version.
    """
    return read_record(path, HydraRun, "demur hydra")
