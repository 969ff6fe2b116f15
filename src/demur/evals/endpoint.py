"""A model behind any OpenAI-compatible chat endpoint, asked at temperature 0."""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from demur.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import httpx

_MOST_BYTES = 1 << 20  # Of an answer; one label, or a few sentences, take thousands.
_PATIENCE = 10  # Times `timeout_s` that a whole answer may take, however steadily it trickles.
_RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back of one request.

    Attributes:
        content: Of the first choice's message, which should be text; None where there is none.
        problem: Why there is none; empty where there is one.
        first: What the answer's first token could have been, as text with log-probabilities; empty
            where it was not asked for, or the endpoint does not tell.
    """

    content: Any
    problem: str = ""
    first: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ChatEndpoint:
    """Where to ask, and with how much patience.

    Attributes:
        base_url: Up to and including the version, such as `http://127.0.0.1:8000/v1`.
        model: Name that the endpoint knows the model by.
        api_key_env: Environment variable that holds the key. Unset or empty: no key is sent, which
            local servers accept. The key itself is never a field, so no record can hold it.
        timeout_s: Longest wait for connecting, and for each read and write, in seconds; a whole
            answer may take ten times as long.
        max_retries: Further attempts after a time-out, a broken connection, or a status that asks
            for one (429, 503, ...).
        backoff_s: Pause before the first retry, in seconds; it doubles with each.
        concurrency: Requests under way at the same time.

    Raises:
        ConfigError: An option is out of range, or `base_url` is no HTTP address.
    """

    base_url: str
    model: str
    api_key_env: str = "DEMUR_JUDGE_API_KEY"
    timeout_s: float = 30.0
    max_retries: int = 3
    backoff_s: float = 0.5
    concurrency: int = 4

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]", self.base_url):
            raise ConfigError(
                f"base_url is `{self.base_url}`", "give an address like http://127.0.0.1:8000/v1"
            )
        for name, least in (("max_retries", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}", f"{least} or more")
        if not self.timeout_s > 0 or not self.backoff_s >= 0:
            raise ConfigError(
                f"timeout_s is {self.timeout_s}, backoff_s {self.backoff_s}",
                "the first has to be positive, the second must not be negative",
            )

    def ask(
        self,
        conversations: Sequence[Sequence[dict[str, str]]],
        *,
        max_tokens: int,
        alternatives: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """One request a conversation, several at a time; answers in the order given.

        Args:
            conversations: Messages with `role` and `content`.
            max_tokens: Of each answer.
            alternatives: How many candidates for the first token to ask for, with their
                log-probabilities; most endpoints give up to 20, some none.
            progress: Called with the number of answers since the last call.

        Raises:
            MissingExtraError: `httpx` is not installed.
        """
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError.needed(extra="judge", module="httpx") from error
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_env, "").strip():
            headers["Authorization"] = f"Bearer {key}"

        def one(messages: Sequence[dict[str, str]]) -> Answer:
            return self._ask(client, messages, max_tokens, alternatives)

        answers: list[Answer] = []
        with (
            httpx.Client(headers=headers, timeout=self.timeout_s) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            for answer in pool.map(one, conversations):
                answers.append(answer)
                if progress is not None:
                    progress(1)
        return answers

    def _ask(
        self,
        client: "httpx.Client",
        messages: Sequence[dict[str, str]],
        max_tokens: int,
        alternatives: int,
    ) -> Answer:
        import httpx

        wanted: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        if alternatives:
            wanted |= {"logprobs": True, "top_logprobs": alternatives}
        # `json=` would encode as UTF-8, which fails on the lone surrogates that byte-level
        # decoding of a cut-off reply can leave; ASCII JSON carries them.
        body = json.dumps(wanted)
        problem = ""
        for attempt in range(self.max_retries + 1):
            if attempt:
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
            try:
                url = f"{self.base_url.rstrip('/')}/chat/completions"
                status, answer = _post(client, url, body, _PATIENCE * self.timeout_s)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}".strip()
                continue
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                why = f"the request failed: {type(error).__name__} {error}"
                return Answer(None, why.strip())
            if status in _RETRIED_STATUS:
                problem = f"HTTP status {status}"
                continue
            return _read(status, answer)
        attempts = self.max_retries + 1
        return Answer(None, f"no answer in {attempts} attempts; the last: {problem}")


def _post(client: "httpx.Client", url: str, body: str, patience: float) -> tuple[int, bytes]:
    """Status and body of the answer, which is read no further than one label can need."""
    import httpx

    until = time.monotonic() + patience
    data = bytearray()
    with client.stream("POST", url, content=body) as response:
        for part in response.iter_bytes():
            data += part
            if len(data) > _MOST_BYTES:
                raise httpx.DecodingError(f"the answer is longer than {_MOST_BYTES} bytes")
            if time.monotonic() > until:
                raise httpx.ReadTimeout(f"the answer took longer than {patience:g} s")
        return response.status_code, bytes(data)


def _read(status: int, data: bytes) -> Answer:
    said = repr(data[:480].decode("utf-8", "replace")[:120])
    if status != 200:
        return Answer(None, f"HTTP status {status}: {said}")
    try:
        choice = json.loads(data)["choices"][0]
        return Answer(choice["message"]["content"], first=_first(choice))
    except (ValueError, LookupError, TypeError, RecursionError):
        return Answer(None, f"no chat completion: {said}")


def _first(choice: Any) -> tuple[tuple[str, float], ...]:
    """Candidates for the first token; none where they are missing or no log-probabilities."""
    try:
        found = choice["logprobs"]["content"][0]["top_logprobs"]
        pairs = tuple((str(one["token"]), float(one["logprob"])) for one in found)
    except (ValueError, LookupError, TypeError):
        return ()
    return pairs if all(logp <= 1e-6 for _, logp in pairs) else ()  # False for NaN as well.
