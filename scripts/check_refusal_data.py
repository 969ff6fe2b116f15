"""Check the refusal training data: mechanical rules, balance, leakage, overlap.

Usage: python scripts/check_refusal_data.py [--data DIR] [--against DIR]

Exits 1 when a rule is broken. The overlap checks read only the `prompt` field
of the other files. scikit-learn is used for the AUROC figures when installed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEYS = {"id", "prompt", "label", "kind", "category", "split", "source", "license"}
LABEL_OF_KIND = {
    "direct": "harmful",
    "twin": "harmless",
    "lookalike": "harmless",
    "plain": "harmless",
}
HARMFUL_CATEGORIES = {
    "cyber_intrusion",
    "privacy_surveillance",
    "fraud_scams",
    "evading_accountability",
    "theft_property",
    "violence_public_safety",
    "weapons_drugs",
    "self_harm_health",
    "hate_harassment",
    "disinformation",
}
# Smallest and largest number of rows per (split, kind).
COUNTS = {
    ("train", "direct"): (800, 1000),
    ("train", "twin"): (400, 500),
    ("train", "lookalike"): (260, 340),
    ("train", "plain"): (310, 390),
    ("heldout", "direct"): (120, 120),
    ("heldout", "lookalike"): (100, 100),
    ("heldout", "plain"): (100, 100),
}
MAX_CHARS = 200
HELDOUT_JACCARD = 0.5  # a held-out prompt must stay below this against train
PUBLIC_JACCARD = 0.6  # any prompt must stay below this against other sets
NGRAM = 6
BANNED = re.compile(
    r"\b(child(ren)?|kids?|toddler|infant|teen\w*|minors?|schoolgirl|schoolboy|"
    r"sex\w*|porn\w*|nude\w*|naked|erotic\w*|rape\w*)\b",
    re.IGNORECASE,
)
Row = dict[str, Any]


def tokens(text: str) -> list[str]:
    """Lower-case words and numbers of a text."""
    return re.findall(r"[a-z0-9']+", text.lower())


def ngrams(text: str, n: int = NGRAM) -> set[tuple[str, ...]]:
    """Word n-grams of a text."""
    words = tokens(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle if line.strip()]


class Index:
    """Token-set Jaccard and n-gram look-up over a set of prompts."""

    def __init__(self, prompts: Iterable[str]) -> None:
        self.prompts = sorted(set(prompts))
        self.sizes: list[int] = []
        self.postings: dict[str, list[int]] = defaultdict(list)
        self.grams: dict[tuple[str, ...], int] = {}
        for i, prompt in enumerate(self.prompts):
            words = set(tokens(prompt))
            self.sizes.append(len(words))
            for word in words:
                self.postings[word].append(i)
            for gram in ngrams(prompt):
                self.grams.setdefault(gram, i)

    def nearest(self, prompt: str) -> tuple[float, str]:
        """Largest Jaccard to any indexed prompt, and that prompt."""
        words = set(tokens(prompt))
        shared: Counter[int] = Counter()
        for word in words:
            shared.update(self.postings.get(word, ()))
        best, where = 0.0, ""
        for i, n in shared.items():
            score = n / (len(words) + self.sizes[i] - n)
            if score > best:
                best, where = score, self.prompts[i]
        return best, where

    def shared_gram(self, prompt: str) -> tuple[str, str] | None:
        """First n-gram of the prompt that is indexed, and its prompt."""
        for gram in sorted(ngrams(prompt)):
            if gram in self.grams:
                return " ".join(gram), self.prompts[self.grams[gram]]
        return None


def check_row(r: Row) -> list[str]:
    """Broken rules of one row of refusal_train.jsonl."""
    if set(r) != KEYS:
        return [f"{r.get('id')}: keys {sorted(r)}"]
    text = r["prompt"]
    paired = r["kind"] in ("direct", "twin")
    rules = {
        "not clean one-line ASCII": text.isascii()
        and len(text.splitlines()) == 1
        and text == text.strip(),
        "bad length": 0 < len(text) <= MAX_CHARS,
        "template residue": not re.search(r"[{}|]|  ", text),
        "kind and label disagree": LABEL_OF_KIND.get(r["kind"]) == r["label"],
        "bad split": r["split"] in ("train", "heldout"),
        "bad category": not paired or r["category"] in HARMFUL_CATEGORIES,
        "bad source or license": (r["source"], r["license"]) == ("demur", "Apache-2.0"),
        "excluded topic": not BANNED.search(text),
    }
    return [f"{r['id']}: {name}: {text}" for name, ok in rules.items() if not ok]


def check_rows(rows: list[Row]) -> list[str]:
    """Broken per-row and per-file rules of refusal_train.jsonl."""
    bad = [line for r in rows for line in check_row(r)]
    if any(set(r) != KEYS for r in rows):
        return bad
    ids = Counter(r["id"] for r in rows)
    bad += [f"duplicate id {k}" for k, n in ids.items() if n > 1]
    seen = Counter(" ".join(tokens(r["prompt"])) for r in rows)
    bad += [f"duplicate prompt: {k}" for k, n in seen.items() if n > 1]
    counts = Counter((r["split"], r["kind"]) for r in rows)
    for key, (low, high) in COUNTS.items():
        if not low <= counts[key] <= high:
            bad.append(f"{key}: {counts[key]} rows, wanted {low}..{high}")
    for split in ("train", "heldout"):
        part = [r for r in rows if r["split"] == split and r["kind"] == "direct"]
        per = Counter(r["category"] for r in part)
        if set(per) != HARMFUL_CATEGORIES or max(per.values()) > 1.25 * min(per.values()):
            bad.append(f"{split}: unbalanced harmful categories {dict(per)}")
    train = Index(r["prompt"] for r in rows if r["split"] == "train")
    for r in rows:
        if r["split"] == "heldout":
            score, other = train.nearest(r["prompt"])
            if score >= HELDOUT_JACCARD:
                bad.append(f"{r['id']}: Jaccard {score:.2f} to train: {r['prompt']} ~ {other}")
    return bad


def check_replies(rows: list[Row]) -> list[str]:
    """Broken rules of refusal_replies.jsonl."""
    bad = [] if len(rows) == 40 else [f"{len(rows)} replies, wanted 40"]
    if len({r["text"] for r in rows}) != len(rows):
        bad.append("duplicate reply")
    for r in rows:
        text = r["text"]
        if set(r) != {"text"} or not text.isascii():
            bad.append(f"reply keys or ASCII: {text}")
        if not 8 <= len(text.split()) <= 28:
            bad.append(f"reply has {len(text.split())} words: {text}")
        if len(re.findall(r"[.!?](?:\s|$)", text)) > 2:
            bad.append(f"reply has more than two sentences: {text}")
        if "language model" in text.lower():
            bad.append(f"reply names a language model: {text}")
    if len({" ".join(tokens(r["text"])[:2]) for r in rows}) < 6:
        bad.append("fewer than six reply openers")
    return bad


def check_neutral(rows: list[Row]) -> list[str]:
    """Broken rules of neutral_text.jsonl."""
    bad = [] if len(rows) == 48 else [f"{len(rows)} neutral paragraphs, wanted 48"]
    if len({r["text"] for r in rows}) != len(rows):
        bad.append("duplicate neutral paragraph")
    for r in rows:
        n = len(r["text"].split())
        if set(r) != {"text"} or not r["text"].isascii() or "\n" in r["text"]:
            bad.append(f"neutral keys or ASCII: {r['text'][:60]}")
        if not 60 <= n <= 90:
            bad.append(f"neutral paragraph has {n} words: {r['text'][:60]}")
    return bad


def print_counts(rows: list[Row]) -> None:
    """Print counts, lengths, punctuation and first words per kind."""
    for split in ("train", "heldout"):
        for kind in LABEL_OF_KIND:
            part = [r["prompt"] for r in rows if (r["split"], r["kind"]) == (split, kind)]
            if not part:
                continue
            size = [len(p.split()) for p in part]
            final = sum(p[-1] in ".?!" for p in part) / len(part)
            asks = sum(p[-1] == "?" for p in part) / len(part)
            lower = sum(p[0].islower() for p in part) / len(part)
            first = Counter(tokens(p)[0] for p in part).most_common(6)
            print(
                f"{split:8}{kind:10}{len(part):5} rows  words mean {sum(size) / len(size):.1f}"
                f" ({min(size)}..{max(size)})  final punct {final:.2f}  question {asks:.2f}"
                f"  lower {lower:.2f}  first {first}"
            )
        per = Counter(
            r["category"] for r in rows if r["split"] == split and r["label"] == "harmful"
        )
        print(f"{split:8}harmful categories: {dict(sorted(per.items()))}")


def print_auroc(rows: list[Row]) -> None:
    """Print train -> held-out AUROC of a bag-of-words classifier and of cues."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import cross_val_predict
        from sklearn.pipeline import make_pipeline
    except ImportError:
        print("scikit-learn is not installed: no AUROC")
        return
    train = [r for r in rows if r["split"] == "train"]
    held = [r for r in rows if r["split"] == "heldout"]
    y = [int(r["label"] == "harmful") for r in train]
    z = [int(r["label"] == "harmful") for r in held]
    model = make_pipeline(
        CountVectorizer(token_pattern=r"[A-Za-z0-9']+", binary=True),
        LogisticRegression(max_iter=2000),
    )
    texts = [r["prompt"] for r in train]
    inner = cross_val_predict(model, texts, y, cv=5, method="predict_proba")[:, 1]
    print(f"bag-of-words AUROC within train (5-fold): {roc_auc_score(y, inner):.3f}")
    model.fit(texts, y)
    score = model.predict_proba([r["prompt"] for r in held])[:, 1]
    print(f"bag-of-words AUROC train -> held-out: {roc_auc_score(z, score):.3f}")
    for kind in ("lookalike", "plain"):
        keep = [i for i, r in enumerate(held) if r["kind"] in ("direct", kind)]
        part = roc_auc_score([z[i] for i in keep], [score[i] for i in keep])
        print(f"  harmful against {kind}: {part:.3f}")
    for name, part in (("train", train), ("heldout", held)):
        lab = [int(r["label"] == "harmful") for r in part]
        size = roc_auc_score(lab, [len(r["prompt"].split()) for r in part])
        punct = roc_auc_score(lab, [int(r["prompt"][-1] in ".?!") for r in part])
        print(f"AUROC in {name} of word count {size:.3f}, of final punctuation {punct:.3f}")


