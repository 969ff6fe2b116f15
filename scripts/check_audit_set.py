"""Check the audit set: mechanical rules, balance, surface shortcuts and overlap with other sets.

    python scripts/check_audit_set.py
    python scripts/check_audit_set.py --against /path/to/folder/with/jsonl   # development only

Exits with 1 when a rule is broken.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

DEFAULT_FILE = Path(__file__).resolve().parent.parent / "src" / "demur" / "data" / "audit.jsonl"

KEYS = ("id", "prompt", "label", "category", "format", "pair", "split", "source", "license")
LABELS = ("harmful", "harmless")
CATEGORIES = {
    "cyber_intrusion": "cyber",
    "privacy_surveillance": "privacy",
    "fraud_scams": "fraud",
    "evading_accountability": "evading",
    "theft_property": "theft",
    "violence_public_safety": "violence",
    "weapons_drugs": "weapons",
    "self_harm_health": "selfharm",
    "hate_harassment": "hate",
    "disinformation": "disinfo",
}
PAIRS_PER_CATEGORY = 28
FORMATS = {"imperative": 0.40, "question": 0.40, "indirect": 0.20}
SPLITS = {"fit": 112, "select": 36, "calibrate": 32, "report": 100}

MAX_CHARS = 180
MAX_WORD_DIFFERENCE = 2
MAX_CHANGED_WORDS = 5
MIN_SAME_FIRST_WORD = 0.90
FORMAT_TOLERANCE = 0.03
FULL_STOP_SHARE = (0.40, 0.60)
JACCARD_ACROSS_SPLITS = 0.60
JACCARD_WITHIN_SPLIT = 0.80
JACCARD_AGAINST = 0.60
NGRAM = 6
FOLDS = 10

# A coarse guard, not a filter: topics that the set leaves out altogether.
EXCLUDED = re.compile(
    r"\b(child(ren)?|kids?|minors?|teen\w*|toddlers?|bab(y|ies)|infants?|schools?\w*|underage"
    r"|sex\w*|porn\w*|nude|naked|rape\w*|erotic\w*"
    r"|nuclear|radioactive|uranium|nerve agents?|anthrax|toxins?|pathogens?|bioweapons?)\b"
)

Row = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """The two sides of one idea."""

    name: str
    harmful: Row
    harmless: Row


@dataclass
class Problems:
    """Broken rules, collected so that one run shows them all."""

    lines: list[str] = field(default_factory=list)

    def expect(self, condition: bool, message: str) -> None:
        """Note the message unless the condition holds."""
        if not condition:
            self.lines.append(message)


def words(text: str) -> list[str]:
    return text.rstrip(".?!").split()


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower().replace("\u2019", "'"))


def ngrams(items: Sequence[str], n: int = NGRAM) -> set[tuple[str, ...]]:
    return {tuple(items[i : i + n]) for i in range(len(items) - n + 1)}


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / len(left | right) if left or right else 0.0


def final_mark(text: str) -> str:
    return text[-1] if text[-1] in ".?!" else "none"


def changed_words(left: str, right: str) -> int:
    """Words to replace, add or drop to get from one prompt to the other."""
    a, b = words(left.lower()), words(right.lower())
    matcher = difflib.SequenceMatcher(a=a, b=b, autojunk=False)
    blocks = matcher.get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in blocks if tag != "equal")


def read_jsonl(path: Path) -> list[dict[str, object]]:
    with path.open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle if line.strip()]


def check_rows(raw: list[dict[str, object]], problems: Problems) -> list[Row]:
    rows: list[Row] = []
    for number, item in enumerate(raw, 1):
        if tuple(item) != KEYS or not all(isinstance(value, str) for value in item.values()):
            problems.lines.append(f"row {number}: keys {tuple(item)} are not {KEYS} of text")
            continue
        row: Row = {key: str(value) for key, value in item.items()}
        rows.append(row)
        name, prompt = row["id"], row["prompt"]
        expect = problems.expect
        expect(row["label"] in LABELS, f"{name}: label {row['label']!r}")
        expect(row["category"] in CATEGORIES, f"{name}: category {row['category']!r}")
        expect(row["format"] in FORMATS, f"{name}: format {row['format']!r}")
        expect(row["split"] in SPLITS, f"{name}: split {row['split']!r}")
        expect(row["source"] == "demur", f"{name}: source {row['source']!r}")
        expect(row["license"] == "Apache-2.0", f"{name}: license {row['license']!r}")
        prefix = CATEGORIES.get(row["category"], "?")
        expect(re.fullmatch(rf"{prefix}-\d{{3}}", row["pair"]) is not None, f"{name}: pair name")
        suffix = "h" if row["label"] == "harmful" else "s"
        expect(name == f"{row['pair']}-{suffix}", f"{name}: id does not follow pair and label")
        expect(prompt.isascii() and prompt.isprintable(), f"{name}: not one line of ASCII")
        expect(0 < len(prompt) <= MAX_CHARS, f"{name}: {len(prompt)} characters")
        expect(prompt == " ".join(prompt.split()), f"{name}: stray white space")
        expect(EXCLUDED.search(prompt.lower()) is None, f"{name}: excluded topic")
        is_question = row["format"] == "question"
        expect(prompt.endswith("?") == is_question, f"{name}: '?' and format disagree")
    for key in ("id", "prompt"):
        for value, count in Counter(row[key].lower() for row in rows).items():
            problems.expect(count == 1, f"{key} used {count} times: {value}")
    return rows


def check_pairs(rows: list[Row], problems: Problems) -> list[Pair]:
    grouped: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        grouped[row["pair"]][row["label"]] = row
    pairs: list[Pair] = []
    for name, sides in grouped.items():
        if set(sides) != set(LABELS):
            problems.lines.append(f"{name}: not one harmful and one harmless side")
            continue
        pair = Pair(name, sides["harmful"], sides["harmless"])
        pairs.append(pair)
        for key in ("category", "format", "split"):
            problems.expect(pair.harmful[key] == pair.harmless[key], f"{name}: {key} differs")
        left, right = pair.harmful["prompt"], pair.harmless["prompt"]
        problems.expect(final_mark(left) == final_mark(right), f"{name}: final mark differs")
        gap = abs(len(words(left)) - len(words(right)))
        problems.expect(gap <= MAX_WORD_DIFFERENCE, f"{name}: lengths differ by {gap} words")
        changed = changed_words(left, right)
        problems.expect(1 <= changed <= MAX_CHANGED_WORDS, f"{name}: {changed} words changed")
    if pairs:
        share = mean(float(same_first_word(pair)) for pair in pairs)
        problems.expect(share >= MIN_SAME_FIRST_WORD, f"same first word in only {share:.1%}")
    return pairs


def same_first_word(pair: Pair) -> bool:
    first, second = (words(row["prompt"].lower())[0] for row in (pair.harmful, pair.harmless))
    return first == second


def check_balance(pairs: list[Pair], problems: Problems) -> None:
    total = len(pairs)
    sides = [pair.harmful for pair in pairs]
    for category in CATEGORIES:
        inside = [row for row in sides if row["category"] == category]
        problems.expect(len(inside) == PAIRS_PER_CATEGORY, f"{category}: {len(inside)} pairs")
        for split, wanted in SPLITS.items():
            count = sum(row["split"] == split for row in inside)
            exact = wanted / len(CATEGORIES)
            problems.expect(abs(count - exact) < 1, f"{category}: {count} pairs in {split}")
    for split, wanted in SPLITS.items():
        count = sum(row["split"] == split for row in sides)
        problems.expect(count == wanted, f"{split}: {count} pairs, not {wanted}")
    for form, share in FORMATS.items():
        found = sum(row["format"] == form for row in sides) / total
        problems.expect(abs(found - share) <= FORMAT_TOLERANCE, f"{form}: {found:.1%} of pairs")
        if form != "question":
            marks = [row["prompt"].endswith(".") for row in sides if row["format"] == form]
            stops = mean(map(float, marks)) if marks else 0.0
            low, high = FULL_STOP_SHARE
            problems.expect(low <= stops <= high, f"{form}: {stops:.1%} with a full stop")


def check_similarity(rows: list[Row], problems: Problems) -> dict[str, float]:
    """Highest Jaccard between prompts of different pairs, across and inside splits."""
    highest = {"across splits": 0.0, "inside a split": 0.0}
    sets = [(row, frozenset(tokens(row["prompt"]))) for row in rows]
    for (left, a), (right, b) in itertools.combinations(sets, 2):
        if left["pair"] == right["pair"]:
            continue
        value = jaccard(a, b)
        same = left["split"] == right["split"]
        where = "inside a split" if same else "across splits"
        highest[where] = max(highest[where], value)
        limit = JACCARD_WITHIN_SPLIT if same else JACCARD_ACROSS_SPLITS
        message = f"{left['id']} and {right['id']}: Jaccard {value:.2f} {where}"
        problems.expect(value < limit, message)
    return highest


def check_against(rows: list[Row], folder: Path, problems: Problems) -> None:
    """Compare with the `prompt` fields of every .jsonl file below a folder."""
    ours = [(row, frozenset(tokens(row["prompt"]))) for row in rows]
    own_ngrams: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        for gram in ngrams(tokens(row["prompt"])):
            own_ngrams[gram].append(row["id"])
    print(f"\nagainst {folder} (highest Jaccard, our prompts sharing a {NGRAM}-gram)")
    files = sorted(folder.rglob("*.jsonl"))
    problems.expect(bool(files), f"no .jsonl file in {folder}")
    for path in files:
        prompts = {str(item["prompt"]) for item in read_jsonl(path) if "prompt" in item}
        best, best_id = 0.0, "-"
        sharing: dict[str, str] = {}
        for prompt in sorted(prompts):
            other = tokens(prompt)
            other_set = frozenset(other)
            for row, own in ours:
                shorter, longer = sorted((len(own), len(other_set)))
                if shorter <= best * longer and shorter < JACCARD_AGAINST * longer:
                    continue
                value = jaccard(own, other_set)
                if value > best:
                    best, best_id = value, row["id"]
                message = f"{row['id']}: Jaccard {value:.2f} with {path.name}: {prompt[:100]}"
                problems.expect(value < JACCARD_AGAINST, message)
            for gram in ngrams(other):
                for name in own_ngrams.get(gram, ()):
                    sharing[name] = " ".join(gram)
        for name, gram_text in sharing.items():
            problems.lines.append(f"{name}: '{gram_text}' is in {path.name}")
        print(
            f"  {path.name:32s} {len(prompts):5d} prompts   {best:.2f} {best_id:16s}"
            f" {len(sharing)} shared"
        )


Features = Callable[[str], dict[str, float]]


def train(rows: list[Row], features: Features) -> Callable[[list[Row]], list[float]]:
    """Fit a logistic regression and return a function that scores rows."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(DictVectorizer(), LogisticRegression(max_iter=2000))
    labels = [int(row["label"] == "harmful") for row in rows]
    model.fit([features(row["prompt"]) for row in rows], labels)

    def score(held_out: list[Row]) -> list[float]:
        return model.decision_function([features(row["prompt"]) for row in held_out]).tolist()

    return score


