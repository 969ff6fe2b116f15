"""The causal test of a direction: three legs, nulls, doses and costs, on prompts kept for it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from demur.activations import PointMoments
from demur.directions import Direction
from demur.edits import as_delta, edited, why_not_exact
from demur.errors import DemurError, TooFewPromptsError
from demur.estimators import DifferenceOfMeans, Estimator, WhitenedDifference
from demur.evals.judges import Exchange, Judge, Outcome, verdicts_of
from demur.evals.rates import refusals, verdict_change, verdict_share
from demur.interventions import (
    Ablate,
    Add,
    Holder,
    Intervention,
    ObliqueErase,
    ProjectToMean,
    applied,
)
from demur.models import Model, TokenBatch
from demur.progress import Progress
from demur.results import Dose, EditCost, Leg, NullBand, Reply, WeightEdit
from demur.selection import Passes, RefusalTokens, batched_logits, kl_divergence, refusal_logodds
from demur.stats import (
    Estimate,
    holm,
    mean,
    null_p,
    paired_change,
    proportion,
    wilcoxon_p,
)

NullFamily = Literal["isotropic", "covariance-matched", "shuffled-labels"]
EDIT_KINDS = 6  # How many kinds of edits are priced, at most.
NULL_FAMILIES: tuple[NullFamily, ...] = ("isotropic", "covariance-matched", "shuffled-labels")


@dataclass(frozen=True, slots=True)
class Arm:
    """One intervention on one class of prompts, with what the causal claim predicts.

    Attributes:
        name: As it reads in a table.
        act: The intervention.
        on: Which prompts.
        expects: What refusal should do.
        family: The direction itself, or a kind of random direction.
        edit: "ablate", "add" or "subtract".
    """

    name: str
    act: Intervention
    on: Literal["harmful", "harmless"]
    expects: Literal["falls", "rises", "neither"]
    family: Literal["direction", "isotropic", "covariance-matched", "shuffled-labels", "other"]
    edit: str


def null_directions(
    direction: Direction,
    *,
    harmful: Float[Tensor, "n d_model"],
    harmless: Float[Tensor, "m d_model"],
    each: int,
    seed: int,
    estimator: Estimator | None = None,
) -> dict[NullFamily, list[Direction]]:
    """Random directions of the same norm, at the same site and position.

    Isotropic ones are uniform on the sphere: they leave a model nearly alone, since its
    activations hardly vary along them. Covariance-matched ones are drawn with the covariance
    within the classes, so they cost as much KL as a real direction does. Shuffled labels give
    what the estimator finds where there is nothing to find: both new classes hold the same share
    of harmful prompts. (A free shuffle does not, and what is left of the true difference, brought
    to full length, is the true direction: on the planted model of the tests, cosine 0.9998.)

    Args:
        direction: The direction under test.
        harmful: The activations that it was fitted on.
        harmless: Likewise.
        each: How many of each kind.
        seed: Draws them.
        estimator: What is run on shuffled labels; None is the difference of means.
    """
    estimator = estimator or DifferenceOfMeans()
    rng = torch.Generator().manual_seed(seed)
    pos, neg = harmful.double(), harmless.double()
    centred = torch.cat([pos - pos.mean(0), neg - neg.mean(0)])
    total = len(pos) + len(neg)

    def at_norm(vector: Tensor, name: str) -> Direction:
        scaled = vector / vector.norm() * direction.norm
        return Direction.from_vector(
            scaled, site=direction.site, position=direction.position, recipe=name
        )

    out: dict[NullFamily, list[Direction]] = {family: [] for family in NULL_FAMILIES}
    for _ in range(each):
        ball = torch.randn(centred.shape[1], generator=rng, dtype=torch.float64)
        out["isotropic"].append(at_norm(ball, "isotropic"))
        weights = torch.randn(total, generator=rng, dtype=torch.float64)
        out["covariance-matched"].append(at_norm(weights @ centred, "covariance-matched"))
        halves = [side[torch.randperm(len(side), generator=rng)] for side in (pos, neg)]
        first = torch.cat([side[: len(side) // 2] for side in halves])
        second = torch.cat([side[len(side) // 2 : 2 * (len(side) // 2)] for side in halves])
        out["shuffled-labels"].append(at_norm(estimator(first, second), "shuffled labels"))
    return out


class Bench:
    """One model, the report prompts of both classes and its unedited behaviour on them.

    Attributes:
        model: The model that runs.
        tokens: First tokens of refusals.
        prompts: Prompts by class.
        plain: Unedited next-token logits by class.
    """

    def __init__(
        self,
        model: Model,
        *,
        harmful: Sequence[str],
        harmless: Sequence[str],
        tokens: RefusalTokens,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.tokens = model, tokens
        self.prompts = {"harmful": list(harmful), "harmless": list(harmless)}
        self.rows = {
            on: Passes(model, model.encode(prompts), batch_size, remember=True)
            for on, prompts in self.prompts.items()
        }
        self.plain = {on: rows.logits() for on, rows in self.rows.items()}

    def scores(self, on: str, *acts: Intervention) -> Float[Tensor, " prompt"]:
        """Refusal log-odds under interventions; without any, those of the unedited model."""
        logits = self.edited(on, *acts) if acts else self.plain[on]
        return refusal_logodds(logits, self.tokens.ids)

    def edited(self, on: str, *acts: Intervention) -> Float[Tensor, "prompt vocab"]:
        """Logits under interventions."""
        with applied(self.model, *acts):
            return self.rows[on].logits()

    def shift(self, on: str, *acts: Intervention) -> tuple[Tensor, Tensor]:
        """Refusal log-odds under interventions, and KL from the unedited model, per prompt."""
        logits = self.edited(on, *acts)
        return refusal_logodds(logits, self.tokens.ids), kl_divergence(self.plain[on], logits)


def null_bands(
    bench: Bench,
    direction: Direction,
    nulls: dict[NullFamily, list[Direction]],
    *,
    progress: Progress | None = None,
) -> list[NullBand]:
    """What random directions of the same norm do, beside what the direction does.

    `progress` is called once per random direction.
    """
    before = {on: bench.scores(on) for on in ("harmful", "harmless")}

    def effects(one: Direction) -> tuple[float, float, float]:
        bypass = bench.scores("harmful", Ablate(one))
        _, kl = bench.shift("harmless", Ablate(one))
        induce = bench.scores("harmless", Add(one))
        return (
            float((bypass - before["harmful"]).mean()),
            float((induce - before["harmless"]).mean()),
            float(kl.mean()),
        )

    own_bypass, own_induce, _ = effects(direction)
    bands = []
    for family, members in nulls.items():
        rows = []
        for one in members:
            rows.append(effects(one))
            if progress is not None:
                progress(1)
        bypass, induce, kls = (list(column) for column in zip(*rows, strict=True))
        bands.append(
            NullBand(
                family=family,
                n=len(members),
                bypass_changes=bypass,
                induce_changes=induce,
                kls=kls,
                cosines=[one.cosine(direction) for one in members],
                bypass_p=null_p(own_bypass, bypass, side="low"),
                induce_p=null_p(own_induce, induce, side="high"),
            )
        )
    return bands


def arms_of(
    direction: Direction, nulls: dict[NullFamily, list[Direction]], *, each: int
) -> list[Arm]:
    """The arms of the causal test: the direction's four, and two for each random direction."""
    arms = [
        Arm("ablate the direction", Ablate(direction), "harmful", "falls", "direction", "ablate"),
        Arm("add the direction", Add(direction), "harmless", "rises", "direction", "add"),
        Arm(
            "subtract the direction",
            Add(direction, -1.0),
            "harmful",
            "falls",
            "direction",
            "subtract",
        ),
        Arm(
            "ablate the direction",
            Ablate(direction),
            "harmless",
            "falls",
            "direction",
            "ablate",
        ),
    ]
    for family, members in nulls.items():
        for i, one in enumerate(members[:each], start=1):
            name = f"{family} #{i}"
            arms.append(Arm(f"ablate {name}", Ablate(one), "harmful", "neither", family, "ablate"))
            arms.append(Arm(f"add {name}", Add(one), "harmless", "neither", family, "add"))
    return arms


