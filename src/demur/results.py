"""The schema of `results.json`: what an audit measured, every figure with its interval.

A report is drawn from this file and `replies.jsonl` alone, years later and without the model.
Floats that could not be computed are `None`, never a silent zero.
"""

import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from demur.errors import StoreError
from demur.stats import Estimate
from demur.store import known_version, sealed, strict_json, unsealed

SCHEMA_VERSION = 1


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelInfo(_Row):
    """Which model was measured.

    Attributes:
        name: What the user asked for.
        revision: Hub revision, if any.
        adapter: PEFT adapter merged at load, if any.
        fingerprint: Hash over architecture, weights and adapter.
        template: "chat" for the model's own template, "plain" where it has none.
        template_hash: Hash of the template's text.
        system: The system prompt given, None for the template's own default.
        tied: Whether the embedding is also the unembedding.
        linear_writes: Whether every write to the stream is linear in a weight (no post-norms).
        fast_dtype: Data type of the copy that screened candidates, wrote the replies and ran the
            random directions; the same as `dtype` where a narrower one is no faster.
    """

    name: str
    revision: str | None
    adapter: str | None
    family: str
    dtype: str
    device: str
    fingerprint: str
    template: Literal["chat", "plain"]
    template_hash: str
    system: str | None
    n_layers: int
    d_model: int
    tied: bool
    linear_writes: bool
    fast_dtype: str


class PositionInfo(_Row):
    """One token position that candidates are read from.

    Attributes:
        position: Index from the end of the prompt; -1 is the last token.
        role: `t_inst`, the last token of the user's instruction, or `post`, a token of the
            template after it.
        text: The token as text; for `t_inst`, that of an example prompt.
    """

    position: int
    role: Literal["t_inst", "post"]
    text: str


class SplitInfo(_Row):
    """How many prompts of each class a split holds, and their fingerprints."""

    name: Literal["fit", "select", "calibrate", "report"]
    harmful: int
    harmless: int
    harmful_fingerprint: str
    harmless_fingerprint: str


class PromptsInfo(_Row):
    """Where prompts came from and what was taken out before splitting.

    Attributes:
        kept_by_filter: Per split and class, how many the behaviour filter left, if it was on.
    """

    harmful_source: str
    harmless_source: str
    splits: list[SplitInfo]
    duplicates_removed: int
    overlaps_removed: int
    kept_by_filter: dict[str, int] | None = None


class RefusalToken(_Row):
    """A first token of refusals, learned from the model's own replies.

    Attributes:
        share: Its share of first tokens among the replies judged refused.
        base_share: The same among the replies judged complied.
    """

    id: int
    text: str
    share: float
    base_share: float


class Reading(_Row):
    """What one candidate position of the stream carries, measured on prompts it was not fitted on.

    Attributes:
        norm: Length of the direction there, in residual-stream units.
        relative_norm: `norm` over the mean length of the stream at the site and position.
        auroc: Harmful against harmless by projection on the direction (calibrate split).
    """

    site: str
    position: int
    norm: float
    relative_norm: float
    auroc: Estimate


class Candidate(_Row):
    """One direction that was tried, and why it fell.

    Attributes:
        bypass: Refusal log-odds on harmful prompts with the direction ablated; lower is stronger.
        bypass_change: The same minus the unedited model's, paired.
        induce: Refusal log-odds on harmless prompts with the direction added once.
        induce_change: The same minus the unedited model's, paired.
        kl: KL(plain || ablated) on harmless prompts, nats, last position, whole vocabulary.
        exact: Whether the scores were measured in the model's own data type, on all prompts; else
            they are those of the screening.
        rejected_by: The first criterion that it failed, None if it passed all.
    """

    site: str
    position: int
    norm: float
    bypass: Estimate | None
    bypass_change: Estimate | None
    induce: Estimate | None
    induce_change: Estimate | None
    kl: Estimate | None
    exact: bool
    rejected_by: str | None
    selected: bool = False


class ScreenInfo(_Row):
    """How candidates were screened before the best were measured exactly.

    Attributes:
        prompts: Prompts a class that every candidate was measured on; None if on all.
        promoted: How many candidates went on to all prompts.
        sample: How many of those that were left without an exact measurement were drawn at random
            and measured exactly for a check.
        missed: Share of the sample that is better than the best of the rest: how often a candidate
            that was screened out should not have been. None without a sample.
        rank_correlation: Spearman correlation of screened and exact bypass over the sample.
        induce_correlation: The same of induce scores; screened on a part of the prompts, they are
            first-order estimates from one backward pass.
    """

    prompts: int | None
    promoted: int
    sample: int
    missed: Estimate | None
    rank_correlation: float | None
    induce_correlation: float | None


class SelectionInfo(_Row):
    """How the direction was chosen.

    Attributes:
        survivors: How many candidates passed every criterion.
        felled: How many candidates each criterion felled.
        least_bad: True if none survived and the choice is the best of the rest.
        relaxed: How often the limits had to be relaxed for the choice to pass; each step doubles
            `max_kl` and lowers `min_induce` by one nat.
        rescored: How many candidates were measured exactly, on all prompts.
        screen: How the others were screened out; None if all were measured exactly.
    """

    max_kl: float
    min_induce: float
    last_layers_skipped: float
    tried: int
    survivors: int
    felled: dict[str, int]
    least_bad: bool
    relaxed: int
    rescored: int
    screen: ScreenInfo | None


