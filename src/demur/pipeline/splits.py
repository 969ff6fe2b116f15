"""Both classes of prompts in four splits that share nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from demur.config import RunConfig
from demur.errors import TooFewPromptsError
from demur.prompts import PromptSet, check_distinct, deduplicate, drop_overlaps, presplit, split
from demur.prompts import load as load_prompts
from demur.results import PromptsInfo, SplitInfo

SPLITS = ("fit", "select", "calibrate", "report")
ValidationPrompts = list[dict[str, PromptSet]]


@dataclass(frozen=True, slots=True)
class Splits:
    """Both classes in four splits that share no prompt, nor nearly one."""

    harmful: dict[str, PromptSet]
    harmless: dict[str, PromptSet]
    duplicates_removed: int
    overlaps_removed: int


def make_splits(config: RunConfig) -> Splits:
    """Load both classes, clean them and split them.

    Raises:
        PromptFileError: A file has lines that cannot be read.
        OverlapError: The two classes hold the same prompts.
        TooFewPromptsError: A class is too small for four splits.
    """
    sizes = {name: getattr(config.data, name) for name in SPLITS}
    sets = {on: load_prompts(getattr(config.data, on)) for on in ("harmful", "harmless")}
    duplicates = 0
    for on, prompts in sets.items():
        sets[on], removed = deduplicate(prompts)
        duplicates += len(removed)
    # Exact copies across the classes are a mistake; near copies are what matched pairs are.
    check_distinct(sets["harmful"], sets["harmless"])
    parts: dict[str, dict[str, PromptSet]] = {}
    overlaps = 0
    for on, prompts in sets.items():
        if all(prompt.split in SPLITS for prompt in prompts):
            given = presplit(prompts)
            kept: dict[str, PromptSet] = {}
            # What is reported outranks what is fitted: a near copy leaves the earlier split.
            for name in reversed(SPLITS):
                part = given.get(name)
                if part is None:
                    raise TooFewPromptsError(
                        f"{prompts.name} has no split `{name}`",
                        f"give each prompt a split of {', '.join(SPLITS)}, or none of them",
                    )
                for later in kept.values():
                    part, removed = drop_overlaps(later, part)
                    overlaps += len(removed)
                size = sizes[name]
                kept[name] = part.take(size, config.seed) if len(part) > size else part
            parts[on] = {name: kept[name] for name in SPLITS}
        else:
            parts[on] = split(prompts, _scaled(sizes, len(prompts)), seed=config.seed)
    return Splits(parts["harmful"], parts["harmless"], duplicates, overlaps)


def licences_of(sets: Iterable[PromptSet]) -> tuple[str, ...]:
    """A line for each set that did not come with demur and whose licence is known."""
    return tuple(
        dict.fromkeys(
            f"prompts of {source_name(one.name)}: licence {one.source.licence}"
            for one in sets
            if one.source.kind != "packaged" and one.source.licence
        )
    )


def validation_prompts(config: RunConfig) -> ValidationPrompts:
    """Load the validation sets, each as harmful and harmless prompts.

    Raises:
        PromptFileError: A file has lines that cannot be read.
        OverlapError: The two classes of a set hold the same prompts.
    """
    loaded = []
    for asked in config.data.validation:
        sides = {on: load_prompts(getattr(asked, on)) for on in ("harmful", "harmless")}
        check_distinct(sides["harmful"], sides["harmless"])
        loaded.append(sides)
    return loaded


def _scaled(sizes: dict[str, int], n: int) -> dict[str, int]:
    """The sizes asked for, shrunk in proportion where there are fewer prompts."""
    total = sum(sizes.values())
    if n >= total:
        return sizes
    least = {"fit": 8, "select": 4, "calibrate": 4, "report": 8}
    scaled = {name: size * n // total for name, size in sizes.items()}
    short = [name for name in SPLITS if scaled[name] < least[name]]
    if short:
        raise TooFewPromptsError(
            f"{n} prompts make too small a split for {', '.join(short)}: "
            + ", ".join(f"{name} {scaled[name]}" for name in SPLITS),
            f"give at least {sum(least.values()) * 3} prompts a class",
        )
    return scaled


def prompts_info(config: RunConfig, splits: Splits, kept: dict[str, int] | None) -> PromptsInfo:
    """What `results.json` says of the prompts; `kept` is what the behaviour filter left."""
    rows = []
    for name in SPLITS:
        a, b = splits.harmful[name], splits.harmless[name]
        rows.append(
            SplitInfo.model_validate(
                {
                    "name": name,
                    "harmful": len(a),
                    "harmless": len(b),
                    "harmful_fingerprint": a.fingerprint,
                    "harmless_fingerprint": b.fingerprint,
                }
            )
        )
    return PromptsInfo(
        harmful_source=source_name(config.data.harmful),
        harmless_source=source_name(config.data.harmless),
        splits=rows,
        duplicates_removed=splits.duplicates_removed,
        overlaps_removed=splits.overlaps_removed,
        kept_by_filter=kept,
    )


def source_name(spec: str) -> str:
    """What a reader is told of a spec: no folders of somebody's machine."""
    # The fingerprints identify the prompts.
    parts = []
    for one in spec.split(" + "):
        path, mark, rest = one.partition("?")
        parts.append((Path(path).name if "/" in path and Path(path).suffix else path) + mark + rest)
    return " + ".join(parts)


def neutral_paragraphs(n: int = 24) -> list[str]:
    """The packaged neutral text; half of it, which tells a ratio to 1 % within a minute."""
    text = resources.files("demur").joinpath("data/neutral_text.jsonl").read_text("utf-8")
    return [json.loads(line)["text"] for line in text.splitlines() if line.strip()][:n]
