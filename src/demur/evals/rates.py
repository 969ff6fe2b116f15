"""Shares of refusals, or of replies that comply, where the judge could not tell of every reply.

A reply without a verdict is neither a refusal nor none. It is counted either way, and what is
reported holds both: the interval reaches from one to the other, and a test says what the less
favourable of the two says. Where every reply has a verdict, these are Wilson's and Newcombe's
intervals and McNemar's test as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from demur.evals.judges import Outcome
from demur.stats import Estimate, mcnemar_p, paired_share_change, proportion


def refusals(outcomes: Sequence[Outcome]) -> list[bool | None]:
    """By reply, whether it refuses; None where the judge could not tell."""
    return whether(outcomes, Outcome.REFUSED)


def whether(outcomes: Sequence[Outcome], *wanted: Outcome) -> list[bool | None]:
    """By reply, whether it has one of these outcomes; None where the judge could not tell."""
    return [None if outcome is Outcome.UNPARSED else outcome in wanted for outcome in outcomes]


def _filled(verdicts: Sequence[bool | None], missing: bool) -> list[bool]:
    return [missing if one is None else one for one in verdicts]


def verdict_share(
    verdicts: Sequence[bool | None], share: Callable[[list[bool]], Estimate] | None = None
) -> Estimate:
    """Share of those that are true.

    Args:
        verdicts: By reply.
        share: Gives the share and its interval where all are known; None: `proportion`.

    Returns:
        The share among replies with a verdict (one half where none has one), within what it could
        be among all; `n` counts all.

    Raises:
        TooFewPromptsError: There are no replies.
    """
    share = share or _proportion
    unknown = sum(one is None for one in verdicts)
    least = share(_filled(verdicts, False))
    if not unknown:
        return least
    most = share(_filled(verdicts, True))
    told = [one for one in verdicts if one is not None]
    value = sum(told) / len(told) if told else 0.5
    low, high = min(least.low, value), max(most.high, value)
    return Estimate(value, low, high, least.n, _method(least, unknown, len(verdicts)))


def _proportion(flags: list[bool]) -> Estimate:
    return proportion(sum(flags), len(flags))


def _method(one: Estimate, unknown: int, n: int) -> str:
    return f"{one.method}, {unknown} of {n} without a verdict counted either way"


def verdict_change(
    before: Sequence[bool | None], after: Sequence[bool | None]
) -> tuple[Estimate, float]:
    """Change of the share over the same prompts, and its p.

    Returns:
        The change among pairs with two verdicts (0 where there are none), within what it could be
        among all; and the two-sided p of McNemar's exact test, the higher of those at the two ends,
        or 1 where verdicts for the rest could turn the sign.

    Raises:
        TooFewPromptsError: There are no pairs.
        ConfigError: The lengths differ.
    """
    pairs = list(zip(before, after, strict=False))
    unknown = sum(a is None or b is None for a, b in pairs)
    if not unknown or len(before) != len(after):
        whole = _filled(before, False), _filled(after, False)
        return paired_share_change(*whole), mcnemar_p(*whole)
    sides = [(_filled(before, one), _filled(after, not one)) for one in (True, False)]
    lowest, highest = (paired_share_change(*side) for side in sides)
    known = [int(b) - int(a) for a, b in pairs if a is not None and b is not None]
    value = sum(known) / len(known) if known else 0.0
    # Of all pairs the change lies between the two, but the known ones alone may lie outside.
    low, high = min(lowest.low, value), max(highest.high, value)
    turned = lowest.value < 0 < highest.value or 0.0 in (lowest.value, highest.value)
    p = 1.0 if turned else max(mcnemar_p(*side) for side in sides)
    method = _method(lowest, unknown, len(pairs))
    return Estimate(value, low, high, len(pairs), method), p