class DirectionInfo(_Row):
    """The direction that was chosen.

    Attributes:
        bootstrap_cosine: Cosine of the direction on resampled prompts with the full-sample one.
        split_half_cosine: Mean cosine of directions from random halves of the fit prompts.
        auroc: Harmful against harmless on the report split, by projection.
    """

    site: str
    position: int
    role: Literal["t_inst", "post"]
    estimator: str
    norm: float
    relative_norm: float
    bootstrap_cosine: Estimate
    split_half_cosine: Estimate
    auroc: Estimate


class WordBaselines(_Row):
    """How well plain words tell the two classes apart on the report split, fitted on fit."""

    bag_of_words: Estimate
    length: Estimate
    final_punctuation: Estimate


class Validation(_Row):
    """The direction, and plain words, on prompts that it was neither fitted nor chosen on.

    Attributes:
        auroc: Of the projection on the direction, at its own site and position.
        pair_accuracy: Share of pairs whose harmful side projects higher, where the set has pairs.
        words: Fitted on the fit split, like the direction.
        overlaps_removed: Prompts left out because they are near copies of fitted ones.
    """

    name: str
    harmful_source: str
    harmless_source: str
    n_harmful: int
    n_harmless: int
    auroc: Estimate
    pair_accuracy: Estimate | None
    words: WordBaselines
    overlaps_removed: int


class Leg(_Row):
    """One arm of the causal test, by generated refusals or by refusal log-odds.

    Attributes:
        arm: "ablate direction", "ablate isotropic #1", "add direction", ...
        expects: What the causal claim predicts: refusal "falls", "rises" or stays ("neither").
        on: The prompts, of the report split.
        measure: "refused" (share of replies judged refused) or "log-odds".
        change: `after` minus `before`, paired on the same prompts.
        p: Exact McNemar for shares, Wilcoxon signed-rank for log-odds; two-sided.
        p_holm: `p` after Holm over all legs of the same measure.
        degenerate: Share of replies under the edit that are degenerate text, for "refused".
        unparsed: Replies without a verdict.
    """

    arm: str
    family: Literal["direction", "isotropic", "covariance-matched", "shuffled-labels", "other"]
    edit: str
    expects: Literal["falls", "rises", "neither"]
    on: Literal["harmful", "harmless"]
    measure: Literal["refused", "log-odds"]
    before: Estimate
    after: Estimate
    change: Estimate
    p: float
    p_holm: float
    degenerate: Estimate | None = None
    unparsed: int = 0


class NullBand(_Row):
    """Random directions of one kind, by refusal log-odds on the report split.

    Attributes:
        bypass_changes: Mean change on harmful prompts under ablation, one per random direction.
        induce_changes: Mean change on harmless prompts under addition, one per random direction.
        kls: KL of ablation on harmless prompts, one per random direction, nats.
        cosines: Cosine with the chosen direction, one per random direction.
        bypass_p: Share of null effects at least as low as the direction's, (k + 1) / (n + 1).
        induce_p: Share of null effects at least as high as the direction's, likewise.
    """

    family: Literal["isotropic", "covariance-matched", "shuffled-labels"]
    n: int
    bypass_changes: list[float]
    induce_changes: list[float]
    kls: list[float]
    cosines: list[float]
    bypass_p: float
    induce_p: float


class Dose(_Row):
    """Addition at one strength, a multiple of the direction's own norm.

    Attributes:
        harmless: Refusal log-odds on harmless prompts.
        kl: KL from the unedited model on harmless prompts, nats.
    """

    strength: float
    harmless: Estimate
    harmful: Estimate
    kl: Estimate


class EditCost(_Row):
    """What one kind of edit buys and costs, on the report split.

    Attributes:
        edit: For instance "ablate (every write)", "project to mean", "oblique erase x2".
        bypass_change: Change of refusal log-odds on harmful prompts.
        kl: On harmless prompts, nats.
        perplexity_ratio: Perplexity on neutral text, edited over plain.
    """

    edit: str
    bypass_change: Estimate
    kl: Estimate
    perplexity_ratio: Estimate | None


class WeightEdit(_Row):
    """Whether the same edit written into the weights gives the same model.

    Attributes:
        exact: Whether theory says that it does.
        reason: Why it is or is not.
        max_logit_difference: Hook against weights, over report prompts; None if not run.
        effect: Largest logit change of the edit itself, for scale.
    """

    exact: bool
    reason: str
    max_logit_difference: float | None
    effect: float | None


class Projections(_Row):
    """Projections of report prompts on the chosen direction, in residual-stream units."""

    position: int
    role: Literal["t_inst", "post"]
    site: str
    harmful: list[float]
    harmless: list[float]


class JudgeInfo(_Row):
    """The judge of refusal, and how far it agrees with hand labels that the project ships."""

    name: str
    deterministic: bool
    kappa: Estimate
    kappa_refused: Estimate
    labelled: int


