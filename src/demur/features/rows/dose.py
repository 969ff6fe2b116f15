"""What clamping does and what it costs, laid out: points, comparisons, turns of conversations.

Classes of prompts are "harmful", "harmless" and "lookalikes". Refusal is in log-odds that a reply
begins with a refusal, nats; changes are (with the edit - without), paired over prompts, so that
above 0 means more refusal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from demur.stats import Estimate

Family = Literal[
    "none", "set", "matched latents", "other latents", "random direction", "dense direction",
    "prompt",
]  # fmt: skip
Aim = Literal["bypass", "induce"]


@dataclass(frozen=True, slots=True)
class Generated:
    """Replies to some prompts of one class, as a judge and a word count see them.

    Attributes:
        n: Prompts that were replied to.
        refused: Share judged refused.
        change: Of that share, against the unedited model, paired.
        p: Exact McNemar, two-sided.
        degenerate: Share judged to be no reply at all: a loop, an echo, gibberish, nothing.
        unparsed: How many the judge could not tell.
        distinct: Mean share of a reply's word pairs that are distinct, 0 to 1; None where fewer
            than two replies have three words.
        repeated: Mean share of a reply's runs of four words that it said before, 0 to 1; None where
            fewer than two replies have five words.
    """

    n: int
    refused: Estimate
    change: Estimate
    p: float
    degenerate: Estimate
    unparsed: int
    distinct: Estimate | None
    repeated: Estimate | None


@dataclass(frozen=True, slots=True)
class DosePoint:
    """One arm at one dose.

    Attributes:
        arm: Its name.
        family: "set" is what is tested; "matched latents" have the same rule and about the same
            firing, mass and decoder norm; "other latents" are those, lifted until they move tokens
            as far as the set does; a "random direction" is drawn with the covariance of the tokens
            and moves every token exactly as far; the "dense direction" is added, taken away or
            taken out as far on average.
        dose: The dose of the set that it is, or is held against, such as "clamp 2"; None for
            arms that have no dose.
        kind: "zero", "mean", "scale", "clamp", "min-clamp"; "add", "ablate"; "system", "text".
        level: For "clamp" and "min-clamp" the value over the latent's q99, for "scale" the factor,
            for "add" residual-stream units, for "ablate" the share that is taken out; of several
            sites the first. None without one.
        draw: Which of several of its kind, from 1; None where there is one.
        norm_share: By class, mean over prompts of the mean |shift| / |token| over all edited
            tokens of a prompt, added up over sites; empty for prompts, which move no token.
        moved: By class, share of tokens that are moved at all.
        target: The norm share that it was brought to, None where none was wanted.
        matched_on: The class of prompts whose norm share was matched.
        reached: Whether it was reached to 0.1 %; None where none was wanted.
        off_manifold: Whether latents take negative values, which no input gives them: that is
            steering against them, not switching off.
        large: Whether moved tokens move by more than 0.3 of their norm on average in some class.
        refusal: By class, change in refusal log-odds.
        p: By class, Wilcoxon's signed-rank test of it, two-sided, uncorrected.
        kl: On harmless prompts, KL(unedited || edited) of the next token, nats.
        generated: By class, where replies were generated.
        perplexity_ratio: On neutral text, edited over unedited; None where not measured.
        margin_change: Of (log-likelihood a token of the right choice - of the best wrong one),
            nats; None where not measured.
        accuracy_change: Of the share of questions whose right choice is the likeliest; None
            likewise.
        accuracy_p: Exact McNemar of it.
        notes: What a reader should know.
    """

    arm: str
    family: Family
    dose: str | None
    kind: str
    level: float | None
    draw: int | None
    norm_share: dict[str, Estimate]
    moved: dict[str, float]
    target: float | None
    matched_on: str | None
    reached: bool | None
    off_manifold: bool
    large: bool
    refusal: dict[str, Estimate]
    p: dict[str, float]
    kl: Estimate
    generated: dict[str, Generated]
    perplexity_ratio: Estimate | None
    margin_change: Estimate | None
    accuracy_change: Estimate | None
    accuracy_p: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DoseComparison:
    """The set at one dose against the arms of one family: one outcome.

    Attributes:
        dose: Of the set.
        aim: What the dose is for: to "bypass" refusal or to "induce" it.
        outcome: "refusal, harmful" and so on, "kl", "perplexity" (log of the ratio, nats a token)
            or "margin".
        main: Whether this is the outcome that the aim is about: refusal of harmful prompts for
            "bypass", of harmless ones for "induce".
        family: Which arms.
        n_arms: How many of them.
        change: Of the set, mean over prompts.
        arms_low: 2.5 % of the arms' mean changes.
        arms_high: 97.5 %.
        difference: Mean over prompts of (set's change - mean change of the arms), paired.
        p: (k + 1) / (n + 1) of arms whose mean change is at least as far in the direction of the
            aim; for costs ("kl", "perplexity", "margin") at least as costly.
        p_holm: Corrected over the doses of one outcome and family.
        beyond: Whether the set does more (or costs more) than the arms: the difference's interval
            lies beyond 0 and p is at most 0.05; None where so few arms cannot tell.
    """

    dose: str
    aim: Aim
    outcome: str
    main: bool
    family: Family
    n_arms: int
    change: Estimate
    arms_low: float
    arms_high: float
    difference: Estimate
    p: float
    p_holm: float
    beyond: bool | None


@dataclass(frozen=True, slots=True)
class DoseResponse:
    """What a set of latents does when it is clamped, beside what other edits do.

    Attributes:
        model: Name.
        latents: By site of reading, numbers of the set's latents in their bank.
        baseline: By class, refusal log-odds of the unedited model.
        baseline_accuracy: Share of questions whose right choice is the likeliest; None where not
            measured.
        points: Every arm at every dose; the first is no edit.
        comparisons: The set against the arms of each family.
        text: What it comes to, in sentences.
        not_measured: What was not asked.
        seed: Of all draws.
    """

    model: str
    latents: dict[str, tuple[int, ...]]
    baseline: dict[str, Estimate]
    baseline_accuracy: Estimate | None
    points: tuple[DosePoint, ...]
    comparisons: tuple[DoseComparison, ...]
    text: tuple[str, ...]
    not_measured: tuple[str, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class ArmReply:
    """One reply under an edit, for the file of replies.

    Attributes:
        arm: Name of the arm; "none" for the unedited model.
        dose: As in `DosePoint`.
        on: Class of the prompt, or the script's name.
        turn: Of a conversation, from 1; None of single prompts.
        prompt: What the user said last.
        reply: What the model said.
        outcome: The judge's verdict.
    """

    arm: str
    dose: str | None
    on: str
    turn: int | None
    prompt: str
    reply: str
    outcome: str


@dataclass(frozen=True, slots=True)
class TurnPoint:
    """One arm at one turn, over scripts of one label.

    Attributes:
        arm: Its name.
        label: "harmful", or "harmless" for the twins, whose refusals are over-refusals.
        turn: From 1.
        n: Scripts.
        refused: Share of replies judged refused.
        refused_change: Against the unedited model, paired by script; None for that model.
        refused_p: Exact McNemar; None likewise.
        degenerate: Share of replies that are none.
        log_odds: Refusal log-odds where the reply begins, nats.
        log_odds_change: Against the unedited model, whose conversation may by then be another one;
            None for that model.
        at_instruction: By latent ("site/number"), activation at the last token of the user's turn,
            in the bank's units, before this site's own edit.
        at_end: The same at the last token of the prompt, from which the reply is begun.
        over_reply: The same, mean over the tokens of the reply; None where replies are empty.
    """

    arm: str
    label: str
    turn: int
    n: int
    refused: Estimate
    refused_change: Estimate | None
    refused_p: float | None
    degenerate: Estimate
    log_odds: Estimate
    log_odds_change: Estimate | None
    at_instruction: dict[str, Estimate]
    at_end: dict[str, Estimate]
    over_reply: dict[str, Estimate | None]


@dataclass(frozen=True, slots=True)
class ScriptRun:
    """One script under one arm.

    Attributes:
        arm: Name of the arm.
        script: Name of the script.
        label: "harmful" or "harmless".
        outcomes: The judge's verdicts, by turn.
        log_odds: Refusal log-odds, by turn, nats.
        first_break: First turn that asks for what the script ends in, and whose reply gives it or
            a part of it; from 1. None where none does, and for harmless scripts.
    """

    arm: str
    script: str
    label: str
    outcomes: tuple[str, ...]
    log_odds: tuple[float, ...]
    first_break: int | None


@dataclass(frozen=True, slots=True)
class ArmBreaks:
    """How often an arm is broken, over harmful scripts.

    Attributes:
        arm: Its name.
        n: Harmful scripts.
        broken: Share with a first break.
        change: Against the unedited model, paired; None for that model.
        p: Exact McNemar; None likewise.
        held: Mean number of turns, of those that ask, before the first break.
        held_change: Against the unedited model, paired; None for that model.
        degenerate: Share of the turns of harmful scripts whose reply is none: what cannot speak
            does not break either. Its interval takes each turn as a prompt of its own, so it is
            too narrow.
        over_refused: Share of all turns of harmless twins that are refused; None without twins.
            Its interval takes each turn as a prompt of its own, so it is too narrow.
    """

    arm: str
    n: int
    broken: Estimate
    change: Estimate | None
    p: float | None
    held: Estimate
    held_change: Estimate | None
    degenerate: Estimate
    over_refused: Estimate | None


@dataclass(frozen=True, slots=True)
class Multiturn:
    """Scripted conversations under several arms.

    Attributes:
        model: Name.
        judge: What judged.
        turns: By arm, label and turn.
        runs: By arm and script.
        breaks: By arm.
        text: What it comes to.
        max_new_tokens: Replies were cut there.
    """

    model: str
    judge: str
    turns: tuple[TurnPoint, ...]
    runs: tuple[ScriptRun, ...]
    breaks: tuple[ArmBreaks, ...]
    text: tuple[str, ...]
    max_new_tokens: int
