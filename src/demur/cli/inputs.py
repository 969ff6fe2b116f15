"""What options gave, read: settings, models, prompt sets, sites and layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from demur.cli import talk
from demur.errors import ConfigError

if TYPE_CHECKING:
    from demur.config import ModelSettings
    from demur.models import Model
    from demur.sites import Site


def model_changes(*, no_adapter: bool, **given: str | bool | None) -> dict[str, Any]:
    """The options about a model that were given, as changes of settings."""
    if given.get("adapter") is not None and no_adapter:
        raise typer.BadParameter("--adapter and --no-adapter exclude each other")
    changes = {f"model.{key}": value for key, value in given.items() if value is not None}
    return changes | ({"model.adapter": None} if no_adapter else {})


def model_settings(changes: dict[str, Any]) -> ModelSettings:
    """The same defaults as an audit's, so that a direction finds the model it was made on."""
    from demur.config import read_config

    return read_config(None, changes).model


def model(settings: ModelSettings, listener: talk.Listener) -> Model:
    """Load a model while the listener is told."""
    with listener.stage("loading the model", 1) as advance:
        from demur.models import load

        found = load(**settings.model_dump())
        advance(1)
    return found


def setting(text: str) -> tuple[str, Any]:
    """Read `key=value`; the value is TOML if it can be read so, else text; `none` is None."""
    import tomllib

    key, mark, value = text.partition("=")
    if not mark or not key.strip():
        raise typer.BadParameter(
            f"`{text}` is no setting: write key=value, like selection.max_kl=0.2"
        )
    value = value.strip()
    if value == "none":
        return key.strip(), None
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def validation(text: str) -> dict[str, str]:
    """A validation set as the command line names it, with a short name for the report."""
    harmful, mark, harmless = (part.strip() for part in text.partition(" against "))
    if not (mark and harmful and harmless):
        raise ConfigError(
            f"`--validate {text}` names no two sets",
            "write --validate 'harmful.jsonl against harmless.jsonl'",
        )

    def short(spec: str) -> str:
        path, _, query = spec.partition("?")
        values = [p.partition("=")[2] for p in query.split("&") if not p.startswith("column=")]
        return ", ".join([Path(path).stem, *filter(None, values)])

    return {
        "name": f"{short(harmful)} against {short(harmless)}",
        "harmful": harmful,
        "harmless": harmless,
    }


def prompts_or_pipe(prompts: list[str] | None) -> list[str]:
    """The prompts that were named, else one from each line of the pipe."""
    asked = list(prompts or ())
    if not asked:
        if sys.stdin.isatty():
            raise typer.BadParameter("no prompt was given: name one, or pipe one a line")
        asked = [line.strip() for line in sys.stdin if line.strip()]
        if not asked:
            raise typer.BadParameter("the pipe held no prompt: write one a line")
    return asked


@contextmanager
def new_file(path: Path, what: str, *, force: bool) -> Iterator[None]:
    """See that a guard or an anchor can be written, by us alone, before minutes are spent on it."""
    from demur.store import held

    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is no name for {what}", "let it end in .safetensors")
    if path.exists() and not force:
        raise ConfigError(
            f"{path} exists already", "choose another name with `--out`, or say `--force`"
        )
    with held(path.with_name(f".{path.name}.lock"), "fit"):
        yield


def named_sets(texts: Sequence[str], option: str) -> list[dict[str, str]]:
    """Sets given as NAME=SPEC."""
    found: dict[str, str] = {}
    for text in texts:
        name, mark, spec = (part.strip() for part in text.partition("="))
        # A bare spec may hold `=` behind its `?`.
        if not mark or "?" in name or not name or not spec:
            raise ConfigError(
                f"`--{option} {text}` names no set",
                f"write --{option} 'mine=prompts.jsonl?label=harmless'",
            )
        if name in found:
            raise ConfigError(f"`--{option}` names {name} twice", "give each set its own name")
        found[name] = spec
    return [{"name": name, "prompts": spec} for name, spec in found.items()]


def carded_model(
    about: Mapping[str, Any],
    name: str | None,
    changes: dict[str, Any],
    listener: talk.Listener,
) -> Model:
    """The model on the card of a guard or an anchor, or another one that the user names."""
    return model(carded(about, name, changes), listener)


def carded(about: Mapping[str, Any], name: str | None, changes: Mapping[str, Any]) -> ModelSettings:
    """How to load the model on a card, or another one that the user names."""
    load = dict(about.get("load") or {}) if name is None else {"name": name}
    if not load:
        raise ConfigError("the card names no model", "name it with `--model`")
    return model_settings({**{f"model.{key}": v for key, v in load.items()}, **changes})


def layers(text: str | None) -> tuple[int, ...] | None:
    """Blocks as they are written on the command line: `12,18,24`."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"`{text}` names no blocks: write 12,18,24")
    return tuple(int(part) for part in parts)


def sites(texts: Sequence[str]) -> list[Site]:
    """Sites as they are written on the command line: `14.resid_post`."""
    from demur.sites import Site

    return [Site.parse(text) for text in texts]