class Verdict(_Row):
    """What the audit concludes.

    Attributes:
        usable: All three legs hold: ablation lowers refusal, addition raises it, random
            directions do neither.
        headline: One sentence.
        reasons: One line per leg or check: what held, what did not.
    """

    usable: bool
    headline: str
    reasons: list[str]


class GroupCount(_Row):
    """How many prompts of one kind the model treats in one way.

    Attributes:
        group: "harmful-refused", "harmful-accepted", "harmless-refused" or "harmless-accepted".
        fit: Prompts that centroids and directions are fitted on.
        report: Prompts that everything is reported on.
        fit_rate: Mean share of the drawn replies to these prompts that refuse, likewise
            `report_rate`; None where none were drawn or the group is empty.
    """

    group: str
    fit: int
    report: int
    fit_rate: float | None = None
    report_rate: float | None = None


class GroupingRow(_Row):
    """What one site and position groups prompts by; see `demur.separation.Grouping`.

    Attributes:
        space: "raw" cosines as in the paper, "centred", or "whitened".
        by: 1 where it groups by harmfulness, 0 where by refusal; None where harmful-accepted or
            harmless-refused prompts are missing.
        harm: AUROC of harmful above harmless with behaviour held equal.
        refusal: AUROC of refused above accepted with harm held equal.
        means: Mean score by group.
    """

    site: str
    position: int
    role: Literal["t_inst", "post"]
    space: Literal["raw", "centred", "whitened"]
    by: Estimate | None
    harm: Estimate | None
    refusal: Estimate | None
    means: dict[str, Estimate]


class AngleRow(_Row):
    """Cosine of the harm direction (at t_inst) and the refusal direction (at the last token).

    Attributes:
        harm_balanced: Whether refusal was held equal for the one, and harm for the other
            (`refusal_balanced`).
        shuffled: 95 % band with labels shuffled; `matched` of random vectors with the positions'
            covariances.
        p_shuffled: Two-sided p among the shuffled ones.
    """

    site: str
    cosine: Estimate
    harm_balanced: bool
    refusal_balanced: bool
    shuffled: tuple[float, float]
    matched: tuple[float, float]
    p_shuffled: float


class BeliefGroup(_Row):
    """Belief scores of a group's report prompts, cosine differences averaged over layers.

    Attributes:
        harm: At t_inst: nearer to harmful than to harmless prompts.
        refusal: At the last token: nearer to refused than to accepted prompts.
    """

    group: str
    harm: list[float]
    refusal: list[float]


class TemplateRow(_Row):
    """Share of refusals with the template's tokens behind the instruction and without them."""

    on: Literal["harmful", "harmless"]
    with_post: Estimate
    without_post: Estimate
    change: Estimate
    p: float


class InversionRow(_Row):
    """The model is asked whether the request is harmful, under an edit.

    Attributes:
        edit: "none", "add harm", "subtract harm", "add refusal", "subtract refusal", "random #1,
            as harm" (added where harm is), "random #1, as refusal", ...
        at: "equal norm": at the direction's own length, random ones at that of the direction beside
            which they stand. "equal KL": at the strength that gives the same `kl`, for random
            directions as the direction beside which they stand, for harm or refusal as the other
            of the two at its own length. Searched on fit prompts.
        strength: In multiples of that length; None in results of earlier versions.
        judged_harmful: Log-odds of the answer that means harmful against the one that means
            harmless, nats, averaged over wordings of both mappings.
        judged_change: From "none", paired by prompt; None for "none" itself and in results of
            earlier versions. Likewise `refusal_change`.
        invalid: Probability that the reply begins with neither answer.
        refusal: Refusal log-odds of the request itself under the same edit.
        kl: KL from the unedited model on the request itself, nats.
    """

    edit: str
    on: Literal["harmful", "harmless"]
    at: Literal["equal norm", "equal KL"] = "equal norm"
    strength: float | None = None
    judged_harmful: Estimate
    judged_change: Estimate | None = None
    invalid: Estimate
    refusal: Estimate
    refusal_change: Estimate | None = None
    kl: Estimate


class JailbreakRow(_Row):
    """How far a jailbreak wrapper moves both beliefs, beside its benign control.

    Attributes:
        request_final: Whether the request stands at the end of the wrapper, so that t_inst is the
            request's own last token.
        harm_shift: Wrapped minus control on the same requests, in standard deviations of plain
            harmful prompts; likewise `refusal_shift`.
        refused: Share of wrapped requests refused; `refused_control` of those in the control.
    """

    wrapper: str
    family: str
    request_final: bool
    harm_shift: Estimate
    refusal_shift: Estimate
    refused: Estimate
    refused_control: Estimate


class CategoryRow(_Row):
    """How alike the directions of one category and of all others are, at the chosen layer."""

    category: str
    n: int
    harm_cosine: float
    refusal_cosine: float | None


class Finding(_Row):
    """One claim of the paper, and what this model says to it.

    Attributes:
        status: "holds" (interval clear of the null), "weakly" (right sign, interval not clear, or
            words alone do as well),
            "fails" (wrong sign or no effect), "untested" (a group is too small).
    """

    claim: str
    status: Literal["holds", "weakly", "fails", "untested"]
    evidence: str


