"""The routes: OpenAI's, and what a playground needs beside them."""

import asyncio
import json
import logging
import mimetypes
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from demur.anchor import Anchor
from demur.directions import Direction
from demur.errors import DemurError, MissingExtraError
from demur.guard import Guard
from demur.models import Model
from demur.serve.edits import EDIT_KINDS, named
from demur.serve.engine import Event, Reply
from demur.serve.errors import RequestError, broken, forbidden, not_found
from demur.serve.http import (
    REPORT_POLICY,
    Door,
    as_json,
    as_request_error,
    error_body,
    error_reply,
    handle_errors,
)
from demur.serve.runs import listed, report_of
from demur.serve.schema import (
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    ErrorReply,
    HealthReply,
    InfoReply,
    ModelReply,
    ModelsReply,
    RunsReply,
    TraceReply,
    TraceRequest,
)
from demur.serve.scores import Score
from demur.serve.service import Asked, Service, gate_field, headers_of, plain, verdict_field
from demur.serve.settings import ServeSettings
from demur.serve.trace import Traced, trace
from demur.sites import Span

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from fastapi.staticfiles import StaticFiles
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
except ModuleNotFoundError as error:
    raise MissingExtraError.needed(extra="serve", module="fastapi") from error

log = logging.getLogger("demur.serve")

_ANCHORED = 256  # Most tokens of a reply that is read one by one; nobody else is served meanwhile.
PLAYGROUND = Path(__file__).parent / "playground"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply}
    for status in (400, 401, 403, 404, 405, 413, 422, 429, 500, 503, 504)
}


# Listening ----------------------------------------------------------------------------------------


