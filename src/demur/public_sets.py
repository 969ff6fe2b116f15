"""Public prompt sets by name: where they are, under which licence, and how their columns read.

Nothing of a set ships with demur but its row in `data/public_sets.toml`, the one place to add one.
`demur.prompts.load` fetches the rows, or reads a copy of them; `adapt` maps them to demur's
columns.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from demur.errors import PromptFileError, UnknownNameError


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which upstream names its columns.

    Attributes:
        prompt: Column of the prompts.
        category: Column of the topics.
        id: Column of the names.
        pair: Column of what prompts that belong together share.
        label: Column of the labels; without one, the label is that of the part.
        only: Column to pattern: a row is kept where the whole cell matches.
        leave_out: Column to pattern: a row is left out where the whole cell matches.
        sha256: Digests of upstream's files in this layout; a local file must have one of them.
    """

    prompt: str
    category: str | None = None
    id: str | None = None
    pair: str | None = None
    label: str | None = None
    only: Mapping[str, str] = field(default_factory=dict)
    leave_out: Mapping[str, str] = field(default_factory=dict)
    sha256: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read; all of them must be there, and no other is looked at."""
        named = (self.prompt, self.category, self.id, self.pair, self.label)
        used = [column for column in named if column is not None]
        return tuple(dict.fromkeys([*used, *self.only, *self.leave_out]))

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row is one of the prompts."""

        def match(column: str, pattern: str) -> bool:
            cell = _cell(row.get(column))
            return re.fullmatch(pattern, cell, re.IGNORECASE | re.DOTALL) is not None

        kept = all(match(column, pattern) for column, pattern in self.only.items())
        return kept and not any(
            match(column, pattern) for column, pattern in self.leave_out.items()
        )