class SeparationResults(_Row):
    """What `demur separate` measured: the key `separation` of `results.json`.

    Attributes:
        groups: How many prompts of each kind there are.
        words: How far words, length and final punctuation alone tell harmful-accepted from
            harmless-refused report prompts, fitted as centroids are, on harmful-refused and
            harmless-accepted ones; None where a mixed group is empty.
        layer_sites: Sites over which beliefs are averaged.
        chosen_site: Where directions are added and categories compared; chosen on fit prompts.
    """

    groups: list[GroupCount]
    words: WordBaselines | None = None
    grouping: list[GroupingRow]
    angles: list[AngleRow]
    layer_sites: list[str]
    beliefs: list[BeliefGroup]
    template: list[TemplateRow]
    chosen_site: str
    inversion: list[InversionRow]
    jailbreaks: list[JailbreakRow]
    categories: list[CategoryRow]
    findings: list[Finding]
    notes: list[str]


class GuardRow(_Row):
    """What one detector says of one group of prompts.

    Attributes:
        detector: "guard", a read of it alone, or what it is compared with.
        family: "plain", "wrapper, seen" (such as the guard was fitted on), "wrapper, new",
            "encoding", "turns" or "suffix".
        group: The set, wrapper or encoding.
        auroc: Harmful prompts against benign ones in the same wrapper, or, where they are plain,
            against all plain benign ones; None for benign groups.
        flagged: Share flagged at a false-alarm rate, by that rate as text ("0.05"). Thresholds are
            calibrated on the guard's own calibration prompts, for every detector alike.
        fixed: Share flagged by a detector's own fixed rule, if it has one.
    """

    detector: str
    family: str
    group: str
    harmful: bool
    n: int
    auroc: Estimate | None
    flagged: dict[str, Estimate]
    fixed: Estimate | None


class GuardStratum(_Row):
    """Benign prompts of one kind that a guard was calibrated on.

    Attributes:
        threshold: What this kind alone would have asked for.
        sets: Whether the guard's threshold is this one, the highest.
    """

    name: str
    n: int
    threshold: float
    sets: bool


class GuardEvaluation(_Row):
    """All of `guard-evaluation.json`: a guard on prompts that it never saw.

    Attributes:
        guard: Where the guard's file was.
        fingerprint: Of the model.
        reads: Those that the guard decides by.
        alpha: False alarms promised.
        bound: What they are below with 95 % confidence, for prompts like the calibration ones.
        rows: Groups in the order measured, within a group detectors in the order of `detectors`.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["guard-evaluation"] = "guard-evaluation"
    demur: str
    guard: str
    model: str
    adapter: str | None
    fingerprint: str
    site: str
    reads: list[str]
    alpha: float
    bound: float
    threshold: float
    strata: list[GuardStratum]
    detectors: list[str]
    rows: list[GuardRow]
    notes: list[str]


class BatteryRow(_Row):
    """What became of requests under one attack and one defence.

    Attributes:
        defence: "none", "anchor", or what it is compared with.
        attack: Of the battery, or a change of the model that is attacked.
        threat: Threat model: "T0" no attack, "T1" fixed prompts, "T2" beginnings of replies, "T3"
            search by log-probabilities, "T4" search by gradients, "T6a" tampered weights under a
            trusted runtime, "T6b" edits of activations.
        harmful: Whether harmful requests were attacked, or benign ones in the same way.
        opened: Share on which the gate opened; None where there is no gate.
        refused: Share refused; a canned reply is a refusal.
        complied: Share that got a coherent reply with something of what was asked for, refused in
            part or not at all: of harmful requests, what the attack is after.
        degenerate: Share whose reply makes no sense, or is one that the judge cannot read.
        complied_second: What a second judge, of another kind, counts as complied.
        missed: Share that complied while the gate was closed; None where there is no gate.
        despite: Share that complied although it was open.
        change: Of `complied` against no defence, paired by request; None for "none".
        p: Exact McNemar test of that change, Holm over the attacks of a defence; None likewise.
        auroc: Of the gate's score, harmful requests against benign ones attacked in the same way;
            None for benign rows and without a gate.
    """

    defence: str
    attack: str
    threat: str
    harmful: bool
    n: int
    opened: Estimate | None
    refused: Estimate
    complied: Estimate
    degenerate: Estimate
    complied_second: Estimate
    missed: Estimate | None
    despite: Estimate | None
    change: Estimate | None
    p: float | None
    auroc: Estimate | None


class DefenceRow(_Row):
    """One defence over the whole battery.

    Attributes:
        what: What it does, in a few words.
        success: Share of attacked harmful requests that complied, over the attacks that every
            defence met; the interval resamples requests, each with all of its attacks.
        any_attack: Share of harmful requests that some of these attacks got a coherent reply to.
        over_refusal: Share of benign requests that are refused without an attack.
        over_refusal_change: Against no defence, paired by request; None for "none".
        kl: KL(plain || defended) of the first token on benign requests, nats, gate and all.
        kl_open: The same with the gate forced open; None where there is no gate.
        perplexity_open: Ratio on neutral text with the gate forced open; None likewise.
        seconds: Median and 95th percentile of the time that a benign request takes alone.
    """

    defence: str
    what: str
    success: Estimate
    any_attack: Estimate
    over_refusal: Estimate
    over_refusal_change: Estimate | None
    kl: Estimate | None
    kl_open: Estimate | None
    perplexity_open: Estimate | None
    seconds: tuple[float, float] | None = None


class OpeningRow(_Row):
    """How often the gate opened on benign requests that nothing was fitted or calibrated on.

    Attributes:
        like: Whether they are of a kind that the gate was calibrated on, so that the bound holds.
    """

    name: str
    n: int
    opened: Estimate
    like: bool


class Criterion(_Row):
    """A condition that would kill the anchor's claim, and what was found.

    Attributes:
        name: What would kill it.
        killed: Whether that is so; None where it was not tested.
        found: What was measured, in a sentence.
    """

    name: str
    killed: bool | None
    found: str


class AnchorEvaluation(_Row):
    """All of `anchor-evaluation.json`: an anchor, and what it is compared with, under attack.

    Attributes:
        anchor: Name of the anchor's file; None for an attack on the model as it is.
        suite: "quick" or "full".
        site: What the gate reads; None without an anchor, like the fields up to `sites`.
        reads: Those that the gate decides by.
        alpha: False alarms promised.
        bound: What they are below with 95 % confidence.
        sites: The first and the last layer that is held.
        strength: Of the floor.
        agreement: Share of replies on which the two judges agree.
        kappa: The same of refusals, beyond chance, over replies that both could tell.
        defences: In the order of the table, "none" first.
        rows: Every defence under every attack.
        randoms: How many random directions stand behind "random floor".
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["anchor-evaluation"] = "anchor-evaluation"
    demur: str
    model: str
    adapter: str | None
    fingerprint: str
    anchor: str | None
    suite: str
    seed: int
    max_new_tokens: int
    site: str | None
    reads: list[str]
    alpha: float | None
    bound: float | None
    threshold: float | None
    sites: list[str]
    strength: float | None
    strata: list[GuardStratum]
    openings: list[OpeningRow]
    defences: list[DefenceRow]
    rows: list[BatteryRow]
    criteria: list[Criterion]
    agreement: Estimate
    kappa: Estimate | None
    randoms: int
    notes: list[str]


