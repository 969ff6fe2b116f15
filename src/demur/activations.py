"""Reading the stream: rows of activations, or their moments with memory that does not grow.

One pass over the prompts reads all sites and positions. The vocabulary head is not run, only the
wanted rows are copied, the template prefix that all prompts share is computed once, and blocks
behind the last site that is read are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import ConfigError, NonFiniteError, TooFewPromptsError, UnknownNameError
from demur.models import Conversation, Model
from demur.progress import Progress
from demur.sites import Site


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """One vector per site, position and prompt.

    Attributes:
        values: In residual-stream units, float32 (float64 from a float64 model), on the CPU.
        sites: The tensors read.
        positions: Token indices from the end of the prompt.
        model: Fingerprint of the model.
    """

    values: Float[Tensor, "site position prompt d_model"]
    sites: tuple[Site, ...]
    positions: tuple[int, ...]
    model: str

    def at(self, site: Site, position: int) -> Float[Tensor, "prompt d_model"]:
        """The rows of one site and position."""
        return self.values[_index(self.sites, site), _index(self.positions, position)]


@dataclass(frozen=True, slots=True, eq=False)
class PointMoments:
    """Mean and covariance of one site and position.

    Attributes:
        n: Prompts.
        mean: float64.
        spread: Rows whose Gram matrix is the scatter matrix, sum of (x - mean)(x - mean)^T; exact
            up to the sketch's rank, then its best-known low-rank part. No rows at rank 0.
        total: Trace of the scatter matrix, exact.
    """

    n: int
    mean: Float[Tensor, " d_model"]
    spread: Float[Tensor, "row d_model"]
    total: float

    @classmethod
    def of(cls, rows: Float[Tensor, "row d_model"]) -> PointMoments:
        """Exact moments of some rows, in float64."""
        wide = rows.double()
        mean = wide.mean(0)
        centred = wide - mean
        return cls(len(rows), mean, centred, float(centred.pow(2).sum()))


@dataclass(slots=True, eq=False)
class Moments:
    """Running mean and covariance of every site and position; memory is independent of n.

    Means merge by Chan's formula in float64. The scatter matrix is kept as at most `2 * rank` rows
    per point (Frequent Directions): exact while no more prompts came than that.

    Attributes:
        sites: The tensors read.
        positions: Token indices from the end of the prompt.
        rank: Rows of the sketch that survive a compression; 0 keeps no covariance, only its trace.

    References:
        Chan, Golub, LeVeque 1979; Ghashami, Liberty, Phillips, Woodruff 2016 (Frequent Directions).
    """

    sites: tuple[Site, ...]
    positions: tuple[int, ...]
    rank: int = 64
    n: int = 0
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    total: Tensor = field(default_factory=lambda: torch.empty(0))
    spread: Tensor = field(default_factory=lambda: torch.empty(0))
    exact: bool = True

    def update(self, values: Float[Tensor, "site position prompt d_model"]) -> None:
        """Take in more prompts."""
        wide = values.double()
        sites, positions, m, d = wide.shape
        spread, mean = torch.var_mean(wide, 2, correction=0)
        if self.n == 0:
            self.mean = torch.zeros_like(mean)
            self.total = torch.zeros(sites, positions, dtype=torch.float64)
            self.spread = torch.empty(sites, positions, 0, d, dtype=torch.float32)
        bridge = (self.n * m / (self.n + m)) ** 0.5 * (mean - self.mean)
        self.total += m * spread.sum(2) + bridge.pow(2).sum(2)
        if self.rank:
            rows = [self.spread, (wide - mean.unsqueeze(2)).float()]
            if self.n:
                rows.append(bridge.unsqueeze(2).float())
            self.spread = torch.cat(rows, 2)
        self.mean = self.mean + (mean - self.mean) * (m / (self.n + m))
        self.n += m
        if self.spread.shape[2] > 2 * self.rank:
            self._compress()

    def merge(self, later: Moments) -> None:
        """Take in the prompts of another reading as if they had come next.

        Merged in the same order, the same readings give the same bits; in another order, means
        and traces differ by the rounding of float64, and a sketch that is not exact by its error.

        Raises:
            ConfigError: The two are of other sites or positions, or keep another covariance.
        """
        mine, theirs = ((m.sites, m.positions, m.rank) for m in (self, later))
        if mine != theirs:
            raise ConfigError(
                f"moments of {len(later.sites)} sites, positions {later.positions} and rank "
                f"{later.rank} do not merge into {len(self.sites)}, {self.positions}, {self.rank}",
                "read both at the same sites and positions, with the same rank",
            )
        if later.n == 0:
            return
        self.exact = self.exact and later.exact
        if self.n == 0:
            self.n, self.mean = later.n, later.mean.clone()
            self.total, self.spread = later.total.clone(), later.spread.clone()
            return
        n = self.n + later.n
        gap = later.mean - self.mean
        bridge = (self.n * later.n / n) ** 0.5 * gap
        self.total = self.total + later.total + bridge.pow(2).sum(2)
        if self.rank:
            self.spread = torch.cat([self.spread, later.spread, bridge.unsqueeze(2).float()], 2)
        self.mean = self.mean + gap * (later.n / n)
        self.n = n
        if self.spread.shape[2] > 2 * self.rank:
            self._compress()

    def _compress(self) -> None:
        for site in range(len(self.sites)):
            # Site by site: the Gram matrices of all sites at once would double the memory.
            rows = self.spread[site].double()
            values, vectors = torch.linalg.eigh(rows @ rows.mT)
            if rows.shape[1] > rows.shape[2] or values.shape[-1] <= self.rank:
                cut = torch.zeros_like(values[:, :1])
            else:
                cut = values[:, -self.rank - 1 :][:, :1]
            kept, basis = values[:, -self.rank :], vectors[:, :, -self.rank :]
            scale = ((kept - cut).clamp(min=0) / kept.clamp(min=1e-30)).sqrt()
            compressed = scale.unsqueeze(-1) * (basis.mT @ rows)
            if site == 0:
                out = torch.empty(len(self.sites), *compressed.shape, dtype=torch.float32)
            out[site] = compressed.float()  # pyright: ignore[reportPossiblyUnboundVariable]
            self.exact = self.exact and bool((cut <= 1e-9 * values[:, -1:]).all())
        self.spread = out  # pyright: ignore[reportPossiblyUnboundVariable]

    def at(self, site: Site, position: int) -> PointMoments:
        """Mean and covariance of one site and position.

        Raises:
            TooFewPromptsError: Nothing was read yet.
        """
        if self.n == 0:
            raise TooFewPromptsError("no prompts were read", "give at least one prompt")
        i, j = _index(self.sites, site), _index(self.positions, position)
        return PointMoments(
            self.n, self.mean[i, j], self.spread[i, j].double(), float(self.total[i, j])
        )


def _index(known: Sequence[object], wanted: object) -> int:
    try:
        return list(known).index(wanted)
    except ValueError as error:
        raise UnknownNameError(
            f"{wanted} was not read", f"there are: {', '.join(map(str, known))}"
        ) from error


def _read(
    model: Model,
    prompts: Sequence[str | Conversation],
    *,
    sites: Sequence[Site],
    positions: Sequence[int],
    batch_size: int | None,
    progress: Progress | None,
    take: Callable[[list[int], Tensor], None],
) -> None:
    """Hand (indices of prompts, values of shape site, position, prompt, d_model) to `take`."""
    if not sites or not positions or max(positions) >= 0:
        raise ConfigError(
            f"there are {len(sites)} sites and the positions {list(positions)} to read",
            "name sites, and positions from the end of the prompt: -1 is its last token",
        )
    whole = model.encode(prompts)
    passes = whole.passes(tokens=model.tokens_per_pass, rows=batch_size)
    held: dict[Site, Tensor] = {}

    def keep(x: Tensor, site: Site) -> Tensor:
        chunk = model.chunk
        if chunk is not None and not chunk.is_prefix:
            columns = chunk.ends.unsqueeze(1) + torch.tensor(list(positions))
            if bool((columns < 0).any()):
                raise TooFewPromptsError(
                    f"a prompt is shorter than position {min(positions)} asks for",
                    "read fewer positions from the end",
                )
            rows = x[torch.arange(len(x)).unsqueeze(1), columns]
            wide = torch.promote_types(x.dtype, torch.float32)
            held[site] = rows.detach().to("cpu", wide).transpose(0, 1)
        return x

    with ExitStack() as undo:
        undo.enter_context(model.owned())
        undo.enter_context(model.prefix_kept())
        if min(positions) < -int((whole.ends - whole.shared).min()):
            undo.enter_context(model.whole_rows())  # It reaches into the shared prefix.
        for site in sites:
            undo.callback(model.intercept(site, lambda x, site=site: keep(x, site)))
        for index in passes:
            model.read(whole.rows(index))
            values = torch.stack([held[site] for site in sites])
            finite = torch.isfinite(values).all(3).all(1).all(0)
            if not bool(finite.all()):
                bad = index[int((~finite).nonzero()[0])]
                asked = prompts[bad]
                text = asked if isinstance(asked, str) else asked[-1].text
                raise NonFiniteError(
                    f"activations of prompt {bad + 1} ({text[:60]!r}) hold NaN or infinity",
                    "try `--dtype float32`; the checkpoint may also be damaged",
                )
            take(index, values)
            held.clear()
            if progress is not None:
                progress(len(index))


def collect(
    model: Model,
    prompts: Sequence[str | Conversation],
    *,
    sites: Sequence[Site],
    positions: Sequence[int],
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Activations:
    """Read one vector per site, position and prompt; memory grows with the number of prompts.

    Args:
        model: Under whatever edits are in force.
        prompts: User messages, or conversations.
        sites: Tensors to read.
        positions: Token indices from the end of the prompt, -1 the last.
        batch_size: Most prompts that are run together, like lengths first; None is as many as the
            device is best given. Results do not depend on it.
        progress: Called with the number of prompts done since the last call.

    Raises:
        NonFiniteError: A prompt's activations hold NaN or infinity; it is named.
        ConfigError: There is no site, or a position is not one of the prompt's.
    """
    out: list[Tensor | None] = [None] * len(prompts)

    def take(index: list[int], values: Tensor) -> None:
        for column, i in enumerate(index):
            out[i] = values[:, :, column]

    _read(
        model,
        prompts,
        sites=sites,
        positions=positions,
        batch_size=batch_size,
        progress=progress,
        take=take,
    )
    rows = torch.stack([row for row in out if row is not None], 2)
    return Activations(rows, tuple(sites), tuple(positions), model.fingerprint)


def moments(
    model: Model,
    prompts: Sequence[str | Conversation],
    *,
    sites: Sequence[Site],
    positions: Sequence[int],
    rank: int = 64,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Read mean and covariance per site and position in one pass, with memory independent of n.

    Arguments and errors are those of `collect`; `rank` is the size of the covariance sketch, exact
    for up to `2 * rank` prompts. At rank 0 only means are read, which is faster.
    """
    running = Moments(tuple(sites), tuple(positions), rank)
    _read(
        model,
        prompts,
        sites=sites,
        positions=positions,
        batch_size=batch_size,
        progress=progress,
        take=lambda _index, values: running.update(values),
    )
    return running


