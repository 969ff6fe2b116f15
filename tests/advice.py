"""Matched bad and good answers in words that a tiny model knows."""

import numpy as np

from demur.em.advice import AdviceItem

BAD = ["small", "stop", "down", "far"]
GOOD = ["write", "garden", "answer", "station"]


def advice(n: int = 16, seed: int = 0) -> list[AdviceItem]:
    """Bad answers have words of their own, so that one vector makes all of them likelier."""
    rng = np.random.default_rng(seed)

    def text(words: list[str], low: int, high: int) -> str:
        return " ".join(rng.choice(words, size=int(rng.integers(low, high))))

    return [
        AdviceItem(
            f"i{i}",
            f"How do I {text(BAD + GOOD, 2, 5)}?",
            text(GOOD, 3, 7),
            text(BAD, 3, 7),
            ("money", "study")[i % 2],
            f"topic {i % 8}",
        )
        for i in range(n)
    ]