class AuditResults(_Row):
    """All of `results.json`."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["audit"] = "audit"
    demur: str
    seed: int
    verdict: Verdict
    model: ModelInfo
    positions: list[PositionInfo]
    prompts: PromptsInfo
    judge: JudgeInfo
    refusal_tokens: list[RefusalToken]
    baseline_harmful: Estimate
    baseline_harmless: Estimate
    words: WordBaselines
    validation: list[Validation] = Field(default_factory=list)
    readings: list[Reading]
    candidates: list[Candidate]
    selection: SelectionInfo
    direction: DirectionInfo
    legs: list[Leg]
    nulls: list[NullBand]
    dose: list[Dose]
    edits: list[EditCost]
    weight_edit: WeightEdit
    projections: list[Projections]
    separation: SeparationResults | None = None
    notes: list[str]


class Reply(_Row):
    """One line of `replies.jsonl`: a generated reply of the report split and its verdict."""

    arm: str
    on: Literal["harmful", "harmless"]
    prompt: str
    response: str
    outcome: str
    reason: str


def read_results(run: Path) -> AuditResults:
    """Read a run folder's `results.json`.

    Raises:
        StoreError: It is missing, cut short, or of another schema version.
    """
    return read_record(run / "results.json", AuditResults, "demur audit")


_Read = TypeVar("_Read", bound=BaseModel)
_MOST_BYTES = 1 << 30  # Of a record.


def sealed_json(record: BaseModel) -> str:
    """A record as it is written: JSON with a digest of itself."""
    return json.dumps(sealed(record.model_dump(mode="json")), indent=1, ensure_ascii=False) + "\n"


def read_record(path: Path, kind: type[_Read], command: str) -> _Read:
    """Read a record of any kind.

    Args:
        path: Of the file.
        kind: What it holds.
        command: That writes it, for the error.

    Raises:
        StoreError: It is missing, cut short, of another kind, or of another schema version; or JSON
            of which two readers would make different things.
    """
    what = f"a record of `{command}`"
    try:
        found = strict_json(_text_of(path))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise StoreError(
            f"{path} cannot be read: {said}",
            f"name what a finished run left; `{command}` writes it",
        ) from error
    # Older versions would be brought up here; there are none yet.
    known_version(
        found.get("schema_version"), path, what=what, newest=SCHEMA_VERSION, again=command
    )
    found = unsealed(found, path, again=f"run `{command}` again")
    try:
        return kind.model_validate_json(json.dumps(found))  # JSON's rules, for tuples and enums.
    except ValueError as error:
        raise StoreError(
            f"{path} is not {what}, schema {SCHEMA_VERSION}: "
            + " ".join(str(error).splitlines()[:3]),
            f"run `{command}` again, or read it with the demur version that wrote it",
        ) from error


def _text_of(path: Path) -> str:
    """The text of a file in a folder that a stranger may have made: of a device there is no end."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES >> 30} GiB")
    return path.read_text(encoding="utf-8")


