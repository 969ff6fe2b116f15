"""The audit: from a model's name to a causally tested refusal direction, in resumable stages."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from demur.activations import PointMoments, collect
from demur.causal import (
    EDIT_KINDS,
    Bench,
    NeutralText,
    arms_of,
    dose_curve,
    edit_costs,
    legs,
    null_bands,
    null_directions,
    stable_seed,
    weight_edit,
)
from demur.config import RunConfig, as_toml
from demur.directions import Direction
from demur.errors import StoreError
from demur.estimators import estimators
from demur.evals.judges import judges
from demur.models import Model
from demur.pipeline.figures import Findings, assemble, decide, stability, validate
from demur.pipeline.folder import RunFolder, alone, at_work, identity, write_outputs
from demur.pipeline.separate import separate
from demur.pipeline.splits import (
    ValidationPrompts,
    licences_of,
    make_splits,
    neutral_paragraphs,
    validation_prompts,
)
from demur.pipeline.stages import (
    CLASSES,
    Baseline,
    Given,
    Job,
    baseline,
    choose,
    chosen_positions,
    chosen_sites,
    extract,
    fast_copy,
    filtered,
    load_model,
    replies,
)
from demur.progress import Listener, Quiet
from demur.results import (
    AuditResults,
    Dose,
    EditCost,
    Leg,
    NullBand,
    Validation,
    WeightEdit,
    read_results,
    sealed_json,
)
from demur.store import atomic_write

__all__ = ["AuditRun", "Listener", "Quiet", "audit", "decide", "make_splits", "separated"]


@dataclass(frozen=True, slots=True)
class AuditRun:
    """A finished audit.

    Attributes:
        folder: Where its files are.
        results: What `results.json` holds.
        reused: True if a finished run of the same settings was found and nothing was computed.
    """

    folder: Path
    results: AuditResults
    reused: bool


def audit(
    config: RunConfig,
    *,
    out: Path = Path("runs"),
    listener: Listener | None = None,
    force: bool = False,
    model: Model | None = None,
    given: Given | None = None,
) -> AuditRun:
    """Find, select and test a model's refusal direction, and write a run folder.

    Finished stages are kept: the same call after an interruption goes on where it stopped, and
    after completion returns what is there.

    Args:
        config: Everything that decides the numbers.
        out: Run folders go to `out/<model>/<stamp>-<hash>`.
        listener: Hears the progress.
        force: Start a new run even where one of the same settings exists.
        model: A loaded model, in place of loading `config.model`.
        given: What other audits share with this one, so that it is not computed again.

    Raises:
        DemurError: Whatever a user can act on; nothing half-written is left that reads as whole.
    """
    listener = listener or Quiet()
    started = datetime.now(UTC)
    splits, further = make_splits(config), validation_prompts(config)
    judge = judges.make(config.test.judge, **config.test.judge_options)
    estimators.make(config.extraction.estimator)  # A misspelt name fails before the model loads.
    model = model or _loaded(config, listener)
    chosen_sites(model, config)
    chosen_positions(model, config)
    key = identity(config, model, splits, further, given.how if given is not None else None)
    with at_work(out, config.model.name, key, force=force) as (folder, finished):
        if finished:
            return AuditRun(folder, read_results(folder), reused=True)
        settings = folder / "config.toml"
        atomic_write(settings, as_toml(config))
        run, fast = RunFolder(folder), fast_copy(model, config)
        job = Job(config, run, model, fast, splits, judge, listener, given=given)
        results, chosen = _audited(job, further)
        if not settings.is_file():
            raise StoreError(
                f"the run folder {folder} was deleted while the audit ran",
                "run again: what was written before is missing",
            )
        write_outputs(results, chosen, model, run, started)
    return AuditRun(folder, results, reused=False)


def _audited(job: Job, further: ValidationPrompts) -> tuple[AuditResults, Direction]:
    """All stages: what was measured, and the direction that was chosen."""
    config, run, model, splits = job.config, job.run, job.model, job.splits
    sets = (splits.harmful, splits.harmless, *further)
    job.notes += licences_of(part for parts in sets for part in parts.values())
    if model.template is not None and model.template.kind == "plain":
        job.notes.append(
            "the tokenizer has no chat template: prompts were laid out as `User: ... Assistant:`"
        )
    seen = baseline(job)
    fit, kept = filtered(job, seen)
    directions, readings = extract(job, fit)
    selection = choose(job, directions, fit, seen.tokens)
    rows = _rows_at(job, selection.direction, fit)
    with job.listener.stage("resampling the direction", 1) as advance:
        stable, halves = stability(rows["harmful"], rows["harmless"], selection.direction, config)
        advance(1)
    validation = run.rows(
        "validation", Validation, lambda: validate(job, selection.direction, fit, further)
    )
    tests = _test(job, selection.direction, rows, seen)
    results = assemble(
        job,
        Findings(
            fit=fit,
            kept=kept,
            baseline=seen,
            readings=readings,
            selection=selection,
            validation=validation,
            stable=stable,
            halves=halves,
            **tests,
        ),
    )
    return results, selection.direction


def _loaded(config: RunConfig, listener: Listener) -> Model:
    with listener.stage("loading the model", 1) as advance:
        model = load_model(config)
        advance(1)
    return model


def separated(
    config: RunConfig,
    *,
    out: Path = Path("runs"),
    listener: Listener | None = None,
    force: bool = False,
    model: Model | None = None,
) -> AuditRun:
    """Tell harmfulness and refusal apart, and add what is found to the audit's run folder.

    The audit of the same settings is run first, unless it is there. Arguments and errors are those
    of `audit`; settings are in `config.separation`.
    """
    listener = listener or Quiet()
    model = model or _loaded(config, listener)
    done = audit(config, out=out, listener=listener, force=force, model=model)
    judge = judges.make(config.test.judge, **config.test.judge_options)
    run = RunFolder(done.folder)
    job = Job(config, run, model, fast_copy(model, config), make_splits(config), judge, listener)
    with alone(done.folder):
        found = separate(job, baseline(job).tokens)
        reused = done.results.separation == found
        results = done.results.model_copy(update={"separation": found})
        if not reused:
            atomic_write(done.folder / "config.toml", as_toml(config))
            atomic_write(done.folder / "results.json", sealed_json(results))
    return AuditRun(done.folder, results, reused)


def _rows_at(job: Job, direction: Direction, fit: dict[str, list[str]]) -> dict[str, Tensor]:
    """The fit prompts' activations at the direction's own site and position."""
    with job.listener.stage("reading at the chosen site", len(CLASSES)) as advance:
        rows = {}
        for on in CLASSES:
            read = collect(
                job.model,
                fit[f"fit {on}"],
                sites=[direction.site],
                positions=[direction.position],
                batch_size=job.config.extraction.batch_size,
            )
            rows[on] = read.at(direction.site, direction.position)
            advance(1)
        return rows


def _test(
    job: Job, direction: Direction, rows: dict[str, Tensor], seen: Baseline
) -> dict[str, Any]:
    """The causal test on the report split, each part a stage of its own."""
    settings, size = job.config.test, job.config.extraction.batch_size
    nulls = null_directions(
        direction,
        **rows,
        each=settings.nulls,
        seed=stable_seed(job.config.seed, "nulls"),
        estimator=estimators.make(job.config.extraction.estimator),
    )
    arms = arms_of(direction, nulls, each=min(settings.null_generations, settings.nulls))
    before, after = replies(job, arms)
    few = {on: texts[: settings.null_prompts] for on, texts in job.report.items()}
    stage = job.listener.stage

    @cache
    def bench(whose: str) -> Bench:
        model = job.model if whose == "exact" else job.fast
        prompts = job.report if whose == "all" else few
        return Bench(model, **prompts, tokens=seen.tokens, batch_size=size)

    def table_rows() -> list[Leg]:
        with stage("the three legs", 1) as advance:
            table = legs(bench("all"), arms, before, after)
            advance(1)
            return table

    def band_rows() -> list[NullBand]:
        with stage("random directions", sum(map(len, nulls.values()))) as advance:
            return null_bands(bench("few"), direction, nulls, progress=advance)

    def dose_rows() -> list[Dose]:
        with stage("dose curve", len(settings.strengths)) as advance:
            return dose_curve(bench("few"), direction, settings.strengths, progress=advance)

    def edit_rows() -> list[EditCost]:
        with stage("what edits cost", EDIT_KINDS + 1) as advance:
            neutral = NeutralText(job.model, neutral_paragraphs())
            advance(1)
            points = {on: PointMoments.of(rows[on]) for on in CLASSES}
            return edit_costs(bench("exact"), neutral, direction, **points, progress=advance)

    def weight_rows() -> list[WeightEdit]:
        with stage("the same edit in the weights", 1) as advance:
            row = weight_edit(job.model, direction, job.report["harmful"][:16])
            advance(1)
            return [row]

    return {
        "before": before,
        "table": job.run.rows("legs", Leg, table_rows),
        "bands": job.run.rows("nulls", NullBand, band_rows),
        "dose": job.run.rows("dose", Dose, dose_rows),
        "edits": job.run.rows("edits", EditCost, edit_rows),
        "weights": job.run.rows("weights", WeightEdit, weight_rows)[0],
    }
