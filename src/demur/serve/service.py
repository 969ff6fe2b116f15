"""What a request comes to: checked against what the server allows, and laid out as jobs."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch

from demur.anchor import Anchor
from demur.directions import Direction
from demur.errors import DemurError
from demur.guard import Guard
from demur.models import Model, TokenBatch
from demur.serve.edits import Edit, named
from demur.serve.engine import Engine, GateState, Job, Reply, Verdict
from demur.serve.errors import RequestError, forbidden, not_found
from demur.serve.http import as_request_error
from demur.serve.layout import Layouts, split
from demur.serve.metrics import Metrics
from demur.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DemurRequest,
    EditRequest,
    Message,
    TraceRequest,
)
from demur.serve.scores import Offsets, Score
from demur.serve.settings import ServeSettings

_COLDEST = 1e-3  # Temperatures below are 0: logits divided by less may overflow.
_USUAL = 16  # Tokens of a completion that asks for no number, as OpenAI's.
_CHARACTERS = 64  # A text with more of them to a token of the context is not even tokenised.


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request comes to.

    Attributes:
        jobs: `n` for each prompt.
        edits: That are in force, for the reply.
        seed: Of the draws; None of greedy replies.
        prompt_tokens: Of all prompts.
        ids: Whether token ids are wanted.
        echoes: By job, the prompt that its text begins with; None for no such thing.
        raw: Whether no chat template laid the prompts out.
    """

    jobs: tuple[Job, ...]
    edits: tuple[Edit, ...]
    seed: int | None
    prompt_tokens: int
    ids: bool
    echoes: tuple[str | None, ...]
    raw: bool


