"""From a configuration to cells and tasks, and what of them is done; nothing is computed here."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from demur.config import ModelSettings, RunConfig
from demur.errors import StoreError
from demur.store import Record, Ref, Store
from demur.sweep.config import SweepConfig

CLASSES = ("harmful", "harmless")
RANK = 64  # Rows of a covariance sketch, as an audit reads it by itself.
# What decides how a model behaves on the fit and select prompts, and which of them are kept.
_BEHAVIOUR = ("model", "data", "extraction", "selection", "test", "seed")


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work that one worker does, and that leaves one record behind.

    Attributes:
        kind: "prepare" learns how a model behaves on the prompts of a seed and which are kept;
            "read" reads a shard; "merge" puts the shards of a class together; "cell" is an audit.
        name: For people.
        label: Of the model.
        ref: Of the record, `kind/hash`; also the name of the task.
        about: What the worker is told, of plain values.
        size: Prompts read, 0 for other kinds.
    """

    kind: Literal["prepare", "read", "merge", "cell"]
    name: str
    label: str
    ref: str
    about: Mapping[str, Any]
    size: int = 0


@dataclass(frozen=True, slots=True)
class Cell:
    """One audit of the sweep."""

    label: str
    estimator: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.label}, {self.estimator}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Group:
    """The fit prompts of one class that cells share, and how they are read.

    Attributes:
        settings: What decides the statistics; part of the key of every shard.
        prompts: In order.
    """

    label: str
    settings: Mapping[str, Any]
    prompts: tuple[str, ...]
    model: Mapping[str, Any]

    @property
    def shards(self) -> int:
        """How many."""
        return math.ceil(len(self.prompts) / int(self.settings["shard"]))

    def shard(self, number: int) -> tuple[str, ...]:
        """The prompts of one."""
        size = int(self.settings["shard"])
        return self.prompts[number * size : (number + 1) * size]