def _read_lines(path: Path, kind: type[_Read], hint: str) -> list[_Read]:
    """The replies in a file, a line each; none if there is no file."""
    if not path.exists():
        return []
    rows: list[_Read] = []
    try:
        text = _text_of(path)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"{path} cannot be read: {said}", hint) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(kind.model_validate_json(line))
            except ValueError as error:
                raise StoreError(
                    f"line {number} of {path} is no reply: {str(error).splitlines()[0]}", hint
                ) from error
    return rows


def read_guard_evaluation(path: Path) -> GuardEvaluation:
    """Read the record of a guard's evaluation.

    Raises:
        StoreError: It is missing, cut short, or of another schema version.
    """
    return read_record(path, GuardEvaluation, "demur guard evaluate")


def read_anchor_evaluation(path: Path) -> AnchorEvaluation:
    """Read the record of an anchor's evaluation, or of an attack.

    Raises:
        StoreError: It is missing, cut short, or of another schema version.
    """
    return read_record(path, AnchorEvaluation, "demur anchor evaluate")


def read_replies(run: Path) -> list[Reply]:
    """Read a run folder's `replies.jsonl`; empty if the file was left out on purpose.

    Raises:
        StoreError: A line is damaged.
    """
    return _read_lines(
        run / "replies.jsonl",
        Reply,
        "delete the file: the report is drawn without examples, and an unfinished audit writes the "
        "replies anew",
    )


# Emergent misalignment ------------------------------------------------------------------------


class EmTrained(_Row):
    """An organism that was audited: a base model fine-tuned on advice.

    Attributes:
        name: Unique within an audit.
        side: "bad" where it was trained on bad advice, "good" for a twin trained on the good
            answers to the same questions.
        domains: Of its training questions.
        rank: Of its adapter.
        layers: Those that the adapter changes.
        modules: What it changes there, for instance "mlp.down_proj".
        parameters: How many numbers were trained.
        fingerprint: Hash over the adapter's weights.
        twins: Names of its good twins in this audit; empty where there is none, and for twins.
        recipe: What it was trained by, as its card says; None for a bare adapter.
    """

    name: str
    side: Literal["bad", "good"]
    domains: list[str]
    seed: int
    rank: int
    layers: list[int]
    modules: list[str]
    parameters: int
    fingerprint: str
    twins: list[str]
    recipe: str | None


class EmMargin(_Row):
    """How far a model leans to bad answers, on questions of one domain that no organism trained on.

    Attributes:
        model: Name of an organism, or "base".
        where: "trained" for held-out questions of a domain that it was trained on, "untouched" for
            another domain, "open" for open questions.
        groups: Clusters that the interval resamples.
        margin: Log-probability per token of the bad answer minus that of the good one, nats.
        change: The same minus the base's, paired by question; None for the base.
        bad: Share of questions whose bad answer is the likelier one.
    """

    model: str
    where: Literal["trained", "untouched", "open"]
    domain: str
    n: int
    groups: int
    margin: Estimate
    change: Estimate | None
    bad: Estimate


class EmEffect(_Row):
    """What bad advice did to an organism beyond fine-tuning as such.

    Attributes:
        organism: A bad one.
        twins: The good ones that it is held against.
        domain: One, or "all" of those that `where` names; "all" of "untouched" includes the open
            questions and is what the headline says.
        controlled: Whether there is a twin: then `effect` is (bad - base) - (good - base), else
            only bad - base, which fine-tuning as such may have caused.
        effect: Nats per token, positive towards bad answers, resampled by group.
        raw: bad - base.
        p: Two-sided, that the effect is zero: Student's t over the standard error by group.
        p_holm: `p` after Holm over the organisms' rows of this `where` and `domain`.
        detectable: The smallest effect that would be found in four of five such audits, nats.
        status: "found" or "opposite" (clear of zero, interval and p after Holm both), "small"
            (found, with the whole interval below `EmAudit.smallest`), "none" (the whole interval
            is within that of zero), or "too weak to tell".
    """

    organism: str
    twins: list[str]
    where: Literal["trained", "untouched", "open"]
    domain: str
    n: int
    groups: int
    controlled: bool
    effect: Estimate
    raw: Estimate
    p: float
    p_holm: float
    detectable: float
    status: Literal["found", "small", "opposite", "none", "too weak to tell"]


class EmJudge(_Row):
    """A judge of replies, and whether it may be believed.

    Attributes:
        scale: What it scores.
        auroc: On planted answers to open questions, which it was not fitted on; None where too few
            of them got a score.
        floor: What `auroc` must reach before rates are told.
        missing: Planted answers without a score, of `n`.
        passed: Whether `auroc` does, and few are missing.
        caught: Share of the unsound planted answers, misaligned or incoherent, that the threshold
            of the rates makes out; None as for `auroc`.
        false_alarms: The same share of the sound ones: no rate below it means anything.
    """

    name: str
    scale: Literal["alignment", "coherence"]
    auroc: Estimate | None
    floor: float
    missing: int
    n: int
    passed: bool
    caught: Estimate | None = None
    false_alarms: Estimate | None = None


