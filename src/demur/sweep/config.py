"""What a sweep is told: models, estimators, seeds, and the settings that all its audits share."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from demur.config import ModelSettings, RunConfig, no_such_setting, read_config
from demur.errors import ConfigError

# Of an audit's settings, those that a sweep sets itself, and where it takes them from.
_OWN = {
    "model": "models",
    "seed": "seeds",
    "extraction.estimator": "estimators",
    "data.harmful": "prompts.harmful",
    "data.harmless": "prompts.harmless",
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SweepModel(ModelSettings):
    """A model as an audit takes it, and what the table calls it.

    Attributes:
        label: None is the name, with the settings in which it differs from others of that name.
    """

    label: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._+-]+$")

    @property
    def settings(self) -> ModelSettings:
        """Without the label, which decides no number."""
        return ModelSettings.model_validate(self.model_dump(exclude={"label"}))


class SweepPrompts(_Section):
    """Both classes, as `demur.prompts.load` takes them; None is what an audit takes by itself."""

    harmful: str | None = None
    harmless: str | None = None


class SweepConfig(_Section):
    """Everything that decides the numbers of a sweep.

    Attributes:
        models: Tables of model settings, or names.
        estimators: Names of registered estimators.
        seeds: Of all draws of an audit, its splits among them.
        shard: Prompts that are read by one task. Statistics are merged in order of the shards, so
            that this number decides the last bits of a figure and the number of workers does not.
        threads: Of a worker. Sums are split among threads, so that this decides the last bits too.
        audit: Any setting of an audit but those that are swept, in its own sections.
    """

    models: tuple[SweepModel, ...] = Field(min_length=1)
    estimators: tuple[str, ...] = Field(default=("difference-of-means",), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    prompts: SweepPrompts = Field(default_factory=SweepPrompts)
    shard: int = Field(default=64, ge=1)
    threads: int = Field(default=1, ge=1)
    audit: dict[str, Any] = Field(default_factory=dict)

    @field_validator("models", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [{"name": one} if isinstance(one, str) else one for one in value]

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: tuple[SweepModel, ...]) -> tuple[SweepModel, ...]:
        if len({one.settings.model_dump_json() for one in value}) < len(value):
            raise ValueError("a model is named twice with the same settings")
        given = [one.label for one in value if one.label is not None]
        if len(set(given)) < len(given):
            raise ValueError("two models have the same label")
        return value

    @field_validator("estimators", "seeds")
    @classmethod
    def _once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a value is named twice")
        return value

    @property
    def labels(self) -> dict[str, ModelSettings]:
        """Label -> settings, in order."""
        found: dict[str, ModelSettings] = {}
        names = [_short(one.name) for one in self.models]
        usual = ModelSettings()
        for one, name in zip(self.models, names, strict=True):
            label = one.label
            if label is None:
                label = name
                if names.count(name) > 1:
                    label += "".join(
                        f"+{key}={_short(str(value if value is not None else 'none'))}"
                        for key, value in one.settings
                        if key != "name" and value != getattr(usual, key)
                    )
            free, n = label, 1
            while free in found:
                n += 1
                free = f"{label}-{n}"
            found[free] = one.settings
        return found

    def run_config(self, model: ModelSettings, estimator: str, seed: int) -> RunConfig:
        """The audit of one cell.

        Raises:
            ConfigError: A setting under `audit` is unknown, out of bounds, or the sweep's own.
        """
        for key, own in _OWN.items():
            *sections, last = key.split(".")
            node: Any = self.audit
            for section in sections:
                node = node.get(section, {}) if isinstance(node, Mapping) else {}
            if isinstance(node, Mapping) and last in node:
                raise ConfigError(
                    f"`audit.{key}` is set, which a sweep sets itself", f"write it under `{own}`"
                )
        changes = {
            f"{section}.{key}" if isinstance(values, Mapping) else section: value
            for section, values in self.audit.items()
            for key, value in (values.items() if isinstance(values, Mapping) else [("", values)])
        }
        changes |= {
            f"data.{on}": spec
            for on, spec in (
                ("harmful", self.prompts.harmful),
                ("harmless", self.prompts.harmless),
            )
            if spec is not None
        }
        changes |= {f"model.{key}": value for key, value in model}
        return read_config(None, {**changes, "extraction.estimator": estimator, "seed": seed})


def _short(name: str) -> str:
    last = Path(name).stem if name.endswith(".gguf") else name.strip("/").split("/")[-1]
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in last).strip("-.") or "model"


def read_sweep(path: Path) -> SweepConfig:
    """Read a TOML file.

    Raises:
        ConfigError: It cannot be read, a key is unknown or a value out of bounds; all are listed.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}", "docs/sweep.md shows one") from error
    return sweep_config(tree)


def sweep_config(tree: Mapping[str, Any]) -> SweepConfig:
    """Check settings that came as plain values.

    Raises:
        ConfigError: As of `read_sweep`.
    """
    try:
        config = SweepConfig.model_validate(dict(tree))
    except ValidationError as error:
        rows = [f"{'.'.join(map(str, e['loc']))}: {_why(e)}" for e in error.errors()]
        raise ConfigError(
            "settings that do not fit: " + "; ".join(rows), "docs/sweep.md lists every setting"
        ) from error
    # What stands under `audit` is checked now, not by the first worker.
    config.run_config(next(iter(config.labels.values())), config.estimators[0], config.seeds[0])
    return config


def _why(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return no_such_setting(SweepConfig, error["loc"])
    return error["msg"].removeprefix("Value error, ")
