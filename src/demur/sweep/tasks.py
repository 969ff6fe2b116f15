"""What a worker does with a task; the same in a process of its own, under Ray, and in a test."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur.activations import Activations, Moments, collect, moments
from demur.config import RunConfig
from demur.errors import DemurError, StoreError
from demur.estimators import StreamingEstimator, estimators
from demur.evals.judges import judges
from demur.models import Model
from demur.pipeline import AuditRun, audit, make_splits
from demur.pipeline.folder import RunFolder
from demur.pipeline.stages import (
    Baseline,
    Given,
    Job,
    baseline,
    chosen_positions,
    chosen_sites,
    fast_copy,
    filtered,
    load_model,
)
from demur.results import AuditResults
from demur.sites import Site
from demur.store import Ref, Store
from demur.sweep.plan import CLASSES, Task, digest, drop

Tell = Callable[[str, int, int], None]
"""Called with the name of a stage, the steps done and all of them."""


class Telling:
    """A listener that hands on how far a stage is."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Say that it begins, and every step."""
        done = 0

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            self.tell(name, done, total)

        self.tell(name, 0, total)
        yield advance

    def note(self, text: str) -> None:
        """Left to the report of the audit."""


class Bench:
    """A worker's place: the folder of the sweep, and the model that it has loaded last.

    Attributes:
        out: Folder of the sweep, on a disk that all workers see.
        tell: Hears how far a task is.
    """

    def __init__(self, out: Path, tell: Tell = lambda *_: None) -> None:
        self.out = out
        self.store = Store(out / "records")
        self.listener = Telling(tell)
        self._model: tuple[str, Model] | None = None
        self._merged: dict[str, dict[str, Tensor]] = {}

    def __call__(self, task: Task) -> dict[str, Any]:
        """Do it; what it leaves is on the disk when this returns.

        Returns:
            "damaged": numbers of shards that a merge could not use, and removed.

        Raises:
            DemurError: Whatever a user can act on.
        """
        work = {
            "prepare": self._prepare,
            "read": self._read,
            "merge": self._merge,
            "cell": self._cell,
        }[task.kind]
        return work(task)

    def model(self, config: RunConfig, known: Mapping[str, Any] | None = None) -> Model:
        """Load a model, or take the one that is loaded.

        Raises:
            StoreError: It is no longer the model that was prepared.
        """
        key = config.model.model_dump_json()
        if self._model is None or self._model[0] != key:
            self._model = None  # Before the next one is loaded: there may be no room for two.
            self._merged.clear()
            with self.listener.stage("loading the model", 1) as advance:
                self._model = (key, load_model(config))
                advance(1)
        model = self._model[1]
        if known is not None and model.fingerprint != known["fingerprint"]:
            raise StoreError(
                f"{config.model.name} is no longer the model that this sweep began with",
                "put it back, or begin another sweep with `--out`",
            )
        if known is not None and model.device.type != known["device"]:
            raise StoreError(
                f"this sweep began on {known['device']}, and {config.model.name} is on "
                f"{model.device.type} now",
                "figures of the two differ by rounding: begin another sweep with `--out`",
            )
        return model

    def _prepare(self, task: Task) -> dict[str, Any]:
        config = RunConfig.model_validate(task.about["config"])
        splits = make_splits(config)
        judge = judges.make(config.test.judge, **config.test.judge_options)
        model = self.model(config)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder))
            fast = fast_copy(model, config)
            job = Job(config, run, model, fast, splits, judge, self.listener)
            seen = baseline(job)
            fit, kept = filtered(job, seen)
        summary = {
            "fingerprint": model.fingerprint,
            "device": model.device.type,
            "sites": list(map(str, chosen_sites(model, config))),
            "positions": list(chosen_positions(model, config)),
            "baseline": seen.summary(),
            "fit": {on: fit[f"fit {on}"] for on in CLASSES},
            "kept": kept,
            "seconds": time.perf_counter() - started,
        }
        self.store.put("prepared", task.about, summary=summary)
        return {}

    def _read(self, task: Task) -> dict[str, Any]:
        group, texts = task.about["group"], task.about["texts"]
        config = RunConfig.model_validate({"model": task.about["model"]})
        model = self.model(config, group)
        sites = tuple(map(Site.parse, group["sites"]))
        positions = tuple(group["positions"])
        started = time.perf_counter()
        tensors = {}
        with self.listener.stage("reading", len(texts)) as advance:
            how: dict[str, Any] = {
                "sites": sites,
                "positions": positions,
                "batch_size": group["batch_size"],
                "progress": advance,
            }
            if group["rows"]:
                read = collect(model, texts, **how)
                running = Moments(sites, positions, group["rank"])
                running.update(read.values)
                tensors["rows"] = read.values
            else:
                running = moments(model, texts, rank=group["rank"], **how)
        summary = {
            "n": running.n,
            "texts": digest(texts),
            "exact": running.exact,
            "seconds": time.perf_counter() - started,
        }
        about = {"group": group, "number": task.about["number"]}
        self.store.put("shard", about, summary=summary, tensors=tensors | _tensors(running))
        return {}

    def _merge(self, task: Task) -> dict[str, Any]:
        group = task.about["group"]
        whole = _empty(group)
        rows: list[Tensor] = []
        damaged = []
        shards = task.about["shards"]
        with self.listener.stage("putting shards together", len(shards)) as advance:
            for number, told in enumerate(shards):
                ref = Ref.parse(told["ref"])
                part = self._shard(ref, told, group)
                advance(1)
                if part is None:
                    drop(self.store, ref)
                    damaged.append(number)
                elif not damaged:
                    running, own = part
                    whole.merge(running)
                    rows += [own] if own is not None else []
        if damaged:
            return {"damaged": damaged}
        tensors = _tensors(whole) | ({"rows": torch.cat(rows, 2)} if rows else {})
        summary = {"n": whole.n, "shards": len(shards), "exact": whole.exact}
        self.store.put("merged", {"group": group}, summary=summary, tensors=tensors)
        return {}

    def _shard(
        self, ref: Ref, told: Mapping[str, Any], group: Mapping[str, Any]
    ) -> tuple[Moments, Tensor | None] | None:
        """A shard, None if it is missing, damaged, or not of these prompts."""
        try:
            record, tensors = self.store.get(ref), self.store.tensors(ref)
        except StoreError:
            return None
        assert record is not None  # Else its tensors could not have been read.
        summary = record.summary
        if (summary["n"], summary["texts"]) != (told["n"], told["texts"]):
            return None
        return _moments(tensors, summary, group), tensors.get("rows")

    def _cell(self, task: Task) -> dict[str, Any]:
        about = task.about
        config = RunConfig.model_validate(about["config"])
        prepared = self.store.get(Ref.parse(about["prepared"]))
        assert prepared is not None  # The coordinator saw it.
        known = prepared.summary
        started = time.perf_counter()
        model = self.model(config, known)
        streaming = isinstance(estimators.make(config.extraction.estimator), StreamingEstimator)

        def sides(fit: Mapping[str, list[str]]) -> Sequence[Moments | Activations]:
            found: list[Moments | Activations] = []
            for on, name in zip(CLASSES, about["merged"], strict=True):
                ref = Ref.parse(name)
                record = self.store.get(ref)
                assert record is not None
                group, own = record.settings["group"], fit[f"fit {on}"]
                if digest(own) != group["prompts"] or record.summary["n"] != len(own):
                    raise StoreError(
                        f"the statistics of {on} prompts are of {record.summary['n']} prompts, and "
                        f"this audit fits on {len(own)}",
                        f"delete the folder {self.out} and run again",
                    )
                tensors = self._tensors_of(ref)
                one = _moments(tensors, record.summary, group)
                if not streaming:
                    rows = tensors["rows"]
                    found.append(Activations(rows, one.sites, one.positions, group["fingerprint"]))
                else:
                    found.append(one)
            return found

        run = audit(
            config,
            out=self.out / "runs" / about["label"],
            listener=self.listener,
            model=model,
            given=Given(digest(about["merged"]), Baseline.of(known["baseline"]), sides),
        )
        summary = {
            "seconds": time.perf_counter() - started,
            "run": str(run.folder.relative_to(self.out)),
            "fit": {on: len(known["fit"][on]) for on in CLASSES},
            **row_of(run.results),
        }
        key = {k: v for k, v in about.items() if k not in ("prepared", "label")}
        key["config"] = {k: v for k, v in key["config"].items() if k not in ("separation", "guard")}
        self.store.put("cell", key, summary=summary, tensors={"unit": _unit(run)})
        return {}

    def _tensors_of(self, ref: Ref) -> dict[str, Tensor]:
        """Merged statistics, those of the last pair kept: the next estimator takes the same."""
        name = str(ref)
        if name not in self._merged:
            if len(self._merged) >= len(CLASSES):
                self._merged.clear()
            self._merged[name] = self.store.tensors(ref)
        return self._merged[name]


