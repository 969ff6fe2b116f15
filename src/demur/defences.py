"""What an anchor is compared with: steering and gates of the literature, in the same harness.

Each is fitted on the anchor's own fit prompts, and where it has a gate, its threshold is calibrated
on the anchor's own calibration prompts, so that false alarms are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from demur.anchor import Anchor, Floor, Gate, Push
from demur.errors import DegenerateVectorError, TooFewPromptsError
from demur.guard import Look, ReadName, Scored, calibrate_strata, columns, prefill
from demur.models import Conversation, Model
from demur.progress import Progress
from demur.selection import Passes
from demur.sites import Site, Span

Prompted = str | Conversation


@dataclass(frozen=True, slots=True, eq=False)
class Likeness:
    """The condition of conditional activation steering: how the mean of a request lies to a vector.

    Attributes:
        site: What is read.
        condition: Unit vector, positive towards harmful requests, (d_model,).

    References:
        Lee et al. 2024, arXiv:2409.05907 (CAST). There the threshold is searched for the best F1;
        here it is calibrated like the anchor's.
    """

    site: Site
    condition: Float[Tensor, " d_model"]

    @classmethod
    def fit(
        cls,
        site: Site,
        harmful: Float[Tensor, "n d_model"],
        benign: Float[Tensor, "m d_model"],
    ) -> Likeness:
        """First principal component of differences between classes, as in the original.

        Args:
            site: Where the rows were read.
            harmful: Means over requests, one row each.
            benign: The same.

        Raises:
            TooFewPromptsError: A class has fewer than two rows.
        """
        n = min(len(harmful), len(benign))
        if n < 2:
            raise TooFewPromptsError(f"got {n} pairs of requests", "give two or more")
        apart = harmful[:n].double() - benign[:n].double()
        _, _, rows = torch.linalg.svd(apart, full_matrices=False)
        sign = torch.sign((apart @ rows[0]).mean())
        return cls(site, rows[0] * (sign if sign else 1.0))

    @property
    def look(self) -> Look:
        """The cosine of the mean over the instruction with the condition."""

        def of(x: Tensor, spans: Mapping[Span, Tensor], ends: Tensor) -> dict[str, Tensor]:
            del ends
            span = spans[Span.INSTRUCTION].double()
            mean = torch.einsum("rtd,rt->rd", x.double(), span / span.sum(1, keepdim=True))
            along = mean @ self.condition.to(mean)
            return {"span": along / mean.norm(dim=1).clamp(min=1e-12)}

        return of

    def judge(self, raw: Mapping[ReadName, Float[np.ndarray, " prompt"]]) -> Scored:
        """The cosine is the score; there is no threshold of its own."""
        scores = raw["span"]
        return Scored(scores, dict(raw), ("span",) * len(scores), np.zeros(len(scores), bool))

    def gate(
        self,
        model: Model,
        strata: Mapping[str, Sequence[Prompted]],
        alpha: float,
        progress: Progress | None = None,
    ) -> Gate:
        """A gate with this condition that opens on at most `alpha` of each kind of benign requests.

        Raises:
            TooFewPromptsError: A stratum is too small for `alpha`.
        """
        scores = {}
        for name, prompts in strata.items():
            rows = prefill(model, prompts, {self.site: self.look}, None, progress)
            scores[name] = columns(rows, ["span"])["span"]
        threshold, own = calibrate_strata(scores, alpha)
        return Gate(self, threshold, (), own)


@dataclass(frozen=True, slots=True, eq=False)
class NullSpaceSteer:
    """Steering by a matrix that is blind to what benign activations do most.

    h <- h + strength * W h, where W maps harmful activations to the refusal vector and benign ones
    to nearly nothing, because it sees them only through the directions in which they vary least.

    Attributes:
        site: Where it acts.
        matrix: (d_model, d_model), float32.
        strength: 1 adds the whole refusal vector to an average harmful activation.

    References:
        Sheng et al. 2025, arXiv:2506.07022 (AlphaSteer): closed form of section 4.
    """

    site: Site
    matrix: Float[Tensor, "d_model d_model"]
    strength: float = 1.0

    @classmethod
    def fit(
        cls,
        site: Site,
        harmful: Float[Tensor, "n d_model"],
        benign: Float[Tensor, "m d_model"],
        refusal: Float[Tensor, " d_model"],
        *,
        share: float = 0.6,
        ridge: float = 10.0,
    ) -> NullSpaceSteer:
        """Least squares with a penalty, in the directions in which benign activations vary least.

        Args:
            site: Where the rows were read.
            harmful: Activations at the prompt's last token, one row each.
            benign: The same.
            refusal: What is to be added to harmful activations.
            share: Of the dimensions, that counts as blind to benign activations.
            ridge: Penalty, as in the original.

        Raises:
            DegenerateVectorError: `share` leaves no dimension.
        """
        size = int(share * harmful.shape[1])
        if size < 1:
            raise DegenerateVectorError(
                f"a share of {share:g} of {harmful.shape[1]} dimensions is none", "give more"
            )
        pos, neg = harmful.double(), benign.double()
        _, vectors = torch.linalg.eigh(neg.T @ neg)  # Smallest first.
        blind = vectors[:, :size]
        seen = pos @ blind
        inner = seen.T @ seen + ridge * torch.eye(size, dtype=torch.float64)
        weights = torch.linalg.solve(inner, seen.T @ torch.ones(len(pos), dtype=torch.float64))
        return cls(site, torch.outer(refusal.double(), blind @ weights).float())

    def sites(self, model: Model) -> tuple[Site, ...]:
        """Its one site."""
        del model
        return (self.site,)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Add what the matrix makes of each row."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide + self.strength * (wide @ self.matrix.to(wide).T)).to(x.dtype)


class _Measured:
    """A floor that keeps count of how far it lifts, and lifts."""

    def __init__(self, floor: Floor) -> None:
        self.floor, self.total, self.n = floor, 0.0, 0

    @property
    def site(self) -> Site:
        return self.floor.site

    def __call__(
        self,
        x: Float[Tensor, "row token d_model"],
        places: Int[Tensor, "row token"],
        strength: float,
    ) -> Float[Tensor, "row token d_model"]:
        deficit = self.floor.deficit(x, places, strength)
        self.total += float(deficit.sum())
        self.n += deficit.numel()
        return self.floor(x, places, strength)


def steering(
    model: Model, floors: Sequence[Floor], strength: float, prompts: Sequence[Prompted]
) -> tuple[Push, ...]:
    """Additive steering with the mean norm that the floors lift by on these prompts.

    Args:
        model: Unedited.
        floors: Whose axes and norms are taken.
        strength: Of the floors.
        prompts: Harmful requests.
    """
    counted = tuple(_Measured(floor) for floor in floors)
    with Anchor(None, counted, strength).holding(model):
        Passes(model, model.encode(list(prompts))).logits()
    return tuple(Push(one.site, one.floor.axis * (one.total / max(one.n, 1))) for one in counted)


def random_floors(floors: Sequence[Floor], seed: int) -> tuple[Floor, ...]:
    """Floors that lift by as much and as often, along random directions."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for floor in floors:
        drawn = torch.randn(len(floor.axis), generator=rng, dtype=torch.float64)
        size = float(floor.push.double().norm())
        found.append(replace(floor, push=torch.nn.functional.normalize(drawn, dim=0) * size))
    return tuple(found)