@dataclass(frozen=True, slots=True)
class Replies:
    """Replies of one arm with their verdicts; `before` is the arm of the unedited model."""

    name: str
    on: str
    texts: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    reasons: tuple[str, ...]

    @property
    def refused(self) -> list[bool]:
        """Per prompt, whether the verdict is a refusal; see `demur.evals.rates` for shares."""
        return [outcome is Outcome.REFUSED for outcome in self.outcomes]

    def count(self, outcome: Outcome) -> int:
        """How many replies have this outcome."""
        return sum(own is outcome for own in self.outcomes)

    def rows(self, prompts: Sequence[str]) -> list[Reply]:
        """As lines of `replies.jsonl`."""
        on: Literal["harmful", "harmless"] = "harmful" if self.on == "harmful" else "harmless"
        return [
            Reply(arm=self.name, on=on, prompt=p, response=t, outcome=str(o), reason=r)
            for p, t, o, r in zip(prompts, self.texts, self.outcomes, self.reasons, strict=True)
        ]


_AGREEING = 3  # Equal verdicts in a row that end a reply, where asked for.


def _agreed(prompts: Sequence[str], judge: Judge) -> Callable[[list[int], list[str]], list[bool]]:
    said: dict[int, list[Outcome]] = {}

    def until(numbers: list[int], texts: list[str]) -> list[bool]:
        exchanges = [Exchange(prompts[n], text) for n, text in zip(numbers, texts, strict=True)]
        for number, verdict in zip(numbers, verdicts_of(judge, exchanges), strict=True):
            said.setdefault(number, []).append(verdict.outcome)
        last = [said[number][-_AGREEING:] for number in numbers]
        return [len(one) == _AGREEING and len(set(one)) == 1 for one in last]

    return until