def row_of(results: AuditResults) -> dict[str, Any]:
    """What the table says of an audit, as plain values."""
    whole = results.model_dump(mode="json")
    legs = {
        leg["edit"]: leg
        for leg in whole["legs"]
        if leg["family"] == "direction" and leg["measure"] == "refused"
    }
    direction, verdict = whole["direction"], whole["verdict"]
    return {
        "site": direction["site"],
        "position": direction["position"],
        "norm": direction["norm"],
        "auroc": direction["auroc"],
        "ablation": legs["ablate"]["change"],
        "addition": legs["add"]["change"],
        "kl": whole["edits"][0]["kl"],
        "usable": verdict["usable"],
        "headline": verdict["headline"],
    }


def failure(error: BaseException, log: Path) -> dict[str, str]:
    """An error as it crosses a process boundary."""
    if isinstance(error, DemurError):
        return {"error": error.fact, "hint": error.hint}
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return {"error": f"{type(error).__name__}: {first}".rstrip(": "), "hint": f"{log} holds more"}


def _unit(run: AuditRun) -> Tensor:
    from demur.directions import load_direction

    return load_direction(run.folder / "directions.safetensors")[0].unit


def _empty(group: Mapping[str, Any]) -> Moments:
    return Moments(
        tuple(map(Site.parse, group["sites"])), tuple(group["positions"]), int(group["rank"])
    )


def _tensors(one: Moments) -> dict[str, Tensor]:
    return {"mean": one.mean, "total": one.total, "spread": one.spread}


def _moments(
    tensors: Mapping[str, Tensor], summary: Mapping[str, Any], group: Mapping[str, Any]
) -> Moments:
    one = _empty(group)
    one.n, one.exact = int(summary["n"]), bool(summary["exact"])
    one.mean, one.total, one.spread = (tensors[k] for k in ("mean", "total", "spread"))
    return one
