"""A small set of latents without which a model refuses less, tested on prompts of its own.

Latents stand in for one another, so that single effects do not add up. Forward selection adds what
brings the log-odds down furthest *together with* what is chosen already; backward pruning takes out
again what is no longer needed. The best of many always looks better than it is, so the set is
judged on other prompts, beside random sets like it; and the selection is run again on resampled
prompts, to see which latents come back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
from jaxtyping import Float

from demur.directions import Direction
from demur.errors import ConfigError, OverlapError, TooFewPromptsError
from demur.features.attribute import Baseline
from demur.features.bank import Bank
from demur.features.discover import Latent, Unit
from demur.features.read import LatentReads, by_name
from demur.features.rows.discover import (
    ForwardRow,
    HeldOutRow,
    MinimalRow,
    StabilityRow,
)
from demur.features.verify import STEPS, Prepared, ablating, mass, matched
from demur.interventions import Ablate
from demur.models import Conversation, Model
from demur.progress import Progress
from demur.prompts import normalise
from demur.selection import RefusalTokens
from demur.stats import Estimate, bootstrap, bootstrap_stratified, mean, null_p

_DRAWS = 2000
_CHANCE = 200


def check_apart(splits: Mapping[str, Sequence[str]]) -> None:
    """Make sure that no prompt is in two splits, up to case, accents and punctuation.

    Raises:
        OverlapError: One is; the first is shown.
    """
    known = {name: {normalise(text): text for text in texts} for name, texts in splits.items()}
    for one, two in combinations(known, 2):
        both = known[one].keys() & known[two].keys()
        if both:
            raise OverlapError(
                f"{len(both)} prompts are in both {one} and {two}, such as "
                f"{known[one][min(both)][:80]!r}",
                "split them together (`demur.prompts.split`)",
            )


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """A set of units with how it came about.

    Attributes:
        units: In the order in which they were added; what was pruned is left out.
        row: For tables.
    """

    units: tuple[Unit, ...]
    row: MinimalRow

    @property
    def latents(self) -> tuple[Latent, ...]:
        """Of all units."""
        return tuple(chain.from_iterable(unit.latents for unit in self.units))


class Selector:
    """Chooses a set on some prompts; what a set does is measured once, however often it is asked.

    Selections on resampled prompts so cost only the sets that had not come up before.

    Args:
        model: Unedited.
        banks: That the units are of.
        units: What to choose from: what `verify` says promotes refusal, or all candidates.
        harmful: Prompts to choose on.
        tokens: First tokens of refusals.
        baseline: What latents are set to.

    Raises:
        ConfigError: There are no units.
        TooFewPromptsError: There are fewer than two prompts.
    """

    def __init__(
        self,
        model: Model,
        banks: Sequence[Bank],
        units: Sequence[Unit],
        harmful: Sequence[str | Conversation],
        tokens: RefusalTokens | Sequence[int],
        *,
        baseline: Baseline = "zero",
    ) -> None:
        if not units:
            raise ConfigError("there are no latents to choose from", "lower the bar for candidates")
        if len(harmful) < 2:
            raise TooFewPromptsError(f"got {len(harmful)} prompts to choose on", "give two or more")
        self.units = tuple(dict.fromkeys(units))
        self._banks = by_name(banks)
        self._baseline: Baseline = baseline
        self._ready = Prepared(model, harmful, tokens)
        self._known: dict[frozenset[int], Float[np.ndarray, " prompt"]] = {
            frozenset(): np.zeros(len(harmful))
        }

    @property
    def tried(self) -> int:
        """How many sets the model was run with."""
        return len(self._known) - 1

    def effects(self, sets: Sequence[frozenset[int]]) -> Float[np.ndarray, "set prompt"]:
        """Change of log-odds with sets of units (by number) taken away, nats."""
        missing = [one for one in dict.fromkeys(sets) if one not in self._known]
        edits = [
            ablating(
                self._banks,
                [latent for i in sorted(one) for latent in self.units[i].latents],
                self._baseline,
            )
            for one in missing
        ]
        if missing:
            found = self._ready.measure(edits).change.numpy()
            self._known |= dict(zip(missing, found, strict=True))
        return np.stack([self._known[one] for one in sets])

    def select(
        self,
        *,
        delta: float = 0.1,
        most: int = 10,
        weights: Float[np.ndarray, " prompt"] | None = None,
        progress: Progress | None = None,
    ) -> Chosen:
        """Add the best, one after the other, then take out what is not needed.

        Args:
            delta: Least further fall of the mean log-odds that a unit must bring, nats.
            most: Most units.
            weights: Of the prompts, such as how often a resample holds each; None is all alike.
            progress: Called once a step; its numbers add up to `most` + 1.

        Raises:
            ConfigError: `delta` is below 0, or `most` below 1.
        """
        if delta < 0 or most < 1:
            raise ConfigError(
                f"a set of at most {most} with gains of {delta} cannot be chosen",
                "give a gain of 0 or more, and room for one",
            )
        share = np.full(self._ready.n, 1.0) if weights is None else np.asarray(weights, float)
        share = share / share.sum()
        chosen: list[int] = []
        now, trace, stopped, told = 0.0, [], "most", 0
        while len(chosen) < most:
            left = [i for i in range(len(self.units)) if i not in chosen]
            if not left:
                stopped = "none left"
                break
            means = self.effects([frozenset([*chosen, i]) for i in left]) @ share
            best = int(means.argmin())
            gain = now - float(means[best])
            if gain < delta or gain <= 0:
                stopped = "gain"
                break
            chosen.append(left[best])
            now = float(means[best])
            trace.append(ForwardRow(str(self.units[left[best]]), now, gain))
            if progress is not None:
                progress(1)
                told += 1
        pruned: list[str] = []
        while len(chosen) > 1:
            means = self.effects([frozenset(chosen) - {i} for i in chosen]) @ share
            least = int(means.argmin())
            loss = float(means[least]) - now
            if loss >= delta:
                break
            pruned.append(str(self.units[chosen.pop(least)]))
            now = float(means[least])
        if progress is not None:
            progress(most + 1 - told)
        units = tuple(self.units[i] for i in chosen)
        latents = tuple(str(one) for unit in units for one in unit.latents)
        row = MinimalRow(
            tuple(map(str, units)),
            latents,
            tuple(trace),
            tuple(pruned),
            stopped,
            delta,
            most,
            len(self.units),
            self.tried,
            self._ready.n,
            now,
        )
        return Chosen(units, row)

    def stability(
        self,
        chosen: Chosen,
        *,
        draws: int = 100,
        seed: int,
        progress: Progress | None = None,
    ) -> StabilityRow:
        """Run the selection on resampled prompts, with the settings that `chosen` was made with.

        Args:
            chosen: What was chosen on all prompts.
            draws: Bootstrap samples.
            seed: Of them.
            progress: Called once a draw.

        Raises:
            ConfigError: There are fewer than two draws.
        """
        if draws < 2:
            raise ConfigError(f"got {draws} bootstrap draws", "give 100 or so")
        rng = np.random.default_rng(seed)
        n = self._ready.n
        full = set(chosen.units)
        scores: list[float] = []
        chance: list[float] = []
        counts: Counter[Unit] = Counter()
        sizes: Counter[int] = Counter()
        for _ in range(draws):
            weights = rng.multinomial(n, np.full(n, 1 / n)).astype(np.float64)
            again = self.select(delta=chosen.row.delta, most=chosen.row.most, weights=weights)
            counts.update(again.units)
            sizes[len(again.units)] += 1
            scores.append(_jaccard(full, set(again.units)))
            for _ in range(max(1, _CHANCE // draws)):
                drawn = rng.choice(len(self.units), size=len(again.units), replace=False)
                chance.append(_jaccard(full, {self.units[i] for i in drawn.tolist()}))
            if progress is not None:
                progress(1)
        low, high = np.quantile(scores, (0.025, 0.975))
        value = float(np.mean(scores))
        return StabilityRow(
            draws,
            Estimate(value, min(float(low), value), max(float(high), value), n, "95% of draws"),
            float(np.mean(chance)),
            {str(unit): count / draws for unit, count in counts.most_common()},
            {str(size): count for size, count in sorted(sizes.items())},
        )


def _jaccard(one: set[Unit], two: set[Unit]) -> float:
    return len(one & two) / len(one | two) if one | two else 1.0


def held_out(
    model: Model,
    banks: Sequence[Bank],
    chosen: Chosen | Sequence[Latent],
    *,
    harmful: Sequence[str],
    harmless: Sequence[str],
    chosen_on: Mapping[str, Sequence[str]],
    tokens: RefusalTokens | Sequence[int],
    reads: LatentReads,
    direction: Direction | None = None,
    baseline: Baseline = "zero",
    sets: int = 99,
    without: Sequence[Latent] = (),
    seed: int,
    progress: Progress | None = None,
) -> HeldOutRow:
    """Take a set away on prompts that it was not chosen on, and random sets like it.

    Args:
        model: Unedited.
        banks: Whole.
        chosen: The set.
        harmful: Prompts that neither the latents nor the set were found on.
        harmless: Likewise.
        chosen_on: The prompts of all that went before, by split.
        tokens: First tokens of refusals.
        reads: On the harmful prompts of discovery; sets are matched on these.
        direction: The dense one, ablated from everything that is written to the stream.
        baseline: What latents are set to.
        sets: Random ones.
        without: Latents that are not drawn, such as all candidates.
        seed: Of the draw and of bootstrap intervals.
        progress: Its numbers add up to `demur.features.verify.STEPS`.

    Raises:
        OverlapError: A prompt is also in a split of `chosen_on`.
        ConfigError: The set is empty.
        TooFewPromptsError: A class has fewer than two prompts, or a bank has too few latents for
            random sets.
    """
    latents = tuple(chosen.latents if isinstance(chosen, Chosen) else chosen)
    if not latents:
        raise ConfigError("the set is empty", "there is nothing to test; lower the least gain")
    mine = [*harmful, *harmless]
    for name, texts in chosen_on.items():
        check_apart({name: texts, "the test prompts": mine})
    named = by_name(banks)
    bad, good = Prepared(model, harmful, tokens), Prepared(model, harmless, tokens)
    drawn = matched(reads, latents, sets=sets, seed=seed, without=without)
    edits = [ablating(named, one, baseline) for one in (latents, *drawn)]
    done = told = 0

    def step(n: int) -> None:
        nonlocal done, told
        done += n
        now = STEPS * done // (len(edits) * bad.n)
        if progress is not None and now > told:
            progress(now - told)
            told = now

    found = bad.measure(edits, progress=step)
    cost = good.measure(edits[:1], kl=True)
    assert cost.kl is not None
    effect = found.change[0].numpy()
    null = tuple(float(one) for one in found.change[1:].mean(1))
    plain, base = bad.plain.numpy(), good.plain.numpy()
    of_refusal: Estimate | None = None
    if plain.mean() > base.mean():
        of_refusal = bootstrap_stratified(
            lambda i, j: float(-effect[i].mean() / (plain[i].mean() - base[j].mean())),
            len(plain),
            len(base),
            draws=_DRAWS,
            seed=seed,
        )
    dense = of_dense = dense_kl = None
    if direction is not None:
        taken, spent = bad.under(Ablate(direction)), good.under(Ablate(direction))
        assert spent.kl is not None
        moved = taken.change[0].numpy()
        dense, dense_kl = mean(moved), mean(spent.kl[0].numpy())
        if moved.mean() != 0:
            of_dense = bootstrap(
                lambda i: float(effect[i].mean() / moved[i].mean()),
                len(moved),
                draws=_DRAWS,
                seed=seed,
            )
    own = mass(reads, latents)
    theirs = float(np.median([mass(reads, one) for one in drawn]))
    return HeldOutRow(
        bad.n,
        good.n,
        mean(effect),
        of_refusal,
        dense,
        of_dense,
        null,
        null_p(float(effect.mean()), null, side="low"),
        theirs / own if own > 0 else 0.0,
        mean(cost.change[0].numpy()),
        mean(cost.kl[0].numpy()),
        dense_kl,
        float(found.size[0].mean()),
    )
