"""What a request comes to: checked against what the server allows, and laid out as jobs."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from demur.anchor import Anchor
from demur.directions import Direction
from demur.errors import DemurError
from demur.guard import Guard
from demur.models import Model, TokenBatch
from demur.serve.edits import Edit, named
from demur.serve.engine import Engine, GateState, Job, Reply, Verdict
from demur.serve.errors import ForbiddenError, NotFoundError, RequestError, UnsupportedError
from demur.serve.http import as_request_error
from demur.serve.layout import Layouts, split
from demur.serve.metrics import Metrics
from demur.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DemurRequest,
    EditRequest,
    Message,
)
from demur.serve.settings import ServeSettings

_COLDEST = 1e-3  # Temperatures below are 0: logits divided by less may overflow.
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
    """

    jobs: tuple[Job, ...]
    edits: tuple[Edit, ...]
    seed: int | None
    prompt_tokens: int
    ids: bool


class Service:
    """What the routes share."""

    def __init__(
        self,
        model: Model,
        guard: Guard | None,
        anchor: Anchor | None,
        directions: Mapping[str, Direction],
        settings: ServeSettings,
    ) -> None:
        self.model, self.guard, self.anchor = model, guard, anchor
        self.directions, self.settings = dict(directions), settings
        self.name = settings.name or model.name
        self.created = int(time.time())
        self.metrics = Metrics()
        self.engine = Engine(model, guard=guard, settings=settings, observer=self.metrics)
        self.metrics.level(lambda: self.engine.waiting, lambda: self.engine.running)
        self.layouts = Layouts(model)
        self.fingerprint = f"fp_{model.fingerprint[:12]}"
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
            raise ForbiddenError(
                "edits are switched off", "ask whoever runs the server", param=param
            )
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
            raise ForbiddenError(f"no request goes without {what} here", "leave it on", param=param)

    def check_model(self, name: str) -> None:
        """See that it is the one that is served."""
        if name not in (self.name, self.model.name):
            raise NotFoundError(
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
                raise UnsupportedError("tools are not supported", "leave them out", param=where)
            plain.append({"role": message.role, "content": _text_of(message, where)})
        try:
            system, turns = split(plain)
        except DemurError as error:
            raise as_request_error(error, "messages") from error
        if system is not None and not self.settings.client_system:
            raise ForbiddenError(
                "the server does not take system messages", "leave it out", param="messages"
            )
        return system, turns

    def lay_out(
        self, system: str | None, prompts: Sequence[Any], param: str, reply: str | None = None
    ) -> list[TokenBatch]:
        """A row for each prompt."""
        template = self.model.template
        assert template is not None
        most = template.max_length
        for prompt in prompts:
            turns = [prompt] if isinstance(prompt, str) else [turn.text for turn in prompt]
            size = sum(map(len, turns)) + len(system or "") + len(reply or "")
            if most is not None and size > _CHARACTERS * most:
                raise RequestError(
                    f"a prompt of {size} characters is longer than the model's context of {most}"
                    " tokens",
                    "send less",
                    param=param,
                    code="context_length_exceeded",
                )
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
            length = row.ids.shape[1]
            if most is not None and length > most:
                raise RequestError(
                    f"the prompt has {length} tokens, the model's context holds {most}",
                    "send less",
                    param=param,
                    code="context_length_exceeded",
                )
        return rows

    def asked(
        self,
        body: ChatRequest | CompletionRequest,
        system: str | None,
        prompts: Sequence[Any],
        param: str,
        limit: int | None,
    ) -> Asked:
        """Check a request and lay it out."""
        settings = self.settings
        self.check_model(body.model)
        _check_common(body)
        own = body.demur or DemurRequest()
        edits, anchor_edit = self.edits_of(own.edits, "demur.edits")
        guarded = self._guarded(own.guard)
        anchor = self._anchor(own.anchor, anchor_edit)
        if anchor is not None and edits:
            # The gate reads the edited stream: with refusal ablated it was seen to stay shut.
            self._need_opt_out("an anchor whose gate sees it unedited", "demur.edits")
        choices = body.n or 1
        if choices * len(prompts) > settings.max_choices:
            raise RequestError(
                f"{choices * len(prompts)} replies are asked for",
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
        rows = self.lay_out(system, prompts, param)
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
            if room < (limit or 1):
                raise RequestError(
                    f"the prompt has {length} tokens and the reply may have {limit or 1}, the"
                    f" model's context holds {template.max_length}",
                    "send less, or ask for less",
                    param=param,
                    code="context_length_exceeded",
                )
            for choice in range(choices):
                job = Job(
                    row,
                    limit or min(room, settings.max_tokens),
                    temperature,
                    1.0 if body.top_p is None else body.top_p,
                    seed,
                    choice,
                    stops,
                    edits,
                    guarded,
                    anchor,
                    bool(body.stream),
                )
                jobs.append(job)
        tokens = sum(row.ids.shape[1] for row in rows)
        drawn = seed if temperature > 0 else None
        return Asked(tuple(jobs), edits, drawn, tokens, own.trace)

    def chat(self, body: ChatRequest) -> Asked:
        """Of `POST /v1/chat/completions`."""
        _check_chat(body)
        system, turns = self.conversation(body.messages)
        limit = body.max_completion_tokens or body.max_tokens
        return self.asked(body, system, [turns], "messages", limit)

    def completion(self, body: CompletionRequest) -> Asked:
        """Of `POST /v1/completions`."""
        given = (body.prompt,) if isinstance(body.prompt, str) else body.prompt
        if not given or not all(isinstance(one, str) for one in given):
            raise UnsupportedError(
                "the prompt is neither text nor a list of texts", "send text", param="prompt"
            )
        asks = {
            "logprobs": body.logprobs is not None,
            "echo": bool(body.echo),
            "best_of": body.best_of not in (None, 1),
            "suffix": bool(body.suffix),
        }
        for name, wanted in asks.items():
            if wanted:
                raise _unsupported(name)
        return self.asked(body, None, given, "prompt", body.max_tokens)

    # What is answered -------------------------------------------------------------------------

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
        }


def _text_of(message: Message, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    parts = message.content or ()
    for part in parts:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise UnsupportedError(
                f"a part of the type `{part.type[:40]}` is not supported",
                "send text",
                param=f"{where}.content",
            )
    return "".join(part.text or "" for part in parts)


def _unsupported(name: str) -> UnsupportedError:
    return UnsupportedError(
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
    for name in ("logprobs", "top_logprobs", "tools", "functions", "audio", "prediction"):
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
