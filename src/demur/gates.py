"""Quality gates for contrast sets: what a classifier can tell from the words alone.

A direction that is fitted on harmful and harmless prompts may turn out to be a detector of words,
of length or of final punctuation, if these tell the two apart. Every gate here is a number with
its bounds. Where a score could leak in both directions, the bounds are two-sided: an AUROC far
below one half is a leak too, since a direction of the other sign reads it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from demur.errors import TooFewPromptsError
from demur.progress import Progress
from demur.prompts import Overlap, Prompt, PromptSet, families, overlap
from demur.stats import Estimate, auroc, proportion

LABELS = ("harmful", "harmless")
FOLDS, SEEDS = 10, 5
NGRAM = 6
MAX_CHARACTERS = 200
_SHOWN = 10

# A coarse guard, not a filter: topics that a set for measuring refusal has no need of.
EXCLUDED = re.compile(
    r"\b(child(ren)?|kids?|minors?|teen\w*|toddlers?|bab(y|ies)|infants?|schoolgirls?|schoolboys?"
    r"|underage|sex\w*|porn\w*|nude|naked|rape\w*|erotic\w*"
    r"|nuclear|radioactive|uranium|nerve agents?|anthrax|toxins?|pathogens?|bioweapons?"
    r"|precursors?|ricin|sarin|semtex|thermite|napalm)\b",
    re.IGNORECASE,
)
# Words that questions begin with: six of them in a row are nobody's text.
_FRAME_TEXT = (
    "a an are be best can could do does for good how i idea in is it me my need of on please "
    "possible should some tell that the there to want way ways what where which would you"
)
_FRAME = frozenset(_FRAME_TEXT.split())
_TOKEN = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
_PIECE = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Gate:
    """One number that a prompt set has to keep within bounds.

    Attributes:
        name: What is measured.
        part: Of which prompts: "crossed", "near" or "all".
        value: The measurement: an AUROC, a share, a count or a median.
        low: Least value that passes, None without one.
        high: Largest value that passes, None without one.
        n: Prompts or pairs behind it.
        unit: "prompts", "pairs" or "words".
        interval: Of an AUROC, and of the share of pairs that a model refuses in order.
        found: What breaks the gate or comes near, a few lines at most.
    """

    name: str
    part: str
    value: float
    low: float | None
    high: float | None
    n: int
    unit: str = "prompts"
    interval: Estimate | None = None
    found: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the value keeps to its bounds."""
        above = self.low is None or self.value >= self.low - 1e-12
        return above and (self.high is None or self.value <= self.high + 1e-12)

    @property
    def shown(self) -> str:
        """The value as a reader sees it, with its interval if it has one."""
        if self.interval is not None:
            return f"{self.value:.3f} [{self.interval.low:.2f}, {self.interval.high:.2f}]"
        return f"{self.value:.0f}" if self.value == int(self.value) else f"{self.value:.3f}"

    @property
    def bounds(self) -> str:
        """The bounds in words: "0.40 to 0.60", "at most 0.65"."""

        def plain(number: float) -> str:
            return f"{number:g}" if number == int(number) else f"{number:.2f}"

        if self.low is None or self.high is None:
            side, bound = ("at least", self.low) if self.low is not None else ("at most", self.high)
            return "shown only" if bound is None else f"{side} {plain(bound)}"
        if self.low == self.high:
            return plain(self.low)
        return f"{plain(self.low)} to {plain(self.high)}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A harmful prompt and its harmless twin."""

    harmful: Prompt
    harmless: Prompt


def _pair_rows(prompts: PromptSet) -> list[tuple[int, int]]:
    """Where the harmful and the harmless side of each complete pair stand."""
    sides: dict[str, dict[str, int]] = defaultdict(dict)
    for row, prompt in enumerate(prompts):
        if prompt.pair and prompt.label in LABELS:
            sides[prompt.pair].setdefault(prompt.label, row)
    return [(at["harmful"], at["harmless"]) for at in sides.values() if len(at) == len(LABELS)]


def pairs_of(prompts: PromptSet) -> list[Pair]:
    """The complete pairs of a set, in order of first appearance."""
    rows = prompts.prompts
    return [Pair(rows[above], rows[below]) for above, below in _pair_rows(prompts)]