class Service:
    """What the routes share."""

    def __init__(
        self,
        model: Model,
        guard: Guard | None,
        anchor: Anchor | None,
        directions: Mapping[str, Direction],
        settings: ServeSettings,
        *,
        borrowed: Sequence[str] = (),
    ) -> None:
        self.model, self.guard, self.anchor = model, guard, anchor
        self.directions, self.settings = dict(directions), settings
        self.name = settings.name or model.name
        self.created = int(time.time())
        self.metrics = Metrics()
        self.engine = Engine(model, guard=guard, settings=settings, observer=self.metrics)
        self.metrics.level(lambda: self.engine.waiting, lambda: self.engine.running)
        self.layouts = Layouts(model)
        self.context = self.layouts.template.max_length
        self.fingerprint = f"fp_{model.fingerprint[:12]}"
        self.borrowed = list(borrowed)
        for one in (guard, anchor):
            self.borrowed += () if one is None else one.borrowed(model)
        if self.borrowed:  # Every reply carries it.
            self.fingerprint += "-borrowed"
        for name, direction in self.directions.items():  # Of the wrong width: not to be served.
            Edit(name, direction, "ablate").acts(model)

    # What may be asked ------------------------------------------------------------------------

    def edits_of(
        self, asked: Sequence[EditRequest], param: str
    ) -> tuple[tuple[Edit, ...], EditRequest | None]:
        """Edits of directions, and the anchor's own if there is one."""
        if len(asked) > self.settings.max_edits:
            raise RequestError(
                f"there are {len(asked)} edits",
                f"give {self.settings.max_edits} at most",
                param=param,
            )
        own = [one for one in asked if one.kind != "anchor"]
        if own and not self.settings.edits:
            raise forbidden("edits are switched off", "ask whoever runs the server", param=param)
        edits = []
        try:
            for one in own:
                assert one.kind != "anchor"
                if one.direction is None:
                    raise RequestError("an edit names no direction", "see /demur/info", param=param)
                strength = {"clamp": 0.0}.get(one.kind, 1.0)
                edit = Edit(
                    one.direction,
                    named(self.directions, one.direction),
                    one.kind,
                    strength if one.strength is None else one.strength,
                    one.layers,
                    one.at,
                )
                edit.acts(self.model)
                edits.append(edit)
        except DemurError as error:
            raise as_request_error(error, param) from error
        return tuple(edits), next((one for one in asked if one.kind == "anchor"), None)

    def _anchor(self, wanted: bool | None, edit: EditRequest | None) -> Anchor | None:
        param = "demur.anchor" if edit is None else "demur.edits"
        if self.anchor is None:
            if wanted or edit is not None:
                raise RequestError(
                    "no anchor is loaded", "start the server with `--anchor FILE`", param=param
                )
            return None
        if wanted is False and edit is None:
            self._need_opt_out("the anchor", param)
            return None
        strength = None if edit is None else edit.strength
        if strength is None or strength == self.anchor.strength:
            return self.anchor
        if strength < self.anchor.strength:
            self._need_opt_out("the anchor at its strength", param)
        return replace(self.anchor, strength=strength)

    def traced(self, body: TraceRequest) -> tuple[tuple[Edit, ...], Anchor | None]:
        """What is in force while a row is read; no text comes of it, so nobody need allow it."""
        edits, edit = self.edits_of(body.edits, "edits")
        if self.anchor is None:
            return edits, self._anchor(body.anchor, edit)
        if body.anchor is False and edit is None:
            return edits, None
        strength = None if edit is None else edit.strength
        return edits, self.anchor if strength is None else replace(self.anchor, strength=strength)

    def _guarded(self, wanted: bool | None) -> bool:
        if self.guard is None:
            if wanted:
                raise RequestError(
                    "no guard is loaded",
                    "start the server with `--guard FILE`",
                    param="demur.guard",
                )
            return False
        if wanted is False:
            self._need_opt_out("the guard", "demur.guard")
            return False
        return True

    def _need_opt_out(self, what: str, param: str) -> None:
        if not self.settings.opt_out:
            raise forbidden(f"no request goes without {what} here", "leave it on", param=param)

    def check_model(self, name: str) -> None:
        """See that it is the one that is served."""
        if name not in (self.name, self.model.name):
            raise not_found(
                f"The model `{name[:100]}` does not exist",
                f"the one that is served is `{self.name}`",
                param="model",
                code="model_not_found",
            )

    def conversation(self, messages: Sequence[Message]) -> tuple[str | None, tuple[Any, ...]]:
        """System message and turns."""
        if not 1 <= len(messages) <= self.settings.max_messages:
            raise RequestError(
                f"there are {len(messages)} messages",
                f"send 1 to {self.settings.max_messages}",
                param="messages",
            )
        plain = []
        for number, message in enumerate(messages):
            where = f"messages.{number}"
            if message.role in ("tool", "function") or message.tool_calls or message.function_call:
                raise RequestError("tools are not supported", "leave them out", param=where)
            plain.append({"role": message.role, "content": _text_of(message, where)})
        try:
            system, turns = split(plain)
        except DemurError as error:
            raise as_request_error(error, "messages") from error
        if system is not None and not self.settings.client_system:
            raise forbidden(
                "the server does not take system messages", "leave it out", param="messages"
            )
        return system, turns

    def lay_out(
        self, system: str | None, prompts: Sequence[Any], param: str, reply: str | None = None
    ) -> list[TokenBatch]:
        """A row for each prompt."""
        for prompt in prompts:
            turns = [prompt] if isinstance(prompt, str) else [turn.text for turn in prompt]
            size = sum(map(len, turns)) + len(system or "") + len(reply or "")
            self._check_size(size, param)
        try:
            with self.engine.tokenizing:
                layout = self.layouts.of(system)
                rows = [layout.encode([one], pad_id=self.model.pad_id) for one in prompts]
                if reply:
                    ids = layout.reply_ids(reply)
                    rows = [one.with_replies([ids], pad_id=self.model.pad_id) for one in rows]
        except DemurError as error:
            raise as_request_error(error, param) from error
        for row in rows:
            self._check_length(row.ids.shape[1], param)
        return rows

    def asked(
        self,
        body: ChatRequest | CompletionRequest,
        lay: Callable[[], list[TokenBatch]],
        *,
        count: int,
        param: str,
        limit: int | None,
        usual: int | None = None,
        raw: bool = False,
    ) -> Asked:
        """Check a request and lay it out.

        Args:
            body: What was asked for.
            lay: Lays out the prompts, once all else is known to be in order.
            count: How many prompts there are.
            param: Where they stand.
            limit: Most tokens of a reply, as the client gave it.
            usual: The same where it gave none; as many as there may be if left out.
            raw: Whether no chat template lays them out.
        """
        settings = self.settings
        self.check_model(body.model)
        _check_common(body)
        own = body.demur or DemurRequest()
        edits, anchor_edit = self.edits_of(own.edits, "demur.edits")
        if raw:
            self._check_raw(own, edits, anchor_edit)
            guarded, anchor = False, None
        else:
            guarded = self._guarded(own.guard)
            anchor = self._anchor(own.anchor, anchor_edit)
        if anchor is not None and edits:
            # The gate reads the edited stream: with refusal ablated it was seen to stay shut.
            self._need_opt_out("an anchor whose gate sees it unedited", "demur.edits")
        choices = body.n or 1
        if choices * count > settings.max_choices:
            raise RequestError(
                f"{choices * count} replies are asked for",
                f"ask for {settings.max_choices} at most",
                param="n",
            )
        stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if len(stops) > settings.max_stops or not all(0 < len(one) <= 256 for one in stops):
            raise RequestError(
                "`stop` holds too many texts, or an empty or very long one",
                f"give {settings.max_stops} at most, of 1 to 256 characters",
                param="stop",
            )
        if limit is not None and limit > settings.max_tokens:
            raise RequestError(
                f"max_tokens is too large: {limit}",
                f"ask for {settings.max_tokens} at most",
                param="max_tokens",
            )
        rows = lay()
        template = self.model.template
        assert template is not None
        temperature = settings.temperature if body.temperature is None else body.temperature
        temperature = 0.0 if temperature < _COLDEST else temperature
        seed = secrets.randbits(31) if body.seed is None else body.seed
        jobs = []
        for row in rows:
            length = row.ids.shape[1]
            room = settings.max_tokens
            if template.max_length is not None:
                room = template.max_length - length
            least = 1 if limit is None else limit
            if room < least:
                raise RequestError(
                    f"the prompt has {length} tokens and the reply may have {least}, the"
                    f" model's context holds {template.max_length}",
                    "send less, or ask for less",
                    param=param,
                    code="context_length_exceeded",
                )
            most = min(room, settings.max_tokens, settings.max_tokens if usual is None else usual)
            for choice in range(choices):
                job = Job(
                    row,
                    most if limit is None else limit,
                    temperature,
                    1.0 if body.top_p is None else body.top_p,
                    seed,
                    choice,
                    stops,
                    edits,
                    guarded,
                    anchor,
                    bool(body.stream),
                    raw,
                    _scores_of(body),
                    isinstance(body, CompletionRequest) and bool(body.echo),
                )
                jobs.append(job)
        tokens = sum(row.ids.shape[1] for row in rows)
        drawn = seed if temperature > 0 else None
        echoes = (None,) * len(jobs)
        return Asked(tuple(jobs), edits, drawn, tokens, own.trace, echoes, raw)

    def _check_raw(
        self, own: DemurRequest, edits: Sequence[Edit], anchor_edit: EditRequest | None
    ) -> None:
        """See that nobody takes a raw prompt for one that was read."""
        template = 'send `"demur": {"template": true}` to have it laid out as one user message'
        loaded = {"guard": self.guard is not None, "anchor": self.anchor is not None}
        for name in loaded:
            if getattr(own, name) or (name == "anchor" and anchor_edit is not None):
                raise RequestError(
                    f"the {name} works at the chat template's positions, which a raw prompt does "
                    "not have",
                    template,
                    param=f"demur.{name}",
                )
        for edit in edits:
            if edit.at in ("instruction", "post_instruction"):
                raise RequestError(
                    f"a raw prompt has no `{edit.at}`", template, param="demur.edits"
                )
        names = [name for name, there in loaded.items() if there]
        waived = self.settings.opt_out and all(getattr(own, name) is False for name in names)
        if names and not (self.settings.raw or waived):
            raise forbidden(
                f"a raw prompt has no place where the {' and the '.join(names)} could read it",
                f"{template}; whoever runs the server may allow raw prompts",
                param="prompt",
                code="raw_prompt",
            )

    def chat(self, body: ChatRequest) -> Asked:
        """Of `POST /v1/chat/completions`."""
        _check_chat(body)
        system, turns = self.conversation(body.messages)
        limit = body.max_completion_tokens or body.max_tokens
        return self.asked(
            body,
            lambda: self.lay_out(system, [turns], "messages"),
            count=1,
            param="messages",
            limit=limit,
        )

    def completion(self, body: CompletionRequest) -> Asked:
        """Of `POST /v1/completions`."""
        for name, wanted in (("best_of", body.best_of not in (None, 1)), ("suffix", body.suffix)):
            if wanted:
                raise _unsupported(name)
        given = _prompts_of(body)
        if body.max_tokens == 0 and not body.echo:
            raise RequestError(
                "`max_tokens` is 0, and nothing is echoed", "send `echo` too", param="max_tokens"
            )
        raw = body.demur is None or not body.demur.template
        if not raw:
            if body.echo:
                raise RequestError(
                    "what a chat template lays out is not echoed",
                    "leave `echo` or `demur.template` out",
                    param="echo",
                )
            if not all(isinstance(one, str) for one in given):
                raise RequestError(
                    "a chat template lays out text, not token ids", "send text", param="prompt"
                )

        def lay() -> list[TokenBatch]:
            return self.raw_rows(given) if raw else self.lay_out(None, given, "prompt")

        asked = self.asked(
            body,
            lay,
            count=len(given),
            param="prompt",
            limit=body.max_tokens,
            usual=_USUAL,
            raw=raw,
        )
        if not body.echo:
            return asked
        with self.engine.tokenizing:
            decode = self.engine.spelling.decode
            texts = [one if isinstance(one, str) else decode(one) for one in given]
        each = len(asked.jobs) // len(given)
        return replace(asked, echoes=tuple(text for text in texts for _ in range(each)))

    def raw_rows(self, prompts: Sequence[str | tuple[int, ...]]) -> list[TokenBatch]:
        """A row for each prompt that no chat template lays out."""
        template = self.model.template
        assert template is not None
        words = len(self.model.hf.get_input_embeddings().weight)
        rows = []
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_size(len(prompt), "prompt")
                try:
                    with self.engine.tokenizing:
                        ids = template.raw_ids(prompt)
                except DemurError as error:
                    raise as_request_error(error, "prompt") from error
            else:
                ids = list(prompt)
                if not ids or max(ids) >= words:
                    raise RequestError(
                        f"a prompt holds no token ids, or one that is not below {words}",
                        "take ids of the model's own tokenizer",
                        param="prompt",
                    )
                if fake := template.fake_ids(ids):
                    raise RequestError(
                        f"a prompt holds the id {fake[0]} of a control token",
                        "send messages to /v1/chat/completions: only the template writes them",
                        param="prompt",
                    )
            self._check_length(len(ids), "prompt")
            rows.append(TokenBatch.of_ids(torch.tensor([ids])))
        return rows

    def _check_size(self, size: int, param: str) -> None:
        """See that a text is short enough to be tokenised at all."""
        most = self.context
        if most is not None and size > _CHARACTERS * most:
            raise RequestError(
                f"a prompt of {size} characters is longer than the model's context of {most}"
                " tokens",
                "send less",
                param=param,
                code="context_length_exceeded",
            )

    def _check_length(self, length: int, param: str) -> None:
        most = self.context
        if most is not None and length > most:
            raise RequestError(
                f"the prompt has {length} tokens, the model's context holds {most}",
                "send less",
                param=param,
                code="context_length_exceeded",
            )

    # What is answered -------------------------------------------------------------------------

    def chat_scores(self, scores: Sequence[Score]) -> dict[str, Any]:
        """The field `logprobs`, without the token that ended the reply."""
        stops = set(self.model.stop_ids)
        with self.engine.tokenizing:
            return self.engine.spelling.chat([one for one in scores if one.token not in stops])

    def text_scores(self, scores: Sequence[Score], offsets: Offsets) -> dict[str, Any]:
        """The same of a completion."""
        with self.engine.tokenizing:
            return self.engine.spelling.completion(scores, offsets)

    def offsets(self, job: Job) -> Offsets:
        """Of a completion's tokens, from the first one of its text on."""
        before = job.prompt.ids[0].tolist() if job.raw and not job.echo else ()
        return Offsets(self.engine.spelling, before)

    def demur(self, asked: Asked, reply: Reply) -> dict[str, Any]:
        """The field of that name."""
        return {
            "guard": verdict_field(reply.verdict),
            "anchor": gate_field(reply.gate),
            "edits": [
                {
                    "direction": edit.name,
                    "kind": edit.kind,
                    "strength": edit.strength,
                    "layers": edit.layers,
                    "at": edit.at,
                    "applied": count,
                }
                for edit, count in zip(asked.edits, reply.edits, strict=True)
            ],
            "seed": asked.seed,
            "ids": list(reply.ids) if asked.ids else None,
            "template": not asked.raw,
        }