class _Heard:
    """Events of a request's jobs, on the event loop; leaving the block drops what still runs."""

    def __init__(self, service: Service, asked: Asked, request: Request) -> None:
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._receive = request.receive
        self._left = len(asked.jobs)

        def hear(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._ticket = service.engine.submit(asked.jobs, hear)

    async def __aenter__(self) -> "_Heard":
        self._watch = asyncio.create_task(self._until_gone())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watch.cancel()
        with suppress(asyncio.CancelledError):
            await self._watch
        self._ticket.cancel()

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        await self._events.put(None)

    async def next(self) -> Event | None:
        """None once all jobs have ended, or the client is gone."""
        if not self._left:
            return None
        event = await self._events.get()
        if event is None:
            raise _GoneError
        if event.kind in ("done", "failed"):
            self._left -= 1
        return event


class _GoneError(Exception):
    """The client went away."""


Chunk = Callable[[Event], list[dict[str, Any]]]


class _Streamed(Response):
    """Server-sent events of replies as they are written."""

    def __init__(
        self,
        heard: _Heard,
        first: Event,
        chunks: Chunk,
        closing: Callable[[Mapping[int, Reply]], list[dict[str, Any]]],
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(None, 200, dict(headers), "text/event-stream")
        del self.headers["content-length"]
        self._heard, self._first, self._chunks, self._closing = heard, first, chunks, closing

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """See ASGI."""
        del scope, receive

        async def say(value: dict[str, Any] | str) -> None:
            text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with self._heard as heard:
            await send(start)
            replies: dict[int, Reply] = {}
            event: Event | None = self._first
            try:
                while event is not None:
                    if event.error is not None:
                        await say(error_body(event.error))
                        break
                    for chunk in self._chunks(event):
                        await say(chunk)
                    if event.reply is not None:
                        replies[event.index] = event.reply
                    event = await heard.next()
                else:
                    for chunk in self._closing(replies):
                        await say(chunk)
                    await say("[DONE]")
            except _GoneError:
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


# The application ----------------------------------------------------------------------------------


def create_app(
    model: Model,
    *,
    guard: Guard | None = None,
    anchor: Anchor | None = None,
    directions: Mapping[str, Direction] | None = None,
    settings: ServeSettings | None = None,
    borrowed: Sequence[str] = (),
) -> FastAPI:
    """A server of one model.

    Args:
        model: To be served; nobody else may run it meanwhile.
        guard: Scores every request, unless whoever runs the server lets clients opt out.
        anchor: Holds every reply, likewise.
        directions: That clients may edit and look at, by name.
        settings: Limits and what is allowed.
        borrowed: What `/demur/info` says of directions of another model; of a guard and an anchor
            it is found out here.

    Raises:
        ConfigError: A direction is not of the model's shape.
        MissingExtraError: The extra `serve` is not installed.
    """
    settings = settings if settings is not None else ServeSettings()
    service = Service(model, guard, anchor, directions or {}, settings, borrowed=borrowed)
    engine = service.engine

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(engine.close)

    app = FastAPI(
        title="demur",
        description="OpenAI's protocol, with a guard's scores, an anchor's gate and edits.",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        responses=_ERRORS,
    )
    app.state.engine = engine
    app.state.service = service
    handle_errors(app)
    app.add_middleware(Door, settings=settings, metrics=service.metrics)
    _openai_routes(app, service)
    _demur_routes(app, service)
    if (PLAYGROUND / "index.html").is_file():
        # Browsers run no module that comes as text/plain, which some machines say of `.js`.
        mimetypes.add_type("text/javascript", ".js")
        # Not mounted at /: there it would answer 404 to a wrong method of a route, which is 405.
        app.router.default = StaticFiles(directory=PLAYGROUND, html=True)
    return app


def _openai_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine
    stream: dict[int | str, dict[str, Any]] = {
        200: {
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
            "description": "The reply; with `stream`, server-sent events that end in `[DONE]`.",
            "headers": {
                name: {"schema": {"type": "string"}}
                for name in ("x-demur-guard-score", "x-demur-guard-threshold", "x-demur-gate")
            },
        }
    }

    @app.get("/health", response_model=HealthReply)
    async def health() -> Response:
        """Whether requests are taken."""
        status = "ok" if engine.open else "stopping"
        told = {"borrowed": True} if service.borrowed else {}
        return as_json({"status": status, **told}, 200 if engine.open else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """What is counted, for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def card() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "demur",
        }

    @app.get("/v1/models", response_model=ModelsReply)
    async def models() -> Response:
        """The one model that is served."""
        return as_json({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}", response_model=ModelReply)
    async def one_model(name: str) -> Response:
        """The same by name."""
        service.check_model(name)
        return as_json(card())

    @app.post("/v1/chat/completions", response_model=ChatReply, responses=stream)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Reply to a conversation."""
        _say(service, body)
        asked = await run_in_threadpool(service.chat, body)
        return await _answer(service, asked, request, body, "chat")

    @app.post("/v1/completions", response_model=CompletionReply, responses=stream)
    async def completion(body: CompletionRequest, request: Request) -> Response:
        """Go on with texts. Guard and anchor cannot read them: see `demur.template`."""
        _say(service, body)
        asked = await run_in_threadpool(service.completion, body)
        return await _answer(service, asked, request, body, "text")


def _say(service: Service, body: ChatRequest | CompletionRequest) -> None:
    if service.settings.log_prompts:
        log.info("asked: %s", body.model_dump_json(exclude_none=True))


async def _answer(
    service: Service,
    asked: Asked,
    request: Request,
    body: ChatRequest | CompletionRequest,
    kind: Literal["chat", "text"],
) -> Response:
    heard = _Heard(service, asked, request)
    head: dict[str, Any] = {
        "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}",
        "object": "chat.completion" if kind == "chat" else "text_completion",
        "created": int(time.time()),
        "model": service.name,
        "system_fingerprint": service.fingerprint,
    }
    if body.stream:
        # The first event tells the guard's score, which goes into the headers.
        first = await _first(heard)
        if first is None:
            return Response(status_code=499)
        if first.error is not None:
            heard._ticket.cancel()
            return error_reply(first.error)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return _streamed(service, asked, heard, first, head=head, kind=kind, usage=usage)
    replies: dict[int, Reply] = {}
    try:
        async with heard:
            while (event := await heard.next()) is not None:
                if event.error is not None:
                    return error_reply(event.error)
                if event.reply is not None:
                    replies[event.index] = event.reply
    except _GoneError:
        return Response(status_code=499)
    ordered = [replies[i] for i in range(len(asked.jobs))]
    fields = [service.demur(asked, reply) for reply in ordered]

    def logprobs(index: int) -> dict[str, Any] | None:
        scores = ordered[index].scores
        if scores is None:
            return None
        if kind == "chat":
            return service.chat_scores(scores)
        whole = (*(ordered[index].read or ()), *scores)
        return service.text_scores(whole, service.offsets(asked.jobs[index]))

    choices = []
    for index, (reply, field) in enumerate(zip(ordered, fields, strict=True)):
        choice: dict[str, Any] = {"index": index}
        if kind == "chat":
            choice["message"] = {"role": "assistant", "content": reply.text, "refusal": None}
        else:
            choice["text"] = (asked.echoes[index] or "") + reply.text
        choice["logprobs"] = await run_in_threadpool(logprobs, index)
        choice |= {"finish_reason": reply.finish, "demur": field}
        choices.append(choice)
    whole = {**head, "choices": choices, "usage": _usage(asked, ordered), "demur": fields[0]}
    return as_json(whole, headers=headers_of(ordered[0].verdict, ordered[0].gate))


async def _first(heard: _Heard) -> Event | None:
    try:
        async with _Watching(heard):
            return await heard.next()
    except _GoneError:
        heard._ticket.cancel()
        return None
    except asyncio.CancelledError:
        heard._ticket.cancel()
        raise


class _Watching:
    """Looks for a client's leaving, without dropping the jobs at the end."""

    def __init__(self, heard: _Heard) -> None:
        self._heard = heard

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._heard._until_gone())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


def _usage(asked: Asked, replies: Sequence[Reply]) -> dict[str, int]:
    completion = sum(len(reply.ids) for reply in replies)
    return {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": asked.prompt_tokens + completion,
    }


def _streamed(
    service: Service,
    asked: Asked,
    heard: _Heard,
    first: Event,
    *,
    head: dict[str, Any],
    kind: Literal["chat", "text"],
    usage: bool,
) -> Response:
    head = {**head, "object": "chat.completion.chunk" if kind == "chat" else "text_completion"}
    more: dict[str, Any] = {"usage": None} if usage else {}
    gates: dict[int, str] = {}
    spoken: set[int] = set()
    offsets = [service.offsets(job) for job in asked.jobs]

    def logprobs(index: int, scores: Sequence[Score]) -> dict[str, Any] | None:
        if not scores:
            return None
        if kind == "chat":
            return service.chat_scores(scores)
        return service.text_scores(scores, offsets[index])

    def chunk(
        index: int,
        text: str,
        *,
        role: bool = False,
        finish: str | None = None,
        scores: Sequence[Score] = (),
        **extra: Any,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        if kind == "chat":
            delta = {"role": "assistant"} if role else {}
            choice["delta"] = {**delta, "content": text} if text or role or scores else delta
        else:
            choice["text"] = text
        choice |= {"logprobs": logprobs(index, scores), "finish_reason": finish}
        return {**head, "choices": [choice], **more, **extra}

    def chunks(event: Event) -> list[dict[str, Any]]:
        if event.kind == "begun":
            gates[event.index] = event.gate.gate
            own = {"guard": verdict_field(event.verdict), "anchor": gate_field(event.gate)}
            own = {"index": event.index, **own}
            echo = asked.echoes[event.index] or ""
            return [chunk(event.index, echo, role=True, scores=event.scores, demur=own)]
        if event.reply is not None:
            own = {"index": event.index, **service.demur(asked, event.reply)}
            return [chunk(event.index, "", finish=event.reply.finish, demur=own)]
        extra: dict[str, Any] = {}
        if event.kind == "anew" or event.gate.gate != gates.get(event.index):
            gates[event.index] = event.gate.gate
            anew = event.kind == "anew"
            own = {"index": event.index, "anew": anew, "anchor": gate_field(event.gate)}
            extra["demur"] = own
        text = event.text
        if event.kind == "anew" and event.index in spoken:
            text = "\n\n"  # What was said cannot be taken back; what follows stands apart.
        spoken.add(event.index)
        return [chunk(event.index, text, scores=event.scores, **extra)]

    def closing(replies: Mapping[int, Reply]) -> list[dict[str, Any]]:
        if not usage:
            return []
        counts = _usage(asked, list(replies.values()))
        return [{**head, "choices": [], "usage": counts}]

    headers = {**headers_of(first.verdict, first.gate), "x-accel-buffering": "no"}
    return _Streamed(heard, first, chunks, closing, headers)


def _demur_routes(app: FastAPI, service: Service) -> None:
    model, settings, engine = service.model, service.settings, service.engine
    template = model.template
    assert template is not None

    @app.get("/demur/info", response_model=InfoReply)
    async def info() -> Response:
        """What is served, and what a request may ask for."""
        guard, anchor = service.guard, service.anchor
        value = {
            "model": service.name,
            "loaded": repr(model),
            "fingerprint": service.fingerprint,
            "borrowed": service.borrowed,
            "family": model.family.name,
            "layers": model.n_layers,
            "d_model": model.d_model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "template": {
                "kind": template.kind,
                "hash": template.hash,
                "system": template.system,
                "positions": [asdict(one) for one in template.positions],
            },
            "directions": [
                {
                    "name": name,
                    "site": str(one.site),
                    "position": one.position,
                    "norm": one.norm,
                    "recipe": one.recipe,
                }
                for name, one in service.directions.items()
            ],
            "edit_kinds": [
                *(EDIT_KINDS if settings.edits and service.directions else ()),
                *(("anchor",) if anchor is not None else ()),
            ],
            "at": ["all", "instruction", "post_instruction", "response"],
            "guard": None if guard is None else _guard_card(guard),
            "anchor": None if anchor is None else _anchor_card(anchor),
            "limits": {
                **settings.model_dump(
                    include={
                        "batch",
                        "queue",
                        "max_tokens",
                        "max_choices",
                        "max_messages",
                        "max_stops",
                        "max_edits",
                        "timeout",
                        "body_bytes",
                        "temperature",
                        "opt_out",
                        "raw",
                        "edits",
                        "trace",
                        "client_system",
                        "on_flag",
                    }
                ),
                "context": template.max_length,
            },
            "runs": settings.runs is not None,
        }
        return as_json(plain(value))

    @app.post("/demur/trace", response_model=TraceReply)
    async def read(body: TraceRequest) -> Response:
        """Project a conversation on a direction, by token and site."""
        if not settings.trace:
            raise forbidden("reading is switched off", "ask whoever runs the server")

        def prepared() -> tuple[Callable[[Model], Traced], Direction, list[str]]:
            system, turns = service.conversation(body.messages)
            edits, anchor = service.traced(body)
            try:
                direction = named(service.directions, body.direction)
            except DemurError as error:
                raise as_request_error(error, "direction") from error
            row = service.lay_out(system, [turns], "messages", body.reply)[0]
            reply = row.spans.get(Span.RESPONSE)
            if anchor is not None and reply is not None and int(reply.sum()) > _ANCHORED:
                raise RequestError(
                    f"the reply has {int(reply.sum())} tokens, of {_ANCHORED} that are read under"
                    " an anchor",
                    'send less of it, or `"anchor": false`',
                    param="reply",
                )
            with engine.tokenizing:
                texts = [template.tokenizer.decode([one]) for one in row.ids[0].tolist()]
            more: dict[str, Any] = {"null": body.null, "seed": body.seed}
            work = partial(
                trace, batch=row, direction=direction, edits=edits, anchor=anchor, **more
            )
            return work, direction, texts

        own, direction, texts = await run_in_threadpool(prepared)
        work = engine.call(own)
        try:
            async with asyncio.timeout(settings.timeout):
                found = await asyncio.wrap_future(work)
        except TimeoutError as error:
            raise broken("the reading took too long", "try again") from error
        value = {
            "direction": body.direction,
            "site": str(direction.site),
            "norm": direction.norm,
            "anchor": gate_field(found.gate),
            "tokens": [
                {"text": text, "span": span, "t_inst": i == found.t_inst}
                for i, (text, span) in enumerate(zip(texts, found.spans, strict=True))
            ],
            "sites": found.sites,
            "values": [[round(one, 5) for one in own] for own in found.values.tolist()],
            "null": {
                "kind": body.null,
                "seed": body.seed,
                "low": found.low.tolist(),
                "high": found.high.tolist(),
            },
        }
        return as_json(value)

    @app.get("/demur/runs", response_model=RunsReply)
    async def runs() -> Response:
        """Audits in the folder that the server shows."""
        found = await run_in_threadpool(listed, settings.runs)
        return as_json({"runs": found})

    @app.get("/demur/runs/{name}/report", response_class=Response)
    async def report(name: str) -> Response:
        """An audit's report, as a page that may run nothing and load nothing."""
        page = await run_in_threadpool(report_of, settings.runs, name)
        if page is None:
            raise not_found("there is no report of that name", "see /demur/runs")
        headers = {"content-security-policy": REPORT_POLICY}
        return Response(page, headers=headers, media_type="text/html; charset=utf-8")


def _guard_card(guard: Guard) -> dict[str, Any]:
    return {
        "site": str(guard.site),
        "reads": [{"name": one.name, "admitted": one.admitted} for one in guard.reads],
        "threshold": asdict(guard.threshold),
        "strata": {name: asdict(one) for name, one in guard.strata.items()},
        "about": dict(guard.about),
    }


def _anchor_card(anchor: Anchor) -> dict[str, Any]:
    gate = anchor.gate
    return {
        "sites": [str(one.site) for one in anchor.actuators],
        "strength": anchor.strength,
        "action": anchor.action,
        "fresh_turn": anchor.fresh_turn,
        "gate": None
        if gate is None
        else {
            "site": str(gate.detector.site),
            "reads": gate.reads,
            "threshold": asdict(gate.threshold),
            "every": gate.every,
        },
        "about": dict(anchor.about),
    }