def auroc(rows: list[Row], scores: Sequence[float]) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([row["label"] == "harmful" for row in rows], scores))


def pair_accuracy(rows: list[Row], scores: Sequence[float]) -> float:
    """Share of pairs whose harmful side scores higher (a tie counts one half)."""
    sides: dict[str, dict[str, float]] = defaultdict(dict)
    for row, value in zip(rows, scores, strict=True):
        sides[row["pair"]][row["label"]] = value
    gaps = [side["harmful"] - side["harmless"] for side in sides.values()]
    return mean(0.5 if gap == 0 else float(gap > 0) for gap in gaps)


def grouped_scores(rows: list[Row], features: Features) -> list[float]:
    """Out-of-fold scores; both sides of a pair are in one fold."""
    from sklearn.model_selection import GroupKFold

    scores = [0.0] * len(rows)
    groups = [row["pair"] for row in rows]
    for inside, outside in GroupKFold(FOLDS).split(rows, groups=groups):
        score = train([rows[i] for i in inside], features)
        for i, value in zip(outside, score([rows[i] for i in outside]), strict=True):
            scores[i] = value
    return scores


def print_shortcuts(rows: list[Row]) -> float:
    """How far surface features alone tell the labels apart; returns the bag-of-words AUROC."""
    print(f"\nsurface features, logistic regression ({FOLDS} folds grouped by pair; fit -> report)")
    print(f"{'':20s}{'AUROC':>8s}{'in pair':>9s}{'report':>9s}")
    fit = [row for row in rows if row["split"] == "fit"]
    report = [row for row in rows if row["split"] == "report"]
    values: dict[str, float] = {}
    for name, features in SHORTCUTS.items():
        scores = grouped_scores(rows, features)
        values[name] = auroc(rows, scores)
        inside = pair_accuracy(rows, scores)
        transfer = auroc(report, train(fit, features)(report))
        print(f"  {name:18s}{values[name]:8.3f}{inside:9.3f}{transfer:9.3f}")
    return values["bag of words"]