def reply_to(
    model: Model,
    prompts: Sequence[str],
    *,
    name: str,
    on: str,
    judge: Judge,
    acts: Sequence[Intervention] = (),
    max_new_tokens: int,
    batch_size: int,
    asked: Sequence[str] | TokenBatch | None = None,
    stop_early: bool = False,
    temperature: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Replies:
    """Generate under interventions and have the judge decide.

    Args:
        model: Replies.
        prompts: What is asked for, as the judge reads it.
        name: Of the arm.
        on: Class of the prompts.
        judge: Decides.
        acts: Interventions.
        max_new_tokens: Replies are cut there.
        batch_size: Most prompts that are decoded together.
        asked: What the model is given in their place, such as the same prompts in a wrapper.
        stop_early: A reply ends once the judge has said the same of it three times, eight tokens
            apart.
        temperature: None replies greedily; else see `Model.generate`, `seed` too.
        seed: Of the draws.
        progress: Called with the number of prompts done since the last call.
    """
    with applied(model, *acts):
        replies = model.generate(
            prompts if asked is None else asked,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            until=_agreed(prompts, judge) if stop_early else None,
            temperature=temperature,
            seed=seed,
            progress=progress,
        )
    exchanges = [Exchange(p, r.text) for p, r in zip(prompts, replies, strict=True)]
    verdicts = verdicts_of(judge, exchanges)
    return Replies(
        name,
        on,
        tuple(r.text for r in replies),
        tuple(v.outcome for v in verdicts),
        tuple(v.reason for v in verdicts),
    )


def legs(
    bench: Bench, arms: Sequence[Arm], before: dict[str, Replies], after: Sequence[Replies]
) -> list[Leg]:
    """The table of the causal test: each arm by generated refusals and by refusal log-odds.

    Both measures are paired on prompts; p-values are corrected over all arms of a measure. Replies
    without a verdict are counted either way, see `demur.evals.rates`.
    """
    rows: list[dict[str, Any]] = []
    for arm, replies in zip(arms, after, strict=True):
        n = len(replies.texts)
        first, then = refusals(before[arm.on].outcomes), refusals(replies.outcomes)
        changed, p = verdict_change(first, then)
        rows.append(
            {
                "measure": "refused",
                "before": verdict_share(first),
                "after": verdict_share(then),
                "change": changed,
                "p": p,
                "degenerate": proportion(replies.count(Outcome.DEGENERATE), n),
                "unparsed": replies.count(Outcome.UNPARSED),
            }
        )
    for arm in arms:
        plain = bench.scores(arm.on).numpy()
        moved = bench.scores(arm.on, arm.act).numpy()
        rows.append(
            {
                "measure": "log-odds",
                "before": mean(plain),
                "after": mean(moved),
                "change": paired_change(plain, moved),
                "p": wilcoxon_p(plain, moved),
            }
        )
    half = len(arms)
    corrected = [*holm([row["p"] for row in rows[:half]]), *holm([row["p"] for row in rows[half:]])]
    return [
        Leg(
            arm=arm.name,
            family=arm.family,
            edit=arm.edit,
            expects=arm.expects,
            on=arm.on,
            p_holm=p,
            **row,
        )
        for arm, row, p in zip([*arms, *arms], rows, corrected, strict=True)
    ]


def dose_curve(
    bench: Bench,
    direction: Direction,
    strengths: Sequence[float],
    *,
    progress: Progress | None = None,
) -> list[Dose]:
    """Refusal log-odds and KL as the direction is added at each strength."""
    out = []
    for strength in strengths:
        act = Add(direction, strength)
        harmless, kl = bench.shift("harmless", act)
        harmful = bench.scores("harmful", act)
        out.append(
            Dose(
                strength=strength,
                harmless=mean(harmless.numpy()),
                harmful=mean(harmful.numpy()),
                kl=mean(kl.numpy()),
            )
        )
        if progress is not None:
            progress(1)
    return out


class NeutralText:
    """Text whose perplexity tells what an edit costs beyond refusal.

    Attributes:
        ids: One row per paragraph, padded on the right.
        mask: True at real tokens.
    """

    def __init__(self, model: Model, paragraphs: Sequence[str], *, batch_size: int = 8) -> None:
        assert model.template is not None
        tokenizer = model.template.tokenizer
        rows = [tokenizer(text)["input_ids"] for text in paragraphs]
        short = [i for i, row in enumerate(rows, start=1) if len(row) < 2]
        if short:
            raise TooFewPromptsError(
                f"paragraph {short[0]} has fewer than two tokens, so none to be scored",
                "leave it out",
            )
        width = max(map(len, rows))
        self.ids = torch.full((len(rows), width), model.pad_id)
        self.mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            self.ids[i, : len(row)] = torch.tensor(row)
            self.mask[i, : len(row)] = True
        self.model, self.batch_size = model, batch_size
        self.plain = self._losses()

    def _losses(self) -> Float[Tensor, " paragraph"]:
        parts = []
        for start in range(0, len(self.ids), self.batch_size):
            part = slice(start, start + self.batch_size)
            losses = self.model.token_losses(self.ids[part], self.mask[part]).double()
            parts.append(losses.sum(1) / self.mask[part][:, 1:].sum(1))
        return torch.cat(parts)

    def perplexity(self) -> float:
        """Of the unedited model, mean over paragraphs of nats per token, exponentiated."""
        return float(self.plain.mean().exp())

    def ratio(self, *acts: Intervention | Holder) -> Estimate:
        """Perplexity under interventions over that of the unedited model, paired by paragraph."""
        with applied(self.model, *acts):
            moved = self._losses()
        change = paired_change(self.plain.numpy(), moved.numpy())
        value, low, high = (
            float(torch.tensor(x, dtype=torch.float64).exp())
            for x in (change.value, change.low, change.high)
        )
        return Estimate(value, low, high, change.n, f"exp of {change.method}")


def edit_costs(
    bench: Bench,
    neutral: NeutralText,
    direction: Direction,
    *,
    harmful: PointMoments,
    harmless: PointMoments,
    progress: Progress | None = None,
) -> list[EditCost]:
    """What each kind of edit buys in refusal and costs in KL and perplexity."""
    unit = direction.unit.double()
    level = float(harmless.mean @ unit)
    site = direction.site
    kinds: list[tuple[str, Intervention]] = [
        ("ablate at every write", Ablate(direction)),
        (f"subtract once at {site}", Add(direction, -1.0)),
        (f"project to the harmless mean at {site}", ProjectToMean(direction, level, site)),
        (f"project to the harmless mean at {site}, x2", ProjectToMean(direction, level, site, 2.0)),
    ]
    reader = WhitenedDifference().from_moments(harmful, harmless)
    if float(reader @ unit) > 0:
        at = float(harmless.mean @ reader)
        for strength in (1.0, 2.0):
            kinds.append(
                (
                    f"oblique erase at {site}, x{strength:g}",
                    ObliqueErase(direction, reader, at, site, strength),
                )
            )
    before = bench.scores("harmful").numpy()
    out = []
    for name, act in kinds:
        bypass = bench.scores("harmful", act)
        _, kl = bench.shift("harmless", act)
        out.append(
            EditCost(
                edit=name,
                bypass_change=paired_change(before, bypass.numpy()),
                kl=mean(kl.numpy()),
                perplexity_ratio=neutral.ratio(act),
            )
        )
        if progress is not None:
            progress(1)
    return out


def weight_edit(model: Model, direction: Direction, prompts: Sequence[str]) -> WeightEdit:
    """Compare ablation by hooks with the same edit in a copy's weights, where that is exact."""
    if reason := why_not_exact(model):
        return WeightEdit(exact=False, reason=reason, max_logit_difference=None, effect=None)
    rows = model.encode(prompts)
    act = Ablate(direction)
    plain = batched_logits(model, rows)
    with applied(model, act):
        hooked = batched_logits(model, rows)
    try:
        folded = batched_logits(edited(model, as_delta(model, act)), rows)
    except DemurError as error:
        return WeightEdit(exact=False, reason=error.fact, max_logit_difference=None, effect=None)
    return WeightEdit(
        exact=True,
        reason="every write is linear in a weight"
        + ("; the tied embedding was untied first" if model.tied else ""),
        max_logit_difference=float((hooked - folded).abs().max()),
        effect=float((hooked - plain).abs().max()),
    )


def stable_seed(seed: int, name: str) -> int:
    """A seed for one stage, so that adding a stage does not move the others' draws."""
    return (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**31