def _text_of(message: Message, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    parts = message.content or ()
    for part in parts:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise RequestError(
                f"a part of the type `{part.type[:40]}` is not supported",
                "send text",
                param=f"{where}.content",
            )
    return "".join(part.text or "" for part in parts)


def _prompts_of(body: CompletionRequest) -> tuple[str | tuple[int, ...], ...]:
    given = body.prompt
    if isinstance(given, str):
        return (given,)
    if not given:
        raise RequestError("there is no prompt", "send text or token ids", param="prompt")
    if all(isinstance(one, int) for one in given):
        return (cast(tuple[int, ...], given),)
    return cast(tuple[str | tuple[int, ...], ...], given)


def _scores_of(body: ChatRequest | CompletionRequest) -> int | None:
    """How many of the likeliest tokens are told beside each; None for no scores."""
    if isinstance(body, CompletionRequest):
        return body.logprobs
    return (body.top_logprobs or 0) if body.logprobs else None


def _unsupported(name: str) -> RequestError:
    return RequestError(
        f"`{name}` is not supported", "leave it out", param=name, code="unsupported_parameter"
    )


def _check_common(body: ChatRequest | CompletionRequest) -> None:
    for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
        if getattr(body, name):
            raise _unsupported(name)
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "`stream_options` is for streamed replies", "leave it out", param="stream_options"
        )