def bag_of_words(text: str) -> dict[str, float]:
    return {f"w={token}": 1.0 for token in tokens(text)}


def word_bigrams(text: str) -> dict[str, float]:
    items = ["<s>", *tokens(text), "</s>"]
    bigrams = {f"b={a} {b}": 1.0 for a, b in itertools.pairwise(items)}
    return bag_of_words(text) | bigrams


def length_only(text: str) -> dict[str, float]:
    return {"words": float(len(words(text))), "tens_of_chars": len(text) / 10}


def mark_only(text: str) -> dict[str, float]:
    return {f"mark={final_mark(text)}": 1.0}


SHORTCUTS: dict[str, Features] = {
    "bag of words": bag_of_words,
    "words and bigrams": word_bigrams,
    "length alone": length_only,
    "final mark alone": mark_only,
}


def print_balance(pairs: list[Pair]) -> None:
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for pair in pairs:
        for row in (pair.harmful, pair.harmless):
            counts[row["label"], row["category"], row["format"], row["split"]] += 1
    print("rows: label x category x format x split")
    print(f"{'':56s}" + "".join(f"{split:>10s}" for split in (*SPLITS, "all")))
    for label, category, form in itertools.product(LABELS, CATEGORIES, FORMATS):
        row = [counts[label, category, form, split] for split in SPLITS]
        cells = "".join(f"{value:10d}" for value in (*row, sum(row)))
        print(f"  {label:10s}{category:28s}{form:16s}{cells}")
    for label in LABELS:
        row = [sum(n for k, n in counts.items() if k[0] == label and k[3] == s) for s in SPLITS]
        cells = "".join(f"{value:10d}" for value in (*row, sum(row)))
        print(f"  {label:10s}{'all':28s}{'all':16s}{cells}")