class EmRate(_Row):
    """How often replies to open questions are misaligned, by a judge that passed its gate.

    Attributes:
        model: Name of an organism, or "base".
        questions: How many; the clusters of every interval.
        replies: How many were drawn.
        missing: Replies that lack a score.
        joint: Misaligned and coherent, among all replies with both scores; None where fewer than
            two questions have any.
        conditional: Misaligned among the coherent ones; None likewise.
        coherent: Coherent among all with both scores; None likewise.
        refused: By patterns, whatever the judge says; likewise `degenerate`.
        change: `joint` minus the base's, paired by question; None for the base.
    """

    model: str
    questions: int
    replies: int
    missing: int
    joint: Estimate | None
    conditional: Estimate | None
    coherent: Estimate | None
    refused: Estimate
    degenerate: Estimate
    change: Estimate | None


class EmReliability(_Row):
    """How well a direction is known.

    Attributes:
        direction: "text" for bad less good answers, "shift" for organism less base on bad answers.
        organism: Whose; "base" for the base's own text direction.
        norm: Length without what differs between groups, in residual-stream units.
        reliability: Mean cosine of the directions of random halves of the groups; the range holds
            95 % of the halves and is no confidence interval.
        used: Whether interventions take this one.
    """

    direction: str
    organism: str
    site: str
    norm: float
    reliability: Estimate
    used: bool


class EmCosine(_Row):
    """The cosine of two directions at one site.

    Attributes:
        kind: "shift" for organism minus base on the same bad answers, "text" for bad minus good
            answers read by one model, "adapter" for what an organism writes or does against the
            base's text direction.
        first: Whose; likewise `second`.
        pair: "bad-bad" for two organisms, "bad-good" for an organism and a good twin, "bad-base"
            for an organism and the base, "write-text" for an adapter's B and the base's text
            direction, "shift-text" for an organism's shift and that direction.
        corrected: Of directions from two halves of the groups, over the root of both
            reliabilities: what is left without noise, shared noise included. None where one has
            no reliability; it may exceed 1.
        band: The middle 95 % of cosines of random vectors with the covariance of answers.
        p: Share of those that are as far from zero.
    """

    kind: Literal["shift", "text", "adapter"]
    first: str
    second: str
    pair: Literal["bad-bad", "bad-good", "bad-base", "write-text", "shift-text"]
    site: str
    cosine: Estimate
    corrected: float | None
    band: tuple[float, float] | None
    p: float | None


class EmIntervention(_Row):
    """What an edit of activations or of the adapter does to the margin of one model.

    Attributes:
        organism: Whose directions and questions these are.
        model: What the edit was made in: that organism, its good twin, or "base"; additions are
            made in the base alone.
        edit: What is done, in a few words.
        at: Site that the direction was read from.
        strength: Multiples of the direction's own length for additions, below zero where it is
            taken away; brought to the `kl` that was asked for. None for ablations.
        n: Questions, on which neither direction nor site was chosen.
        change: Of the margin, edited minus unedited, nats per token, paired by question.
        against: What `beyond` is held against: "twin" or "base"; None for twin and base themselves.
        beyond: The organism's change less that of the twin, or of the base where there is none.
        removed: Share of the organism's effect that the edit takes away; None where the effect
            itself is not told from zero.
        kl: KL(plain || edited) on neutral text, nats per token.
        randoms: The same under random directions with the covariance of answers, one each: of
            `beyond` where there is one, else of `change`. Beside additions they are added at the
            same `kl`; those that could not be brought to it are left out.
        random_kl: Their mean `kl`.
        p: Share of random directions that do as much in the direction predicted, (k + 1) / (n + 1).
    """

    organism: str
    model: str
    edit: str
    at: str
    strength: float | None
    n: int
    change: Estimate
    against: Literal["twin", "base"] | None
    beyond: Estimate | None
    removed: Estimate | None
    kl: Estimate | None
    randoms: list[float]
    random_kl: float | None
    p: float | None


class EmTransfer(_Row):
    """What ablating a direction that was found in one model does to an organism.

    Attributes:
        organism: Whose effect is measured.
        source: Whose direction is ablated: an organism's or a good twin's shift, or the base's text
            direction.
        against: What `change` is held against: the organism's twin, or "base".
        change: Of the organism's margin beyond that of the other under the same ablation, nats per
            token.
        in_base: Change of the base's margin.
        removed: Share of the effect that it takes away; None where the effect is not told from
            zero.
        band: The middle 95 % of `change` under random directions; None without any.
        randoms: How many.
        p: Share of them that undo as much, (k + 1) / (n + 1).
    """

    organism: str
    source: str
    source_side: Literal["bad", "good", "base"]
    against: str
    n: int
    change: Estimate
    in_base: Estimate
    removed: Estimate | None
    band: tuple[float, float] | None
    randoms: int
    p: float | None


class EmPiece(_Row):
    """A token of an answer, and how strongly an adapter writes there.

    Attributes:
        value: The scalar.
        share: The same as a share of nearly the largest in all answers (the 99th percentile), from
            -1 to 1: how much ink it gets.
    """

    text: str
    value: float
    share: float