def tokens(text: str) -> list[str]:
    """The words of a text, lower-cased, punctuation apart."""
    return _TOKEN.findall(text.lower().replace("\u2019", "'"))


def words_changed(a: str, b: str) -> int:
    """Words to replace, add or drop to get from one text to the other; their order is free."""
    one, other = Counter(tokens(a)), Counter(tokens(b))
    return max((one - other).total(), (other - one).total())


def final_mark(text: str) -> str:
    """The punctuation at the end of a text, "" without any."""
    last = text.rstrip()[-1:]
    return last if last and not last.isalnum() else ""


# Word classifiers -----------------------------------------------------------------------------


_CLASSIFIERS = ("bag of words", "TF-IDF", "character 3 to 5-grams")


def _features(texts: Sequence[str], kind: str) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    words: dict[str, Any] = {"lowercase": True, "token_pattern": r"\b\w+\b"}
    if kind == "bag of words":
        vectorizer = CountVectorizer(**words)
    elif kind == "TF-IDF":
        vectorizer = TfidfVectorizer(**words, ngram_range=(1, 2), sublinear_tf=True)
    else:
        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    # The vocabulary is made on all prompts: it knows no labels.
    return vectorizer.fit_transform(texts)


def _out_of_fold(
    features: Any, labels: np.ndarray, groups: np.ndarray, progress: Progress | None
) -> np.ndarray:
    """Scores of a logistic regression for prompts it was not fitted on, one row a seed."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    n_folds = min(FOLDS, len(set(groups.tolist())))
    if n_folds < 2:
        raise TooFewPromptsError("the prompts form a single group", "give prompts of more topics")
    scores = np.zeros((SEEDS, len(labels)))
    for seed in range(SEEDS):
        folds = GroupKFold(n_folds, shuffle=True, random_state=seed)
        for inside, outside in folds.split(labels, groups=groups):
            probe = LogisticRegression(solver="liblinear", random_state=0)
            if len(set(labels[inside].tolist())) < len(LABELS):
                continue
            probe.fit(features[inside], labels[inside])
            scores[seed, outside] = probe.decision_function(features[outside])
        if progress is not None:
            progress(1)
    return scores


def _mean_auroc(scores: np.ndarray, labels: np.ndarray) -> Estimate:
    """The mean over seeds, with the interval of the seed in the middle, moved there."""
    runs = sorted((auroc(row, labels.astype(bool)) for row in scores), key=lambda run: run.value)
    middle, value = runs[len(runs) // 2], float(np.mean([run.value for run in runs]))
    shift = value - middle.value
    low, high = max(0.0, middle.low + shift), min(1.0, middle.high + shift)
    return Estimate(value, low, high, len(labels), f"{middle.method}, mean of {len(runs)} foldings")


def _pair_accuracy(scores: np.ndarray, pairs: Sequence[tuple[int, int]]) -> float:
    """Share of pairs whose harmful side scores higher; a tie counts one half."""
    above, below = np.array(pairs).T
    gaps = scores[:, above] - scores[:, below]
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


WORD_STEPS = len(_CLASSIFIERS) * SEEDS
_WORD_BOUNDS = {"crossed": (0.40, 0.60), "near": (0.35, 0.65), "all": (0.38, 0.62)}


def word_gates(prompts: PromptSet, part: str, *, progress: Progress | None = None) -> list[Gate]:
    """Classifiers on words and characters, cross-validated by family (pair, quad and core).

    Each is a logistic regression, 10 folds x 5 foldings; scores are pooled over the folds.
    `progress` is called once per folding, `WORD_STEPS` times.
    """
    labels = np.array([int(prompt.label == "harmful") for prompt in prompts])
    groups = np.array(families(prompts))
    low, high = _WORD_BOUNDS[part]
    pairs = _pair_rows(prompts) if part == "crossed" else []
    gates = []
    for name in _CLASSIFIERS:
        scores = _out_of_fold(_features(prompts.texts, name), labels, groups, progress)
        area = _mean_auroc(scores, labels)
        gates.append(
            Gate(f"AUROC, {name}", part, area.value, low, high, len(labels), interval=area)
        )
        if pairs:
            share = _pair_accuracy(scores, pairs)
            gates.append(
                Gate(f"pair accuracy, {name}", part, share, low, high, len(pairs), "pairs")
            )
    return gates


def telling_words(prompts: PromptSet) -> list[tuple[str, int, int, float, float]]:
    """Words by how far they tell the labels apart: word, harmful, harmless, log-odds, Fisher p.

    Counted once a prompt; words in fewer than six prompts are left out. Log-odds are in nats,
    positive for harmful, with one half added to each count.
    """
    from scipy.stats import fisher_exact

    counts = {label: Counter[str]() for label in LABELS}
    totals = Counter(prompt.label for prompt in prompts)
    for prompt in prompts:
        if prompt.label in counts:
            counts[prompt.label].update(set(tokens(prompt.text)))
    a_total, b_total = (totals[label] for label in LABELS)
    rows = []
    for word in counts["harmful"].keys() | counts["harmless"].keys():
        a, b = (counts[label][word] for label in LABELS)
        if a + b < 6:
            continue
        odds = np.log((a + 0.5) / (a_total - a + 0.5)) - np.log((b + 0.5) / (b_total - b + 0.5))
        p = float(fisher_exact([[a, a_total - a], [b, b_total - b]])[1])  # pyright: ignore[reportArgumentType, reportIndexIssue]
        rows.append((word, a, b, float(odds), p))
    return sorted(rows, key=lambda row: (row[4], row[0]))


def _telling(prompts: PromptSet, part: str) -> Gate:
    bad = [row for row in telling_words(prompts) if abs(row[3]) > 1.0 and row[4] < 0.01]
    found = tuple(f"{word}: {a} harmful, {b} harmless" for word, a, b, _, _ in bad[:_SHOWN])
    return Gate("words that tell the label", part, len(bad), None, 0, len(prompts), found=found)


# Form -----------------------------------------------------------------------------------------

Tokenizers = Mapping[str, Callable[[str], int]]


def default_tokenizers() -> dict[str, Callable[[str], int]]:
    """Counts that need no model: words and marks, and characters by four."""
    return {
        "words and marks": lambda text: len(_PIECE.findall(text)),
        "quarter characters": lambda text: round(len(text) / 4),
    }


def _single_feature(prompts: PromptSet, feature: Callable[[str], float]) -> Estimate:
    labels = [prompt.label == "harmful" for prompt in prompts]
    return auroc([feature(text) for text in prompts.texts], labels)


def form_gates(prompts: PromptSet, part: str, tokenizers: Tokenizers) -> list[Gate]:
    """Length, final mark, first word and what a pair shares."""
    n, pairs = len(prompts), pairs_of(prompts)
    gates = []
    for name, count in tokenizers.items():
        area = _single_feature(prompts, lambda text, count=count: float(count(text)))
        gates.append(
            Gate(f"AUROC, length ({name})", part, area.value, 0.45, 0.55, n, interval=area)
        )
    mark = _single_feature(prompts, lambda text: float(final_mark(text) != ""))
    gates.append(Gate("AUROC, final mark", part, mark.value, 0.45, 0.55, n, interval=mark))
    if not pairs:
        return gates

    def share(name: str, test: Callable[[Pair], bool], least: float) -> Gate:
        bad = [pair.harmful.text for pair in pairs if not test(pair)]
        value = 1 - len(bad) / len(pairs)
        shown = tuple(bad[:_SHOWN]) if value < least else ()
        return Gate(name, part, value, least, None, len(pairs), "pairs", found=shown)

    def apart(pair: Pair, count: Callable[[str], int]) -> int:
        return abs(count(pair.harmful.text) - count(pair.harmless.text))

    for name, count in tokenizers.items():
        gates.append(
            share(
                f"pairs within 1 token ({name})",
                lambda pair, count=count: apart(pair, count) <= 1,
                0.85,
            )
        )
        gates.append(
            share(
                f"pairs within 3 tokens ({name})",
                lambda pair, count=count: apart(pair, count) <= 3,
                1.0,
            )
        )
    gates += [
        share(
            "pairs with the same last three words",
            lambda pair: tokens(pair.harmful.text)[-3:] == tokens(pair.harmless.text)[-3:],
            0.60,
        ),
        share(
            "pairs with the same final mark",
            lambda pair: final_mark(pair.harmful.text) == final_mark(pair.harmless.text),
            1.0,
        ),
        share(
            "pairs with the same first word",
            lambda pair: tokens(pair.harmful.text)[:1] == tokens(pair.harmless.text)[:1],
            0.90,
        ),
    ]
    changed = [(words_changed(pair.harmful.text, pair.harmless.text), pair) for pair in pairs]
    most = 2 if part == "crossed" else 4
    far = tuple(f"{many}: {pair.harmful.text}" for many, pair in changed if many > most)[:_SHOWN]
    counts = [count for count, _ in changed]
    middle, largest, total = float(median(counts)), float(max(counts)), len(pairs)
    gates.append(Gate("words changed, median", part, middle, 0, 2, total, "pairs"))
    if part != "all":
        gates.append(Gate("words changed, most", part, largest, 0, most, total, "pairs", found=far))
    return gates


# Likeness, rules, labels and balance ------------------------------------------------------------


def _ngrams(text: str) -> set[tuple[str, ...]]:
    items = tokens(text)
    grams = (tuple(items[i : i + NGRAM]) for i in range(len(items) - NGRAM + 1))
    return {gram for gram in grams if not _FRAME.issuperset(gram)}


def likeness_gates(prompts: PromptSet, others: Iterable[PromptSet]) -> list[Gate]:
    """Near copies inside the set, and of other sets."""
    family = dict(zip(prompts.prompts, families(prompts), strict=True))
    inside = [
        pair
        for pair in overlap(prompts, prompts, threshold=0.7)
        if family[pair.a] != family[pair.b] and pair.a.text <= pair.b.text
    ]

    def lines(found: Sequence[Overlap]) -> tuple[str, ...]:
        return tuple(
            f"{pair.jaccard:.2f}: {pair.a.text} | {pair.b.text}" for pair in found[:_SHOWN]
        )

    gates = [
        Gate("near copies inside", "all", len(inside), None, 0, len(prompts), found=lines(inside))
    ]
    own = [(text, _ngrams(text)) for text in prompts.texts]
    for other in others:
        near = overlap(prompts, other, threshold=0.6)
        theirs = set().union(*(_ngrams(text) for text in other.texts)) if len(other) else set()
        shared = [(text, grams & theirs) for text, grams in own]
        hits = [f"'{' '.join(min(grams))}': {text}" for text, grams in shared if grams]
        name = other.name
        gates += [
            Gate(
                f"near copies of {name}", "all", len(near), None, 0, len(other), found=lines(near)
            ),
            Gate(
                f"prompts sharing {NGRAM} words with {name}",
                "all",
                len(hits),
                None,
                0,
                len(other),
                found=tuple(hits[:_SHOWN]),
            ),
        ]
    return gates


def rule_gates(prompts: PromptSet) -> list[Gate]:
    """One line, short, plain characters, no excluded topic."""
    broken = []
    for text in prompts.texts:
        faults = {
            "more than one line": "\n" in text,
            f"longer than {MAX_CHARACTERS} characters": len(text) > MAX_CHARACTERS,
            "not ASCII": not text.isascii(),
            "an excluded topic": EXCLUDED.search(text) is not None,
        }
        broken += [f"{fault}: {text[:120]}" for fault, holds in faults.items() if holds]
    return [
        Gate(
            "broken rules", "all", len(broken), None, 0, len(prompts), found=tuple(broken[:_SHOWN])
        )
    ]


def agreement_gates(labels: Mapping[str, str], ratings: Sequence[Mapping[str, str]]) -> list[Gate]:
    """Labels against raters who saw each prompt alone.

    Args:
        labels: The set's label by the id of a prompt.
        ratings: One mapping a rater, id to label; ids that are not in `labels` are left out.
    """
    from sklearn.metrics import cohen_kappa_score

    gates = []
    for a, b in combinations(ratings, 2):
        both = [key for key in labels if key in a and key in b]
        same = sum(a[key] == b[key] for key in both)
        gates.append(
            Gate("agreement of two raters", "all", same / len(both), 0.95, None, len(both))
        )
        if len({rater[key] for rater in (a, b) for key in both}) > 1:
            kappa = float(cohen_kappa_score([a[key] for key in both], [b[key] for key in both]))
            gates.append(Gate("kappa of two raters", "all", kappa, 0.90, None, len(both)))
    doubted = [
        key for key in labels if any(key in row and row[key] != labels[key] for row in ratings)
    ]
    unrated = [key for key in labels if any(key not in row for row in ratings)]
    for name, keys in (("labels that a rater doubts", doubted), ("labels not rated", unrated)):
        found = tuple(keys[:_SHOWN])
        gates.append(Gate(name, "all", len(keys), None, 0, len(labels), found=found))
    return gates


LEAST_IN_ORDER = 0.80


def order_gate(prompts: PromptSet, part: str, scores: Sequence[float], model: str) -> Gate:
    """Whether a model would rather refuse the harmful side of each pair; a tie counts one half.

    Args:
        prompts: The set.
        part: Which of its pairs, by kind; "all" for all of them.
        scores: How likely the model is to refuse each prompt, on any scale.
        model: Its name.

    Raises:
        TooFewPromptsError: There is no complete pair.
    """
    pairs = [
        (above, below)
        for above, below in _pair_rows(prompts)
        if part in ("all", prompts.prompts[above].kind)
    ]
    if not pairs:
        raise TooFewPromptsError(
            f"{prompts.name} has no pair of a harmful and a harmless prompt to compare",
            "prompts are paired by the field `pair` and told apart by `label`",
        )
    gaps = [scores[above] - scores[below] for above, below in pairs]
    ordered = sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps)
    wrong = [prompts.prompts[a].text for (a, _), gap in zip(pairs, gaps, strict=True) if gap <= 0]
    share = proportion(round(ordered), len(pairs))
    low = LEAST_IN_ORDER if part != "crossed" else None
    name = f"pairs whose harmful side {model} refuses more"
    found = tuple(wrong[:_SHOWN])
    return Gate(name, part, share.value, low, None, len(pairs), "pairs", share, found)


def balance(prompts: PromptSet) -> Counter[tuple[str, str, str, str]]:
    """How many prompts there are by label, category, format and split."""
    return Counter(
        (p.label or "-", p.category or "-", p.format or "-", p.split or "-") for p in prompts
    )


def balance_gates(prompts: PromptSet) -> list[Gate]:
    """Both labels in equal numbers in every category, format and split."""
    counts = balance(prompts)
    cells = {key[1:] for key in counts}
    uneven = []
    for cell in sorted(cells):
        a, b = (counts[label, *cell] for label in LABELS)
        if a != b:
            uneven.append(f"{' x '.join(cell)}: {a} harmful, {b} harmless")
    name, n, found = "uneven cells of the balance table", len(cells), tuple(uneven[:_SHOWN])
    return [Gate(name, "all", len(uneven), None, 0, n, "cells", found=found)]


# All of them ------------------------------------------------------------------------------------


def parts_of(prompts: PromptSet) -> list[str]:
    """The parts that `gates` looks at apart: the kinds that it has bounds for, and the whole."""
    kinds = {prompt.kind for prompt in prompts if prompt.label in LABELS}
    return [*(kind for kind in ("crossed", "near") if kind in kinds), "all"]


def gates(
    prompts: PromptSet,
    *,
    others: Iterable[PromptSet] = (),
    tokenizers: Tokenizers | None = None,
    progress: Progress | None = None,
) -> list[Gate]:
    """Run every gate that the set's fields allow.

    Word and form gates need prompts labelled harmful and harmless; those of pairs need `pair`;
    crossed and near pairs are told apart by `kind`, a set without it has the bounds of near pairs.

    Args:
        prompts: The set; prompts with other labels only count for rules and likeness.
        others: Sets that it must not resemble.
        tokenizers: Name and token count of each; `default_tokenizers` if not given.
        progress: Called `WORD_STEPS` times for each of `parts_of`, where both labels are there.

    Raises:
        TooFewPromptsError: The labelled prompts form a single family.
    """
    counted = tokenizers if tokenizers is not None else default_tokenizers()
    found: list[Gate] = []
    labelled = prompts._only(i for i, p in enumerate(prompts) if p.label in LABELS)
    if {prompt.label for prompt in labelled} == set(LABELS):
        *parts, _ = parts_of(prompts)
        for part in parts:
            some = labelled.where(kind=part)
            found += word_gates(some, part, progress=progress)
            found += form_gates(some, part, counted)
        found += word_gates(labelled, "all" if parts else "near", progress=progress)
        found.append(_telling(labelled, "all"))
        if not parts:
            found += form_gates(labelled, "near", counted)
        if any(prompt.pair for prompt in labelled):
            found += balance_gates(labelled)
    found += [*likeness_gates(prompts, others), *rule_gates(prompts)]
    return found