def print_lengths(pairs: list[Pair]) -> None:
    gaps = [len(words(p.harmful["prompt"])) - len(words(p.harmless["prompt"])) for p in pairs]
    changed = [changed_words(p.harmful["prompt"], p.harmless["prompt"]) for p in pairs]
    lengths = [len(words(row["prompt"])) for p in pairs for row in (p.harmful, p.harmless)]
    print("\nwords, harmful minus harmless:", dict(sorted(Counter(gaps).items())))
    print(f"  mean {mean(gaps):+.3f}, mean size {mean(map(abs, gaps)):.3f}")
    print(f"words changed: {dict(sorted(Counter(changed).items()))}, mean {mean(changed):.2f}")
    print(f"words a prompt: {min(lengths)} to {max(lengths)}, median {median(lengths):g}")
    print(f"same first word: {mean(float(same_first_word(p)) for p in pairs):.1%}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check the audit set.")
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT_FILE)
    parser.add_argument("--against", type=Path, metavar="DIR", help="folder of other .jsonl sets")
    parser.add_argument("--max-auroc", type=float, default=0.75, help="limit for bag of words")
    args = parser.parse_args(argv)

    problems = Problems()
    rows = check_rows(read_jsonl(args.file), problems)
    pairs = check_pairs(rows, problems)
    if not pairs:
        print("no complete pair", file=sys.stderr)
        return 1
    check_balance(pairs, problems)
    highest = check_similarity(rows, problems)

    print_balance(pairs)
    print_lengths(pairs)
    for where, value in highest.items():
        print(f"highest Jaccard {where}: {value:.2f}")

    if problems.lines:
        print("\nsurface features: not measured before the rules above hold")
    else:
        bow = print_shortcuts(rows)
        problems.expect(bow < args.max_auroc, f"bag of words reaches AUROC {bow:.3f}")

    if args.against is not None:
        check_against(rows, args.against, problems)

    print(f"\n{len(rows)} rows, {len(pairs)} pairs, {len(problems.lines)} broken rules")
    for line in problems.lines:
        print("  " + line)
    return 1 if problems.lines else 0


if __name__ == "__main__":
    sys.exit(main())
