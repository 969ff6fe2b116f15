"""Rows about the objects that are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """One vector that can be compared, as a table shows it.

    Attributes:
        name: As other tables call it.
        kind: The format it was read from, such as "control-vector", or what it was read on.
        spec: The file or folder, as it was named.
        site: The tensor it is of, such as `14.resid_pre`.
        position: At which token it was read, in words.
        n: Pairs, or prompts of both classes, behind it; 0 for a bare vector.
        d_model: Its width.
        model: Fingerprint of the model it was read on; empty where the file does not say.
        norm: Its length, in residual-stream units at `site` unless a note says otherwise.
        recipe: Where it came from, in words.
        notes: What its file leaves open: what its sign means, how its layers are counted.
    """

    name: str
    kind: str
    spec: str
    site: str
    position: str
    n: int
    d_model: int
    model: str
    norm: float
    recipe: str
    notes: tuple[str, ...]