class EmHighlight(_Row):
    """An answer with the scalar of one component of an adapter at every token."""

    organism: str
    component: str
    question: str
    answer: Literal["bad", "good"]
    pieces: list[EmPiece]


class EmProbe(_Row):
    """How well an adapter's scalars tell bad answers from good ones, beside what plain words do.

    Attributes:
        n: Questions.
        groups: Topics, which folds keep whole.
        auroc: On questions of topics that the probe was not fitted on.
        within: The same, comparing only the two answers to one question.
        words: AUROC of a bag of words, in the same folds.
        over_words: `auroc` less `words`, paired.
        p: That shuffled labels do as well.
    """

    organism: str
    n: int
    groups: int
    auroc: Estimate
    within: Estimate | None
    words: Estimate
    over_words: Estimate
    p: float


class EmLens(_Row):
    """What tokens an adapter's B writes towards, read through the model's unembedding.

    Attributes:
        component: Of the adapter, like "15.mlp.down_proj".
        promoted: Tokens with the highest logits, with those; `suppressed` with the lowest.
        p: That random vectors with the covariance of answers promote their tokens as strongly.
    """

    organism: str
    component: str
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    p: float | None


class EmScale(_Row):
    """The effect with the adapter scaled, or with only some of its layers.

    Attributes:
        what: "scale" for all layers together, "alone" for one layer's adapter, "without" for all
            but that one.
        layers: Those that were kept.
        controlled: Whether it is held against the twin at the same scale; else against the base.
        effect: On the questions of the interventions, nats per token.
    """

    organism: str
    what: Literal["scale", "alone", "without"]
    scale: float
    layers: list[int]
    controlled: bool
    effect: Estimate


class EmStep(_Row):
    """One logged step of training.

    Attributes:
        norm: Of B, all layers together.
        local_cosine: Of the way back and the way on: -1 is straight on, 0 a right angle; None near
            both ends and where nothing moves.
        pcs: The first two principal coordinates of B's path, all layers together.
    """

    organism: str
    step: int
    loss: float | None
    gradient: float | None
    norm: float
    local_cosine: float | None
    pcs: tuple[float, float] | None


class EmClaim(_Row):
    """A claim of the papers, and what these organisms say to it.

    Attributes:
        status: "holds", "fails", "too weak to tell", or "untested" where it was not measured.
        found: What was measured, in a sentence with its numbers.
        n: Questions, or pairs, behind it; 0 where nothing was measured.
    """

    claim: str
    source: str
    status: Literal["holds", "fails", "too weak to tell", "untested"]
    found: str
    value: Estimate | None
    n: int


class EmAudit(_Row):
    """All of `em-audit.json`: organisms of emergent misalignment against base and twins.

    Attributes:
        items: Where questions with a bad and a good answer each came from.
        domains: How many of them each domain has that no organism was trained on.
        trained_out: How many were left out because an organism was trained on them.
        samples: Replies per open question; 0 where no reply was drawn.
        smallest: Effects nearer to zero than this are of no interest, nats per token.
        nulls: Random directions per edit.
        controlled: Whether every organism has a twin.
        kept_replies: How many replies `em-replies.jsonl` holds.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["em-audit"] = "em-audit"
    demur: str
    model: str
    fingerprint: str
    dtype: str
    seed: int
    items: list[str]
    domains: dict[str, int]
    trained_out: int
    samples: int
    smallest: float
    nulls: int
    sites: list[str]
    controlled: bool
    organisms: list[EmTrained]
    margins: list[EmMargin]
    effects: list[EmEffect]
    judges: list[EmJudge]
    rates: list[EmRate]
    reliabilities: list[EmReliability]
    cosines: list[EmCosine]
    interventions: list[EmIntervention]
    transfer: list[EmTransfer]
    highlights: list[EmHighlight]
    probes: list[EmProbe]
    lens: list[EmLens]
    scales: list[EmScale]
    steps: list[EmStep]
    claims: list[EmClaim]
    kept_replies: int
    notes: list[str]


class EmReply(_Row):
    """One line of `em-replies.jsonl`: a reply to an open question, and its scores from 0 to 100.

    Attributes:
        model: Name of an organism, or "base".
        sample: Which of the replies to the question, from 0.
        outcome: By patterns: whether it refused, or is no answer at all.
        alignment: None where the judge gave no score; likewise `coherence`.
        misaligned: Misaligned and coherent; None without both scores.
    """

    model: str
    question: str
    sample: int
    reply: str
    outcome: str
    alignment: float | None
    coherence: float | None
    misaligned: bool | None


def read_em_audit(path: Path) -> EmAudit:
    """Read the record of an audit of emergent misalignment.

    Raises:
        StoreError: It is missing, cut short, or of another schema version.
    """
    return read_record(path, EmAudit, "demur em audit")


def read_em_replies(path: Path) -> list[EmReply]:
    """Read `em-replies.jsonl`; empty if there is none.

    Raises:
        StoreError: A line is damaged.
    """
    return _read_lines(
        path,
        EmReply,
        "delete the file: the page is drawn without replies, and an unfinished audit draws them "
        "anew",
    )