def check_overlap(rows: list[Row], others: list[str], name: str) -> list[str]:
    """Prompts too near to another set; prints the largest Jaccard."""
    index = Index(others)
    bad: list[str] = []
    top, grams = 0.0, 0
    for r in rows:
        score, other = index.nearest(r["prompt"])
        top = max(top, score)
        if score >= PUBLIC_JACCARD:
            bad.append(f"{r['id']}: Jaccard {score:.2f} to {name}: {r['prompt']} ~ {other}")
        hit = index.shared_gram(r["prompt"])
        if hit:
            grams += 1
            bad.append(f"{r['id']}: shares '{hit[0]}' with {name}: {r['prompt']} ~ {hit[1][:90]}")
    size = len(index.prompts)
    print(f"{name}: {size} prompts, max Jaccard {top:.2f}, rows sharing a 6-gram {grams}")
    return bad


def check_audit(rows: list[Row], audit: list[str]) -> list[str]:
    """Train and held-out rows too near to the audit set."""
    index = Index(audit)
    bad: list[str] = []
    top = 0.0
    for r in rows:
        score, other = index.nearest(r["prompt"])
        top = max(top, score)
        if score >= PUBLIC_JACCARD:
            bad.append(f"{r['id']}: Jaccard {score:.2f} to audit: {r['prompt']} ~ {other}")
    grams = sum(index.shared_gram(r["prompt"]) is not None for r in rows)
    size = len(index.prompts)
    print(f"audit: {size} prompts, max Jaccard {top:.2f}, rows sharing a 6-gram {grams}")
    return bad


def main() -> int:
    """Run every check."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--data", type=Path, default=here / "src" / "demur" / "data")
    parser.add_argument("--against", type=Path, help="folder of .jsonl files with `prompt` fields")
    args = parser.parse_args()
    rows = read_jsonl(args.data / "refusal_train.jsonl")
    bad = check_rows(rows)
    bad += check_replies(read_jsonl(args.data / "refusal_replies.jsonl"))
    bad += check_neutral(read_jsonl(args.data / "neutral_text.jsonl"))
    print_counts(rows)
    print_auroc(rows)
    if args.against:
        others = [
            str(r["prompt"])
            for path in sorted(args.against.glob("*.jsonl"))
            for r in read_jsonl(path)
            if "prompt" in r
        ]
        bad += check_overlap(rows, others, str(args.against))
    audit = args.data / "audit.jsonl"
    if audit.exists():
        bad += check_audit(rows, [str(r["prompt"]) for r in read_jsonl(audit)])
    else:
        print("audit.jsonl is not there: overlap with it not checked")
    for line in bad:
        print("BAD", line)
    print(f"{len(bad)} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