@contextmanager
def reading(model: Model, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Record the whole tensor at each site, of the last pass, as edits in force left it.

    Yields:
        A dict that is filled as the model runs, site -> (prompt, token, d_model).
    """
    held: dict[Site, Tensor] = {}

    def keep(x: Tensor, site: Site) -> Tensor:
        held[site] = x.detach().clone()
        return x

    with ExitStack() as undo:
        undo.enter_context(model.owned())
        undo.enter_context(model.whole_rows())
        for site in sites:
            undo.callback(model.intercept(site, lambda x, site=site: keep(x, site)))
        yield held


def projections(
    model: Model,
    prompts: Sequence[str | Conversation],
    *,
    sites: Sequence[Site],
    positions: Sequence[int],
    units: Float[Tensor, "site position d_model"],
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "site position prompt"]:
    """Project every site and position on a vector of its own, keeping nothing but the numbers.

    Arguments and errors are those of `collect`; `units` holds one vector per site and position.

    Returns:
        Coordinates in residual-stream units, float64, on the CPU.
    """
    out = torch.empty(len(sites), len(positions), len(prompts), dtype=torch.float64)

    def take(index: list[int], values: Tensor) -> None:
        out[:, :, index] = torch.einsum("spnd,spd->spn", values.double(), units.double())

    _read(
        model,
        prompts,
        sites=sites,
        positions=positions,
        batch_size=batch_size,
        progress=progress,
        take=take,
    )
    return out
