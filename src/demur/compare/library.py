"""The library of unrelated contrasts: what two directions of one model share for no reason.

Isotropic random vectors are far too easy to beat: any two contrasts of one model share the few axes
along which its activations vary. The null that answers "does this direction have more to do with
that one than anything else has?" is made of contrasts that have nothing to do with either, read at
the same site and position. `read_library` reads them; the percentile of a cosine among theirs is
taken elsewhere.

The texts serve as prompts and as answers: `read_library` reads them at the end of a prompt, or as
the mean over the tokens of an answer to a neutral question, as `demur.em` reads answers.

A folder of one's own adds to it: `NAME.jsonl` with the columns `cluster`, `positive`, `negative`
and if it has them `id`; and, if wanted, `contrasts.toml` with a table `[NAME]` for each.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from demur.activations import collect
from demur.compare.contrasts import ANSWER, Contrast
from demur.em.advice import AdviceItem
from demur.em.directions import read_answers
from demur.errors import ConfigError, PromptFileError, TooFewPromptsError, UnknownNameError
from demur.models import Model
from demur.progress import Progress
from demur.sites import Site

ContrastKind = Literal["topic", "form", "meaning"]
Side = Literal["positive", "negative"]

INDEX = "contrasts.toml"
MIN_ITEMS, MIN_CLUSTERS = 8, 4
NEUTRAL_QUESTION = "Write a sentence of any kind."
_SHOWN = 20

RULES: Mapping[str, Callable[[str], str]] = {
    "upper": str.upper,
    "exclaim": lambda text: text.removesuffix(".") + "!",
}
"""What derived contrasts are made by: text of the positive side from that of the negative."""


@dataclass(frozen=True, slots=True)
class LibraryItem:
    """Two texts that differ in the one respect that the contrast is about.

    Attributes:
        id: Its name in its file.
        cluster: What is drawn together: the theme, named after the file, so that clusters of two
            contrasts are the same ones only where they are made of the same texts.
        positive: The side that the contrast points to.
        negative: The other.
    """

    id: str
    cluster: tuple[str, str]
    positive: str
    negative: str


@dataclass(frozen=True, slots=True)
class LibraryContrast:
    """A contrast that has nothing to do with harm, refusal or advice.

    Attributes:
        name: As tables call it.
        kind: "topic": what the texts are about; "form": how they are put; "meaning": what they say
            of the same thing.
        about: Both sides in words, the positive first.
        question: What the texts are read as answers to.
        items: In pairs.
    """

    name: str
    kind: ContrastKind
    about: str
    question: str
    items: tuple[LibraryItem, ...]

    @property
    def digest(self) -> str:
        """A short hash of question and texts."""
        rows = [self.question, *([one.positive, one.negative] for one in self.items)]
        return blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


# Reading files -----------------------------------------------------------------------------------


class _Derived(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    of: str
    side: Side = "negative"
    rule: str


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: ContrastKind = "form"
    about: str = ""
    question: str = NEUTRAL_QUESTION
    derived: _Derived | None = None


def contrasts() -> Mapping[str, LibraryContrast]:
    """The packaged library, by name.

    >>> from demur.compare.library import contrasts
    >>> french = contrasts()["french"]
    >>> french.items[0].positive
    'Les clés sont sur la table à côté de la porte.'
    >>> french.items[0].negative
    'The keys are on the table next to the door.'
    """
    return dict(_packaged())


@cache
def _packaged() -> Mapping[str, LibraryContrast]:
    return _folder(files("demur") / "data" / "contrasts")


def load_library(folder: Path | None = None) -> Mapping[str, LibraryContrast]:
    """The packaged library, with the contrasts of a folder behind it.

    Args:
        folder: With one `.jsonl` file a contrast; None: the packaged ones alone.

    Raises:
        PromptFileError: The folder is missing or has no such file; its index or a line cannot be
            used, each of which is listed.
        TooFewPromptsError: A contrast has fewer than 8 items, or items of fewer than 4 clusters.
        ConfigError: A contrast is called like a packaged one.
    """
    own = contrasts()
    if folder is None:
        return own
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise PromptFileError(
            f"there is no folder {folder}", "name a folder with one .jsonl file a contrast"
        )
    more = _folder(folder)
    if not more:
        raise PromptFileError(
            f"{folder} holds no .jsonl file",
            "write one a contrast, with the columns cluster, positive and negative",
        )
    if twice := sorted(set(own) & set(more)):
        raise ConfigError(
            f"the library has `{twice[0]}` already, and {folder} brings another",
            "rename its file and its table",
        )
    return {**own, **more}


def _folder(folder: Path | Traversable) -> Mapping[str, LibraryContrast]:
    entries = _index(folder / INDEX)
    texts = {
        one.name.removesuffix(".jsonl"): one
        for one in sorted(folder.iterdir(), key=lambda one: one.name)
        if one.name.endswith(".jsonl")
    }
    items = {name: _items(name, place) for name, place in texts.items()}
    found: dict[str, LibraryContrast] = {}
    for name in [*entries, *(name for name in items if name not in entries)]:
        entry = entries.get(name, _Entry())
        if entry.derived is not None:
            own = _derive(name, entry.derived, items, where=f"{folder / INDEX}")
        elif name in items:
            own = items[name]
        else:
            raise PromptFileError(
                f"{folder / INDEX} describes `{name}`, and there is no {name}.jsonl beside it",
                "add the file, or say `derived`",
            )
        found[name] = LibraryContrast(name, entry.kind, entry.about, entry.question, own)
    return found


def _index(place: Path | Traversable) -> Mapping[str, _Entry]:
    if not place.is_file():
        return {}
    try:
        raw = tomllib.loads(place.read_text("utf-8"))
        raw.pop("licence", None)
        return {name: _Entry.model_validate(table) for name, table in raw.items()}
    except ValidationError as error:
        first = error.errors()[0]
        raise PromptFileError(
            f"{place}: a table is not as it should be: {'.'.join(map(str, first['loc']))}, "
            f"{first['msg']}",
            "keys are kind (topic, form or meaning), about, question and derived",
        ) from error
    except (OSError, ValueError) as error:
        raise PromptFileError(f"{place} cannot be read: {error}", "mend the file") from error


def _derive(
    name: str, how: _Derived, items: Mapping[str, tuple[LibraryItem, ...]], *, where: str
) -> tuple[LibraryItem, ...]:
    if how.rule not in RULES:
        raise UnknownNameError.among(RULES, kind="rule of a derived contrast", name=how.rule)
    if how.of not in items:
        raise PromptFileError(
            f"{where}: `{name}` is derived from `{how.of}`, which is no file beside it",
            f"there are: {', '.join(items)}",
        )
    out: list[LibraryItem] = []
    for one in items[how.of]:
        text = one.positive if how.side == "positive" else one.negative
        changed = RULES[how.rule](text)
        if changed == text:
            raise PromptFileError(
                f"{where}: the rule `{how.rule}` leaves {one.id} as it is: {text[:60]!r}",
                "derive from texts that it changes",
            )
        out.append(LibraryItem(f"{name}/{one.id}", one.cluster, changed, text))
    return tuple(out)


def _items(name: str, place: Path | Traversable) -> tuple[LibraryItem, ...]:
    try:
        data = place.read_bytes()
    except OSError as error:
        raise PromptFileError(
            f"{place} cannot be read: {error.strerror}", "check its permissions"
        ) from error
    found: list[LibraryItem] = []
    bad: list[str] = []
    ids: dict[str, int] = {}
    for number, row, why in _rows(data.removeprefix(b"\xef\xbb\xbf")):
        if why:
            bad.append(f"line {number}: {why}")
            continue
        one = str(row.get("id") or f"{name}-{number}")
        positive, negative = str(row["positive"]), str(row["negative"])
        if one in ids:
            bad.append(f"line {number}: its id is that of line {ids[one]}, {one}")
        elif positive.strip() == negative.strip():
            bad.append(f"line {number}: both sides are {positive[:60]!r}")
        else:
            ids[one] = number
            found.append(LibraryItem(one, (name, str(row["cluster"])), positive, negative))
    if bad:
        more = [f"  and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
        raise PromptFileError(
            "\n".join([f"{place}: {len(bad)} lines cannot be used", *_indented(bad), *more]),
            "nothing was loaded: mend or delete what is listed",
        )
    clusters = len({one.cluster for one in found})
    if len(found) < MIN_ITEMS or clusters < MIN_CLUSTERS:
        raise TooFewPromptsError(
            f"{place} has {len(found)} pairs in {clusters} clusters",
            f"give {MIN_ITEMS} pairs or more, in {MIN_CLUSTERS} clusters or more",
        )
    return tuple(found)


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines[:_SHOWN]]


def _rows(data: bytes) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Line number, its object, and what is wrong with it."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield number, {}, f"byte {error.start + 1} is not UTF-8"
            continue
        except (ValueError, RecursionError) as error:
            yield number, {}, f"not JSON: {error}"
            continue
        if not isinstance(row, dict):
            yield number, {}, f"a {type(row).__name__}, not an object"
            continue
        lacking = [
            f"`{key}`"
            for key in ("cluster", "positive", "negative")
            if not (isinstance(row.get(key), str) and row[key].strip())
        ]
        yield number, row, f"has no text in {', '.join(lacking)}" if lacking else ""


# Reading activations -----------------------------------------------------------------------------


def texts(
    library: Mapping[str, LibraryContrast], *, position: int = -1
) -> tuple[tuple[str, str], ...]:
    """What `read_library` runs the model on, each once: (question, text).

    The question is empty where texts are read as prompts. Its length is the total of a progress
    bar.
    """
    pairs = (
        (one.question if position == ANSWER else "", text)
        for one in library.values()
        for item in one.items
        for text in (item.positive, item.negative)
    )
    return tuple(dict.fromkeys(pairs))


def read_library(
    model: Model,
    library: Mapping[str, LibraryContrast],
    *,
    sites: Sequence[Site],
    position: int,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[Site, Contrast]]:
    """Read the library on a model, under whatever edits are in force.

    A text that several contrasts share is read once.

    Args:
        model: What the directions are of.
        library: Contrasts by name.
        sites: Tensors to read.
        position: Token index from the end of the prompt, -1 the last, the texts being prompts; or
            `ANSWER`: the mean over the tokens of the texts as answers to the contrast's question.
        batch_size: Most texts that are run together; None is as many as the device is best given.
        progress: Called with the number of texts done since the last call; see `texts`.

    Returns:
        By contrast and site, in pairs, with the themes as clusters.

    Raises:
        TooFewPromptsError: The library is empty, or a prompt is shorter than the position asks for.
        ConfigError: The position is above 0.
        TemplateError: See `Model.encode`.
        NonFiniteError: A text's activations hold NaN or infinity.
    """
    if not library:
        raise TooFewPromptsError("the library is empty", "give one contrast or more")
    if position > ANSWER:
        raise ConfigError(
            f"there is no position {position}", "give -1 or less for prompts, 0 for answers"
        )
    every = texts(library, position=position)
    place = {text: i for i, text in enumerate(every)}
    values: Float[Tensor, "site text d_model"]
    if position == ANSWER:
        asked = [
            AdviceItem(str(i), question, text, text, "library", str(i))
            for i, (question, text) in enumerate(every)
        ]
        values = read_answers(
            model, asked, sites=sites, batch_size=batch_size, progress=progress
        ).values
    else:
        values = collect(
            model,
            [text for _, text in every],
            sites=sites,
            positions=(position,),
            batch_size=batch_size,
            progress=progress,
        ).values[:, 0]
    fingerprint = model.fingerprint
    out: dict[str, dict[Site, Contrast]] = {}
    for name, one in library.items():
        question = one.question if position == ANSWER else ""
        sides = [
            torch.tensor([place[question, text] for text in side])
            for side in (
                [item.positive for item in one.items],
                [item.negative for item in one.items],
            )
        ]
        recipe = (
            f"unrelated contrast, {one.kind}: {one.about or name} {len(one.items)} pairs in "
            f"{len({item.cluster for item in one.items})} clusters ({one.digest})"
        )
        out[name] = {
            site: Contrast.of_pairs(
                name,
                values[i, sides[0]],
                values[i, sides[1]],
                site=site,
                position=position,
                model=fingerprint,
                recipe=recipe,
                clusters=[item.cluster for item in one.items],
            )
            for i, site in enumerate(sites)
        }
    return out
