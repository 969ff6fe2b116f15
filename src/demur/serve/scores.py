"""Log-probabilities of tokens, and how OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from demur.errors import NonFiniteError

_HALF = "\ufffd"  # What a decoder makes of bytes that are no character yet.
_LEAD = 8  # Tokens in front that are decoded along, for the sake of spaces and half characters.


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a token was where it stands.

    Attributes:
        token: Its id.
        value: Natural logarithm of its probability by the softmax of the logits, whatever the
            temperature; None for a first token, which nothing stands in front of.
        top: The likeliest tokens there with theirs, from the likeliest down.
    """

    token: int
    value: float | None
    top: tuple[tuple[int, float], ...] = ()


def scored(logits: Float[Tensor, "place vocab"], tokens: Sequence[int], count: int) -> list[Score]:
    """Scores of tokens by the logits that they were chosen from.

    Args:
        logits: Of each place.
        tokens: That stand there.
        count: How many of the likeliest tokens are told beside each.

    Raises:
        NonFiniteError: Logits are NaN or infinite.
    """
    values = logits.cpu().double().log_softmax(1)
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            "there are NaN or infinite logits",
            "try `--dtype float32`; the checkpoint may also be damaged",
        )
    best = values.topk(min(count, values.shape[1]), 1)
    rows = zip(tokens, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Score(token, float(values[i, token]), tuple(zip(ids, tops, strict=True)))
        for i, (token, ids, tops) in enumerate(rows)
    ]


class Spelling:
    """Texts of single tokens. To be used by one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._lead = tokenizer("a", add_special_tokens=False)["input_ids"][:1]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens left out."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def behind(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of tokens behind others: a leading space is part of it."""
        lead = before[-_LEAD:]
        front = self.decode(lead).rstrip(_HALF)
        return self.decode([*lead, *ids])[len(front) :]

    def text(self, token: int) -> str:
        """What a token says, or as the vocabulary spells it where that is no text of its own."""
        if token not in self._known:
            options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
            front = self.tokenizer.decode(self._lead, **options)
            own = self.tokenizer.decode([*self._lead, token], **options)[len(front) :]
            if not own or _HALF in own:
                own = self.tokenizer.convert_ids_to_tokens(token) or f"<{token}>"
            self._known[token] = own
        return self._known[token]

    def bytes_of(self, token: int) -> list[int] | None:
        """The same as UTF-8; None for control tokens and for a part of a character."""
        said = self.decode([*self._lead, token])[len(self.decode(self._lead)) :]
        return None if not said or _HALF in said else list(said.encode("utf-8", "replace"))

    def chat(self, scores: Sequence[Score]) -> dict[str, Any]:
        """The field `logprobs` of a chat completion."""

        def one(token: int, value: float | None) -> dict[str, Any]:
            return {
                "token": self.text(token),
                "logprob": value,
                "bytes": self.bytes_of(token),
            }

        content = [
            {**one(own.token, own.value), "top_logprobs": [one(*other) for other in own.top]}
            for own in scores
        ]
        return {"content": content, "refusal": None}

    def completion(self, scores: Sequence[Score], offsets: Offsets) -> dict[str, Any]:
        """The field `logprobs` of a completion."""
        return {
            "tokens": [self.text(one.token) for one in scores],
            "token_logprobs": [one.value for one in scores],
            "top_logprobs": [self._top(one) for one in scores],
            "text_offset": [offsets.next(one.token) for one in scores],
        }

    def _top(self, score: Score) -> dict[str, float] | None:
        if score.value is None:
            return None
        # Where two tokens are written alike, the likelier one stays: clients look for the highest.
        found: dict[str, float] = {}
        for token, value in (*score.top, (score.token, score.value)):
            found.setdefault(self.text(token), value)
        return found


class Offsets:
    """Where the texts of tokens begin, counted in characters; a part of one counts as none."""

    def __init__(self, spelling: Spelling, before: Sequence[int] = ()) -> None:
        self._spelling = spelling
        self._ids = list(before[-_LEAD:])
        self._start, self._read, self._at = 0, len(self._ids), 0

    def next(self, token: int) -> int:
        """Of one more token."""
        found, decode = self._at, self._spelling.decode
        self._ids.append(token)
        before = decode(self._ids[self._start : self._read]).rstrip(_HALF)
        now = decode(self._ids[self._start :])
        if not now.endswith(_HALF) or len(self._ids) - self._read > _LEAD:
            self._at += len(now) - len(before)
            self._start, self._read = self._read, len(self._ids)
        return found