def _check_chat(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(
            "`top_logprobs` goes with `logprobs`", "send `logprobs` too", param="top_logprobs"
        )
    for name in ("tools", "functions", "audio", "prediction"):
        if getattr(body, name):
            raise _unsupported(name)
    if body.tool_choice not in (None, "none", "auto") or body.function_call not in (
        None,
        "none",
        "auto",
    ):
        raise _unsupported("tool_choice" if body.tool_choice else "function_call")
    if body.response_format is not None and body.response_format != {"type": "text"}:
        raise _unsupported("response_format")
    if body.modalities is not None and body.modalities != ("text",):
        raise _unsupported("modalities")
    for name in ("reasoning_effort", "verbosity", "web_search_options"):
        if getattr(body, name) is not None:
            raise _unsupported(name)


def finite(value: float | None) -> float | None:
    """What JSON can hold of a number."""
    return value if value is not None and math.isfinite(value) else None


def verdict_field(verdict: Verdict | None) -> dict[str, Any] | None:
    """The field `guard`."""
    if verdict is None:
        return None
    return {**asdict(verdict), "threshold": finite(verdict.threshold)}


def gate_field(gate: GateState) -> dict[str, Any]:
    """The field `anchor`."""
    return {**asdict(gate), "score": finite(gate.score), "threshold": finite(gate.threshold)}


def headers_of(verdict: Verdict | None, gate: GateState) -> dict[str, str]:
    """Guard and gate as headers."""
    headers = {"x-demur-gate": gate.gate}
    if verdict is not None:
        headers["x-demur-guard-score"] = f"{verdict.score:.6g}"
        headers["x-demur-guard-threshold"] = f"{verdict.threshold:.6g}"
        headers["x-demur-guard-flagged"] = str(verdict.flagged).lower()
    return headers


def plain(value: Any) -> Any:
    """What JSON can hold: infinities become null."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if isinstance(value, str | int | bool | None) else str(value)
