"""How the report writes numbers and foreign text: once, for prose, tables and charts alike."""

import math
from typing import Literal

from markupsafe import Markup, escape

from demur.notebook import digits, number, readable
from demur.stats import Estimate

Kind = Literal["number", "share", "points", "signed", "ratio"]

NOT_MEASURED = Markup('<span class="missing">not measured</span>')


def token(text: str) -> str:
    """A token as one visible word: line ends, tabs and outer spaces become signs."""
    inner = text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    body = inner.strip(" ")
    left = len(inner) - len(inner.lstrip(" "))
    if not body:
        return "␣" * left or "(empty)"
    right = len(inner) - len(inner.rstrip(" "))
    return readable("␣" * left + body + "␣" * right)


def estimate(value: Estimate | None, kind: Kind = "number", *, n: bool = True) -> Markup:
    """`0.31 [0.24, 0.39], n=128`, with the method on hover; digits follow the interval's width.

    Args:
        value: What was measured, None if it was not.
        kind: "share" for percent, "points" for changes of a share, "signed" for other changes,
            "ratio" for factors.
        n: Whether the sample size is written out.
    """
    if value is None or not all(map(math.isfinite, (value.value, value.low, value.high))):
        return NOT_MEASURED
    scale = 100.0 if kind in {"share", "points"} else 1.0
    signed = kind in {"points", "signed"}
    spec = digits(scale * value.low, scale * value.high)
    point, low, high = (
        number(scale * part, spec, signed=signed) for part in (value.value, value.low, value.high)
    )
    unit = {"share": "%", "ratio": "\N{MULTIPLICATION SIGN}"}.get(kind, "")
    size = Markup(', <span class="n">n={}</span>').format(value.n) if n else ""
    return Markup(
        '<span class="estimate" title="{method}"><b>{point}{unit}</b> '
        '<span class="interval">[{low}, {high}]</span>{size}</span>'
    ).format(method=value.method, point=point, unit=unit, low=low, high=high, size=size)


def p_value(value: float | None) -> Markup:
    """A p value to two digits, and no more zeros than anyone reads."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return escape("< 0.001" if value < 0.001 else format(value, ".2g"))


def percent(value: float | None) -> Markup:
    """A bare share as percent."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return escape(number(100 * value, ".0f" if abs(value) >= 0.1 or value == 0 else ".1f") + "%")


def said(value: Estimate, kind: Kind = "number") -> str:
    """An estimate as bare text, for tooltips and labels."""
    return estimate(value, kind).striptags()
