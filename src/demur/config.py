"""What a run is told: every setting, its default and its bounds, in one validated value.

Files, flags and notebooks all come through here. `demur audit --explain` prints the result as
TOML, and the run folder keeps it as `config.toml`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from demur.errors import ConfigError


class _Section(BaseModel):
    # NaN passes every bound: a limit of NaN would limit nothing.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(_Section):
    """Which model; see `demur.load`.

    Attributes:
        adapter: A PEFT adapter; "auto" is the shipped one for `smollm2`; None, in a file "none",
            is none.
        thinking: None closes the thinking block where the template can, so that a reply of a few
            tokens is a reply.
    """

    name: str = "smollm2"
    adapter: str | None = "auto"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    system: str | None = None
    thinking: bool | None = None
    trust_remote_code: bool = False

    @field_validator("adapter")
    @classmethod
    def _none(cls, value: str | None) -> str | None:
        return None if value == "none" else value  # TOML has no word for nothing.


class ValidationSet(_Section):
    """Two classes of prompts that a direction is read on, and never fitted or chosen on."""

    name: str
    harmful: str
    harmless: str


_VALIDATION = (
    ValidationSet(
        name="crossed pairs",
        harmful="contrast_pairs?kind=crossed&label=harmful",
        harmless="contrast_pairs?kind=crossed&label=harmless",
    ),
    ValidationSet(
        name="near pairs against lookalikes",
        harmful="contrast_pairs?kind=near&label=harmful&split=report",
        harmless="lookalikes",
    ),
)


class DataSettings(_Section):
    """Which prompts; a name, file or hub id as `demur.prompts.load` takes them.

    Attributes:
        fit: Prompts per class that directions are estimated from; likewise `select` for choosing
            one, `calibrate` for curves, `report` for every reported effect. They never overlap.
        validation: Further sets that the direction is read on, beside what plain words do there.
        behaviour_filter: Fit and select on harmful prompts that the model refuses and harmless
            ones that it does not, by refusal log-odds, where enough are left.
    """

    harmful: str = "contrast_pairs?kind=near&label=harmful"
    harmless: str = "contrast_pairs?kind=near&label=harmless + plain?split=fit"
    fit: int = Field(default=160, ge=8)
    select: int = Field(default=36, ge=4)
    calibrate: int = Field(default=32, ge=4)
    report: int = Field(default=100, ge=8)
    validation: tuple[ValidationSet, ...] = _VALIDATION
    behaviour_filter: bool = True


class ExtractionSettings(_Section):
    """How directions are estimated.

    Attributes:
        layers: Blocks to read; None is all.
        positions: Token positions from the end; None is t_inst and every post-instruction token.
        batch_size: Most prompts per forward pass; None is as many as the device is best given.
    """

    estimator: str = "difference-of-means"
    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    batch_size: int | None = Field(default=None, ge=1)


class SelectionSettings(_Section):
    """What a candidate must pass; the defaults are those of Arditi et al. 2024.

    Attributes:
        max_kl: Most KL(plain || ablated) on harmless prompts, nats.
        min_induce: Least refusal log-odds on harmless prompts with the direction added.
        last_layers_skipped: Share of the layers, from the end, that is not eligible.
        screen: Measure all candidates cheaply first and only the best exactly: in bfloat16 where
            that is faster, and on a few prompts.
        screen_prompts: On how many of each class; 0 is on all.
        finalists: How many of the best screened candidates are measured again exactly, and how
            many of the rest are drawn to check the screen.
    """

    max_kl: float = Field(default=0.1, gt=0)
    min_induce: float = 0.0
    last_layers_skipped: float = Field(default=0.2, ge=0, lt=1)
    finalists: int = Field(default=6, ge=1)
    screen: bool = True
    screen_prompts: int = Field(default=8, ge=0)

    @field_validator("screen_prompts")
    @classmethod
    def _enough(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one prompt has no interval: give 0 for all prompts, or at least 2")
        return value


class TestSettings(_Section):
    """How the causal test is run.

    Attributes:
        nulls: Random directions of each kind (isotropic, covariance-matched, shuffled labels).
        null_prompts: Report prompts per class on which they run.
        null_generations: How many of each kind are also run by generation.
        max_new_tokens: Length of a generated reply.
        stop_early: End a reply once the judge has said the same of it three times, eight tokens
            apart: quicker, and wrong where a reply changes its mind later.
        judge: Name of the judge of refusal.
    """

    nulls: int = Field(default=10, ge=1)
    null_prompts: int = Field(default=48, ge=8)
    null_generations: int = Field(default=1, ge=0)
    max_new_tokens: int = Field(default=48, ge=4)
    batch_size: int = Field(default=100, ge=1)
    stop_early: bool = False
    judge: str = "patterns"
    judge_options: dict[str, Any] = Field(default_factory=dict)
    strengths: tuple[float, ...] = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


class SeparationSettings(_Section):
    """How harmfulness and refusal are told apart, on the splits of the audit.

    Attributes:
        lookalikes: Harmless prompts that look harmful: half of them are fitted on, half reported.
        samples: Replies that are drawn of every prompt, of which most decide whether it is refused;
            0 goes by the greedy reply.
        temperature: Of these draws.
        inversion_prompts: Report prompts per class that the model is asked about.
        inversion_nulls: Random directions at the norm, and at the KL, of either direction.
        jailbreak_prompts: Harmful report prompts that are put into every wrapper.
    """

    lookalikes: str = "lookalikes"
    samples: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    inversion_prompts: int = Field(default=48, ge=8)
    inversion_nulls: int = Field(default=5, ge=1)
    jailbreak_prompts: int = Field(default=24, ge=8)


class NamedSet(_Section):
    """Prompts under the name that a table gives them."""

    name: str
    prompts: str


_STRATA = (
    NamedSet(
        name="plain",
        prompts="plain?split=calibrate + refusal_train?split=heldout&kind=plain + advice_study"
        " + advice_household",
    ),
    NamedSet(
        name="lookalikes",
        prompts="lookalikes?split=calibrate + contrast_pairs?label=harmless&split=calibrate"
        " + refusal_train?split=heldout&kind=lookalike",
    ),
)


class GuardSettings(_Section):
    """How a Latent Guard is fitted and calibrated.

    Attributes:
        alpha: False alarms promised, as a share of benign requests of every kind in `strata`.
        harmful: Requests that it is fitted on; likewise `benign`.
        most: At most so many of each, drawn by seed.
        held: Share of them that is not fitted on but decides on layer and reads.
        strata: Kinds of benign requests for calibration; none of them is fitted on.
        earlier: Benign questions that stand as earlier turns; their answers are in its column
            `good`.
        wrappers: Jailbreak wrappers put round fit requests of both classes, of which the last two
            only decide on layer and reads. The others are left for the evaluation.
        wrapped: Calibration prompts of which so many are put into these wrappers too, as a stratum.
        turns: Likewise into conversations of several turns.
        depth: Which layers may be read, as shares of the depth.
        window: Tokens of a window of the message; `stride` is from one window to the next.
        ridge: Added to the benign covariance, as a fraction of its mean variance.
    """

    alpha: float = Field(default=0.05, gt=0, lt=1)
    harmful: str = (
        "contrast_pairs?label=harmful&split=fit + refusal_train?label=harmful&split=train"
    )
    benign: str = (
        "contrast_pairs?label=harmless&split=fit + lookalikes?split=fit + plain?split=fit"
        " + refusal_train?label=harmless&split=train"
    )
    most: int = Field(default=800, ge=40)
    held: float = Field(default=0.3, gt=0, lt=1)
    strata: tuple[NamedSet, ...] = _STRATA
    earlier: str = "advice_money"
    wrappers: tuple[str, ...] = (
        "prefix_injection",
        "style_constraint",
        "fiction_framing",
        "code_completion",
        "few_shot",
        "split_persona",
        "authority_claim",
    )
    wrapped: int = Field(default=280, ge=0)
    turns: int = Field(default=200, ge=0)
    depth: tuple[float, float] = (0.35, 0.65)
    window: int = Field(default=16, ge=1)
    stride: int = Field(default=8, ge=1)
    ridge: float = Field(default=0.1, gt=0)

    @field_validator("wrappers")
    @classmethod
    def _three(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) < 3:
            raise ValueError("name three wrappers or more: the last two are not fitted on")
        return value


class AnchorSettings(_Section):
    """How an anchor is fitted, on the prompts of `guard`.

    Attributes:
        replies: So many prompts of each class are replied to, to learn where refusing and complying
            replies stand; likewise to choose.
        reply_tokens: Length of these replies, and of those that the gate is calibrated on: what it
            promises holds up to here.
        depth: Layers that may be held, as shares of the depth. The last fifth makes replies
            degenerate.
        band: How many neighbouring layers are held.
        strengths: Of which the anchor's is chosen, by the refusals that it brings back where
            refusal is ablated: 1 lifts to the mean of refusing replies.
        most_degenerate: More degenerate replies than without the anchor that a strength may cost.
        header: Also read, every `every` tokens of a reply, what the model would say in a fresh
            turn.
        every: See there.
        spared: So many principal directions of benign activations are left alone by the push.
        action: "floor" has the model refuse in its own words, "canned" replaces the reply.
        judge: Name of the judge of refusal.
    """

    replies: int = Field(default=160, ge=40)
    reply_tokens: int = Field(default=48, ge=16)
    depth: tuple[float, float] = (0.35, 0.8)
    band: int = Field(default=8, ge=1)
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    most_degenerate: float = Field(default=0.05, ge=0, lt=1)
    header: bool = False
    every: int = Field(default=64, ge=8)
    spared: int = Field(default=0, ge=0)
    action: Literal["floor", "canned"] = "floor"
    judge: str = "patterns"
    judge_options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("strengths")
    @classmethod
    def _some(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0:
            raise ValueError("name one strength above 0 or more")
        return value


class RunConfig(_Section):
    """Everything that decides a run's numbers.

    `separation` is for `demur separate` alone, `guard` for `demur guard` and `demur anchor`, and
    `anchor` for the latter.
    """

    model: ModelSettings = Field(default_factory=ModelSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    extraction: ExtractionSettings = Field(default_factory=ExtractionSettings)
    selection: SelectionSettings = Field(default_factory=SelectionSettings)
    test: TestSettings = Field(default_factory=TestSettings)
    separation: SeparationSettings = Field(default_factory=SeparationSettings)
    guard: GuardSettings = Field(default_factory=GuardSettings)
    anchor: AnchorSettings = Field(default_factory=AnchorSettings)
    seed: int = Field(default=0, ge=0)


def read_config(path: Path | None = None, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a TOML file and lay changes over it.

    Args:
        path: The file, None for defaults.
        changes: Dotted key -> value, such as `{"selection.max_kl": 0.2}`.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or a value out of bounds; all of
            them are listed.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read: {error.strerror}", "check the path"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} is no TOML: {error}", "`demur audit --explain` prints one"
            ) from error
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"`{key}` goes through `{section}`, which is a value", "check the key"
                )
        node[last] = value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        rows = [f"{'.'.join(map(str, e['loc']))}: {_why(e)}" for e in error.errors()]
        raise ConfigError(
            "settings that do not fit: " + "; ".join(rows),
            "`demur audit --explain` prints every setting with its value",
        ) from error


def no_such_setting(root: Any, loc: Sequence[str | int]) -> str:
    """What to say of a setting that is unknown, with the name that was probably meant.

    Args:
        root: The pydantic model that was to be made.
        loc: Where in it; numbers are places in a list.
    """
    section: Any = root
    *path, key = loc
    for part in path:
        if isinstance(part, int):
            section = next(iter(get_args(section)), None)
        elif hasattr(section, "model_fields"):
            section = section.model_fields[part].annotation
    if not hasattr(section, "model_fields"):
        return "no such setting"
    near = get_close_matches(str(key), section.model_fields, n=1)
    return f"no such setting, did you mean `{near[0]}`?" if near else "no such setting"


def _why(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return no_such_setting(RunConfig, error["loc"])
    return error["msg"]


def as_toml(config: RunConfig) -> str:
    """The whole configuration as TOML; settings that are None stand as comments."""
    import tomli_w

    tree = config.model_dump(mode="json")
    tree["model"]["adapter"] = config.model.adapter or "none"
    nothing = [
        f"{section}.{key}"
        for section, values in tree.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value is None
    ]
    clean = {
        section: (
            {k: v for k, v in values.items() if v is not None}
            if isinstance(values, dict)
            else values
        )
        for section, values in tree.items()
    }
    # Top-level values come first, or TOML would read them as part of the section before.
    ordered = dict(sorted(clean.items(), key=lambda item: isinstance(item[1], dict)))
    note = f"# not set: {', '.join(nothing)}\n" if nothing else ""
    return note + tomli_w.dumps(ordered)
