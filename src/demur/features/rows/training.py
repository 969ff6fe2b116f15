"""What training a bank left behind: how well it reconstructs, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from demur.stats import Estimate

Form = Literal["topk", "jumprelu"]


@dataclass(frozen=True, slots=True)
class PartFigures:
    """A bank on the tokens of one part of the prompts.

    Attributes:
        part: "train"; or "test", prompts that neither weights nor threshold were fitted on.
        n_prompts: Prompts that the tokens come from.
        n_tokens: Tokens, attention sinks and position 0 left out.
        fvu: Fraction of variance unexplained, 0 for a perfect reconstruction, 1 for one that is no
            better than the mean of the training tokens; the interval draws prompts.
        l0: Mean number of active latents of a token.
        dead_share: Share of the latents that are active on none of the tokens.
        dense_share: Share of the latents that are active on more than `dense` of the tokens.
    """

    part: Literal["train", "test"]
    n_prompts: int
    n_tokens: int
    fvu: Estimate
    l0: float
    dead_share: float
    dense_share: float


@dataclass(frozen=True, slots=True)
class FormFigures:
    """One way to choose which latents are active, with the same weights.

    Attributes:
        form: "topk", the k largest of each token; or "jumprelu", all above one threshold.
        threshold: In residual-stream units; None for "topk".
        train: On the training tokens.
        test: On held-out prompts.
    """

    form: Form
    threshold: float | None
    train: PartFigures
    test: PartFigures


@dataclass(frozen=True, slots=True)
class TrainedBank:
    """A bank that was trained from a cache of activations. All is measured as it was stored.

    Attributes:
        site: The tensor that it reads and writes.
        model: Name of the model.
        fingerprint: Of the model, with its adapter.
        width: Latents.
        d_model: Width of the stream.
        k: Active latents of a token in training.
        written: The form that the files hold.
        reason: Why that one.
        topk: Figures of the weights as they were trained.
        jumprelu: Figures with the threshold that was calibrated on prompts of its own.
        n_calibration_tokens: Tokens that the threshold was calibrated on.
        largest_norm: Tokens with a larger norm, in residual-stream units, were left out as sinks.
        sink_share: Share of the tokens that was left out so.
        n_train_tokens: Different tokens that the weights were fitted on.
        n_samples: Tokens that the trainer saw, repeats counted.
        n_steps: Steps of the optimiser.
        dense: From which share of tokens on a latent counts as dense.
        storage: Data type of the stored weights.
        collect_seconds: Wall-clock seconds that the cache took, for all of its sites.
        train_seconds: Wall-clock seconds of the training, of all runs if it was resumed.
        cpu_seconds: Seconds of processor time of the training.
    """

    site: str
    model: str
    fingerprint: str
    width: int
    d_model: int
    k: int
    written: Form
    reason: str
    topk: FormFigures
    jumprelu: FormFigures
    n_calibration_tokens: int
    largest_norm: float
    sink_share: float
    n_train_tokens: int
    n_samples: int
    n_steps: int
    dense: float
    storage: str
    collect_seconds: float
    train_seconds: float
    cpu_seconds: float
