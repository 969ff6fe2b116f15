"""Training of banks of latents: the stages behind `demur features train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from demur.errors import ConfigError, TooFewPromptsError
from demur.features.rows.training import TrainedBank
from demur.features.training import Settings, cache_activations, steps_of, train
from demur.models import Model
from demur.progress import Listener, Quiet
from demur.prompts import (
    Prompt,
    PromptSet,
    Source,
    deduplicate,
    drop_overlaps,
    load,
    near_groups,
)
from demur.sites import Site
from demur.store import atomic_write

PROMPTS = (
    "refusal_train?split=train&label=harmful",
    "refusal_train?split=train&label=harmless",
    "refusal_extra?label=harmful",
    "refusal_extra?label=harmless",
    "advice_money",
    "advice_study",
    "advice_household",
    "advice_health",
)
"""What banks are trained on unless told otherwise: packaged prompts that no report is made from."""
_KEPT = (
    "contrast_pairs",
    "lookalikes",
    "plain",
    "refusal_train?split=heldout",
    "open_ended",
    "em_open",
)
CARD = "card.json"


@dataclass(frozen=True, slots=True)
class BankSettings:
    """What decides the banks, besides the model.

    Attributes:
        prompts: Specs of prompts; the model's own replies stand behind them. What is nearly a
            prompt that features are looked for or reported with is left out.
        each: Most prompts of one spec.
        tokens: How many a site should have.
        max_new_tokens: Longest reply.
        training: Width, k, epochs and the rest.
        seed: Of the order of prompts, the split and the replies.
    """

    prompts: tuple[str, ...] = PROMPTS
    each: int = 500
    tokens: int = 100_000
    max_new_tokens: int = 48
    training: Settings = field(default_factory=Settings)
    seed: int = 0


_DEFAULTS = BankSettings()


def default_sites(model: Model) -> tuple[Site, ...]:
    """A third, 60 % and 80 % of the depth: before, where and behind refusal is usually written."""
    layers = sorted({round(share * (model.n_layers - 1)) for share in (0.35, 0.62, 0.83)})
    return tuple(Site(layer, "resid_post") for layer in layers)


def train_banks(
    model: Model,
    sites: Sequence[Site],
    folder: Path,
    settings: BankSettings = _DEFAULTS,
    *,
    listener: Listener | None = None,
) -> list[TrainedBank]:
    """Train one bank a site on what the model does with prompts and its own replies.

    Args:
        model: The model whose activations are read.
        sites: Of the banks; all are read in the same passes.
        folder: Gets one folder a site in SAELens' format, `card.json`, and the cache of
            activations, which may be deleted when done. What is there already is not done again.
        settings: What else decides them.
        listener: Hears stages and steps.

    Returns:
        One row a site, in the order given.

    Raises:
        MissingExtraError: `sae-lens` is not installed.
        ConfigError: A site is not the model's; see also `demur.features.training`.
        StoreError: The folder holds activations of another model, other prompts or settings.
        TooFewPromptsError: Too few prompts are left.
    """
    listener = listener or Quiet()
    wrong = [site for site in sites if not 0 <= site.layer < model.n_layers]
    if wrong or not sites:
        raise ConfigError(
            f"{model.name} has blocks 0 to {model.n_layers - 1}"
            + (f", so no site {wrong[0]}" if wrong else "; no site was named"),
            "name sites like 14.resid_post",
        )
    prompts, told = bank_prompts(settings)
    with listener.stage(
        "activations, the model's own replies behind prompts", settings.tokens
    ) as p:
        cache = cache_activations(
            model,
            prompts.texts,
            sites=sites,
            folder=folder / "cache",
            tokens=settings.tokens,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            groups=near_groups(prompts),
            about={"prompt_sets": told},
            progress=p,
        )
    rows: list[TrainedBank] = []
    for site in sites:
        steps = steps_of(cache, site, settings.training)
        with listener.stage(f"training {site}", steps) as p:
            rows.append(train(cache, site, settings.training, out=folder / str(site), progress=p))
    card = {
        "demur": metadata.version("demur"),
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "settings": asdict(settings),
        "prompt_sets": told,
        "banks": [asdict(row) for row in rows],
    }
    atomic_write(folder / CARD, json.dumps(card, indent=1, allow_nan=False) + "\n")
    return rows


def bank_prompts(settings: BankSettings) -> tuple[PromptSet, dict[str, dict[str, int | str]]]:
    """The prompts of all specs, without those that features are looked for or reported with.

    Returns:
        The prompts, and per spec how many there are of how many, and their fingerprint.
    """
    kept = [load(spec) for spec in _KEPT]
    found: list[Prompt] = []
    told: dict[str, dict[str, int | str]] = {}
    for spec in settings.prompts:
        own = load(spec)
        whole = len(own)
        for other in kept:
            own, _ = drop_overlaps(other, own)
        own, _ = deduplicate(own)
        own = own.take(min(settings.each, len(own)), seed=settings.seed)
        told[spec] = {"n": len(own), "of": whole, "fingerprint": own.fingerprint}
        found.extend(own)
    if len(found) < 40:
        raise TooFewPromptsError(
            f"{len(found)} prompts are left of {' + '.join(settings.prompts)}",
            "name more of them; what overlaps the packaged report sets is left out",
        )
    return PromptSet("bank", tuple(found), Source("memory", "bank")), told