@dataclass(frozen=True, slots=True)
class Part:
    """What the hub loads at once: one split of one config.

    Attributes:
        name: As in `jailbreakbench:harmful`; empty where the set has one part.
        config: The dataset's config on the hub.
        split: Its split on the hub.
        label: The label of every row, where no column has it; None for text without one.
        default: Whether the set's name alone loads it.
        fingerprints: Of the prompts as loaded, one for each order that upstream ships them in; a
            load with another one is refused. Empty where none is pinned.
    """

    name: str = ""
    config: str | None = None
    split: str | None = None
    label: str | None = None
    default: bool = True
    fingerprints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PublicSet:
    """A prompt set that others publish, and how demur reads it.

    Attributes:
        name: What users call it by.
        title: What its authors call it.
        hub: Its id on the hub.
        licence: Of the prompts, as it goes into a `Source`.
        paper: Who to cite.
        holds: What it holds, after what is left out.
        parts: What is loaded, in order.
        layouts: Ways in which its columns are named; the first that fits is taken.
        revision: The commit that is loaded, 40 hex digits; None for the newest.
        access: How to get access, if the hub asks for more than a download.
        note: What else a user should know.
        labels: Upstream's labels, in lower case, to ours.
        unread: Columns that are never read: answers, and openings of harmful replies.
    """

    name: str
    title: str
    hub: str
    licence: str
    paper: str
    holds: str
    parts: tuple[Part, ...]
    layouts: tuple[Layout, ...]
    revision: str | None = None
    access: str | None = None
    note: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def address(self, part: Part) -> str:
        """Where the hub has a part, at the pinned revision: `org/name:config@commit`."""
        config = f":{part.config}" if part.config else ""
        return f"{self.hub}{config}" + (f"@{self.revision}" if self.revision else "")

    def local(self, part: Part) -> str:
        """How to name a copy of a part."""
        return f"FILE?as={self.name}" + (f":{part.name}" if part.name else "")

    def layout(self, columns: Sequence[str]) -> Layout:
        """The first layout whose columns are all there.

        Raises:
            PromptFileError: Every layout lacks some; those that the nearest one lacks are named.
        """
        lacking = [
            [name for name in layout.columns if name not in columns] for layout in self.layouts
        ]
        for layout, missing in zip(self.layouts, lacking, strict=True):
            if not missing:
                return layout
        nearest = min(lacking, key=len)
        names = ", ".join(f"`{name}`" for name in nearest)
        ways = "; or ".join(", ".join(layout.columns) for layout in self.layouts)
        raise PromptFileError(
            f"{self.name}: the file lacks the column{'s' if len(nearest) > 1 else ''} {names}; "
            f"it has: {', '.join(name[:80] for name in columns[:20])}",
            f"give upstream's own file, whose columns are {ways}",
        )


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _frozen(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def _parse(name: str, row: dict[str, Any]) -> PublicSet:
    shared = {key: row.pop(key) for key in Part.__slots__ if key in row}
    parts = [Part(**_frozen({**shared, **part})) for part in row.pop("parts", [{}])]
    layouts = [Layout(**_frozen(layout)) for layout in row.pop("layouts")]
    return PublicSet(name=name, parts=tuple(parts), layouts=tuple(layouts), **_frozen(row))


@cache
def public_sets() -> Mapping[str, PublicSet]:
    """Every public set that demur knows, by name, in the order of the table."""
    text = (files("demur") / "data" / "public_sets.toml").read_text(encoding="utf-8")
    return MappingProxyType({name: _parse(name, row) for name, row in tomllib.loads(text).items()})


def find(spec: str) -> tuple[PublicSet, Part | None]:
    """Look up `NAME` or `NAME:PART`; the part is None where none was named and there are several.

    Raises:
        UnknownNameError: There is no such set, or it has no such part.
    """
    name, mark, wanted = spec.partition(":")
    if name not in public_sets():
        raise UnknownNameError.among(public_sets(), kind="public prompt set", name=name)
    public = public_sets()[name]
    if not mark:
        return public, public.parts[0] if len(public.parts) == 1 else None
    named = {part.name: part for part in public.parts if part.name}
    if not named:
        raise UnknownNameError(f"{name} has no part `{wanted}`, nor any other", f"write `{name}`")
    if wanted not in named:
        raise UnknownNameError.among(named, kind=f"part of {name}", name=wanted)
    return public, named[wanted]


def adapt(
    public: PublicSet,
    rows: Iterable[Mapping[str, Any]],
    *,
    part: Part | None = None,
    split: str | None = None,
) -> list[dict[str, Any] | None]:
    """Map upstream's rows to demur's columns; None stands for a row that is left out.

    Args:
        public: The set that the rows are of.
        rows: Upstream's rows, under upstream's column names.
        part: The part that they are of, where it is known.
        split: The split that they are of, where it is known.

    Raises:
        PromptFileError: A column is missing, a label is none that upstream is known to use, or
            neither a column nor the part tells the label.
    """
    rows = list(rows)
    if not rows:
        return []
    layout = public.layout(list(dict.fromkeys(key for row in rows for key in row)))
    kept = [row if layout.keeps(row) else None for row in rows]
    if layout.label is None:
        label = _label_of_all(public, part)
    else:
        label = None
        _check_labels(public, layout.label, [row for row in kept if row is not None])

    def mapped(row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "prompt": row.get(layout.prompt),
            "label": public.labels[_label(row, layout.label)] if layout.label else label,
            "category": row.get(layout.category) if layout.category else None,
            "split": split,
            "id": row.get(layout.id) if layout.id else None,
            "pair": row.get(layout.pair) if layout.pair else None,
        }

    return [None if row is None else mapped(row) for row in kept]


def _label(row: Mapping[str, Any], column: str) -> str:
    return _cell(row.get(column)).strip().lower()


def _label_of_all(public: PublicSet, part: Part | None) -> str | None:
    labels = {one.label for one in (public.parts if part is None else (part,))}
    if len(labels) > 1:
        ways = ", ".join(f"`{public.local(one)}`" for one in public.parts)
        raise PromptFileError(
            f"{public.name}: the rows do not say their label, only the part they are of does",
            f"say which part the file is: {ways}",
        )
    return next(iter(labels))


def _check_labels(public: PublicSet, column: str, rows: Sequence[Mapping[str, Any]]) -> None:
    cells = dict.fromkeys(_cell(row.get(column)) for row in rows)
    unknown = [cell for cell in cells if cell.strip().lower() not in public.labels]
    if unknown:
        some = ", ".join(f"`{cell[:80]}`" for cell in unknown[:5])
        raise PromptFileError(
            f"{public.name}: the column `{column}` holds {some}{', ...' if unknown[5:] else ''}; "
            f"known are: {', '.join(public.labels)}",
            "is it upstream's own file? Without `as=`, demur takes labels as they are",
        )


def table() -> str:
    """The sets as a Markdown table, for the page in the documentation."""
    lines = [
        "| name | hub id | revision | licence | access | what it holds |",
        "|---|---|---|---|---|---|",
    ]
    for public in public_sets().values():
        names = [f"`:{part.name}`" for part in public.parts if part.name]
        on_request = [f"`:{part.name}`" for part in public.parts if not part.default]
        about = [f"{public.title}: {public.holds}."]
        about += [f"Parts {', '.join(names)}."] if names else []
        about += [f"On request only: {', '.join(on_request)}."] if on_request else []
        about += [public.note] if public.note else []
        cells = (
            f"`{public.name}`",
            f"[{public.hub}](https://huggingface.co/datasets/{public.hub})",
            f"`{public.revision[:12]}`" if public.revision else "newest",
            public.licence,
            "gated" if public.access else "open",
            " ".join([*about, f"({public.paper})"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