def digest(value: Any) -> str:
    """Of plain values; the order of lists matters."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def drop(store: Store, ref: Ref) -> None:
    """Remove a record that is damaged."""
    shutil.rmtree(store.root / ref.kind / ref.hash, ignore_errors=True)


@dataclass(slots=True)
class Plan:
    """The cells of a sweep, the tasks before them, and the records that are there.

    Attributes:
        store: Where records are.
        rank: Rows of the covariance sketch, 0 where no estimator looks at the covariance.
        rows: Whether some estimator needs the activations themselves.
    """

    config: SweepConfig
    store: Store
    rank: int
    rows: bool
    cells: tuple[Cell, ...] = ()
    _prepared: dict[str, Record] = field(default_factory=dict)
    _groups: dict[str, tuple[Group, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: SweepConfig, out: Path) -> Plan:
        """Lay out the cells.

        Raises:
            UnknownNameError: An estimator does not exist.
            ConfigError: A setting of the audits does not fit.
        """
        from demur.estimators import StreamingEstimator, estimators

        made = [estimators.make(name) for name in config.estimators]
        streaming = [one for one in made if isinstance(one, StreamingEstimator)]
        cells = tuple(
            Cell(label, estimator, seed, config.run_config(settings, estimator, seed))
            for label, settings in config.labels.items()
            for seed in config.seeds
            for estimator in config.estimators
        )
        rank = RANK if any(one.covariance for one in streaming) else 0
        return cls(config, Store(out / "records"), rank, len(streaming) < len(made), cells)

    def settings(self, label: str) -> ModelSettings:
        """Of a model."""
        return self.config.labels[label]

    # Records ------------------------------------------------------------------------------------

    def get(self, ref: Ref) -> Record | None:
        """A record; one that is damaged is removed, so that it is made again."""
        try:
            return self.store.get(ref)
        except StoreError:
            drop(self.store, ref)
            return None

    def _always(self) -> dict[str, Any]:
        return {"demur": version("demur"), "threads": self.config.threads}

    def prepare(self, cell: Cell) -> Task:
        """What has to be known before the prompts of a cell can be read."""
        config = cell.config.model_dump(mode="json")
        about = {name: config[name] for name in _BEHAVIOUR}
        about["extraction"].pop("estimator")
        about = {**self._always(), "config": about}
        ref = str(self.store.key("prepared", about))
        name = f"behaviour of {cell.label}, seed {cell.seed}"
        return Task("prepare", name, cell.label, ref, about)

    def prepared(self, cell: Cell) -> Record | None:
        """What `prepare` found."""
        ref = self.prepare(cell).ref
        if ref not in self._prepared:
            record = self.get(Ref.parse(ref))
            if record is None:
                return None
            self._prepared[ref] = record
        return self._prepared[ref]

    def groups(self, cell: Cell) -> tuple[Group, ...]:
        """Of both classes of a cell; empty as long as it is not prepared."""
        record = self.prepared(cell)
        if record is None:
            return ()
        known = self.prepare(cell).ref
        if known in self._groups:
            return self._groups[known]
        found = record.summary
        model = cell.config.model.model_dump(mode="json")
        groups = []
        for on in CLASSES:
            prompts = tuple(found["fit"][on])
            settings = {
                **self._always(),
                "fingerprint": found["fingerprint"],
                "device": found["device"],
                "on": on,
                "prompts": digest(prompts),
                "sites": list(found["sites"]),
                "positions": list(found["positions"]),
                "rank": self.rank,
                "rows": self.rows,
                "batch_size": cell.config.extraction.batch_size,
                "shard": self.config.shard,
            }
            groups.append(Group(cell.label, settings, prompts, model))
        self._groups[known] = tuple(groups)
        return self._groups[known]

    def read(self, group: Group, number: int) -> Task:
        """Read one shard."""
        about = {"group": dict(group.settings), "number": number}
        ref = str(self.store.key("shard", about))
        texts = group.shard(number)
        told = {**about, "texts": list(texts), "model": dict(group.model)}
        name = f"{group.label}, {group.settings['on']} shard {number + 1} of {group.shards}"
        return Task("read", name, group.label, ref, told, len(texts))

    def merge_ref(self, group: Group) -> str:
        """The record of a group's merged statistics."""
        return str(self.store.key("merged", {"group": dict(group.settings)}))

    def merge(self, group: Group) -> Task:
        """Put the shards of a group together, in order of their number."""
        about = {"group": dict(group.settings)}
        shards = [self.read(group, number) for number in range(group.shards)]
        told = {
            **about,
            "shards": [
                {"ref": one.ref, "texts": digest(one.about["texts"]), "n": one.size}
                for one in shards
            ],
        }
        name = f"{group.label}, {group.settings['on']}: {group.shards} shards together"
        return Task("merge", name, group.label, self.merge_ref(group), told)

    def audit(self, cell: Cell) -> Task:
        """The audit of a cell."""
        groups = self.groups(cell)
        config = cell.config.model_dump(mode="json")
        about = {
            **self._always(),
            "config": {k: v for k, v in config.items() if k not in ("separation", "guard")},
            "merged": [self.merge_ref(group) for group in groups],
        }
        ref = str(self.store.key("cell", about))
        told = {**about, "config": config, "prepared": self.prepare(cell).ref, "label": cell.label}
        return Task("cell", cell.name, cell.label, ref, told)

    def row(self, cell: Cell) -> Record | None:
        """The record of a finished cell."""
        if self.prepared(cell) is None:
            return None
        return self.get(Ref.parse(self.audit(cell).ref))

    # What there is to do ------------------------------------------------------------------------

    def has(self, task: Task) -> bool:
        """Whether a task has left its record."""
        return self.get(Ref.parse(task.ref)) is not None

    def intact(self, task: Task) -> bool:
        """The same, and the record's tensors are whole; a damaged one is removed."""
        ref = Ref.parse(task.ref)
        if self.get(ref) is None:
            return False
        try:
            self.store.tensors(ref)
        except StoreError:
            drop(self.store, ref)
            return False
        return True

    def unread(self, group: Group) -> Iterator[Task]:
        """Shards that are still to be read."""
        for number in range(group.shards):
            task = self.read(group, number)
            if not self.has(task):
                yield task

    def most_shards(self, cell: Cell) -> int:
        """Of both classes of a cell that is not prepared: no more than this."""
        return len(CLASSES) * math.ceil(cell.config.data.fit / self.config.shard)

    def state(self) -> Sequence[Mapping[str, Any]]:
        """What of each cell is done, for people."""
        rows = []
        for cell in self.cells:
            groups = self.groups(cell)
            shards = sum(group.shards for group in groups)
            left = sum(1 for group in groups for _ in self.unread(group))
            rows.append(
                {
                    "model": cell.label,
                    "estimator": cell.estimator,
                    "seed": cell.seed,
                    "prepared": bool(groups),
                    "shards": shards if groups else self.most_shards(cell),
                    "shards_done": shards - left,
                    "done": self.row(cell) is not None,
                }
            )
        return rows
