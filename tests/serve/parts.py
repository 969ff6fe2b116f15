"""What the tests of the server share."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
from tests.tiny import tiny_model

from demur.anchor import N_REPLY_PLACES, Anchor, Floor, Gate, ReplyRead
from demur.directions import Direction
from demur.guard import Fisher, Guard, Rarity, Read, Threshold
from demur.serve import ServeSettings
from demur.serve.errors import RequestError
from demur.sites import Site

SITE = Site(1, "resid_pre")
LINE = Rarity(torch.linspace(-100.0, 100.0, 91, dtype=torch.float64), 1e9)  # Keeps the order.
_TEXT = "the tree stands in a small garden and is far from here so write it down then stop"
WORDS = _TEXT.split()
PROMPTS = [" ".join(WORDS[i % 5 : i % 5 + 1 + (7 * i) % 13]) + "?" for i in range(16)]


def drawn(size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direction_of(model, seed=1, site=SITE, length=3.0):
    unit = torch.nn.functional.normalize(drawn(model.d_model, seed), dim=0)
    return Direction.from_vector(length * unit, site=site, position=-1, recipe="test")


def guard_of(model, threshold=0.0):
    """Scores lie between 0.5 and 0.7 on short prompts."""
    weight = drawn(model.d_model, 0)
    reads = tuple(
        Read(name, Fisher(weight, 0.0, 1.0), LINE, name == "span") for name in ("t_inst", "span")
    )
    return Guard(SITE, reads, 4, 2, Threshold(threshold, 0.05, 20, 1, 0.1), {}, {})


def anchor_of(model, threshold, *, header=False, **more):
    places = model.template.n_post + N_REPLY_PLACES
    zero = torch.zeros(places, dtype=torch.float64)
    axis = torch.nn.functional.normalize(drawn(model.d_model, 3), dim=0)
    floors = tuple(
        Floor(Site(layer, "resid_pre"), axis, axis, zero, zero + 5.0, zero - 100.0)
        for layer in (1, 2)
    )
    fisher = Fisher(drawn(model.d_model, 5), 0.0, 1.0)
    names = ("reply", "header") if header else ("reply",)
    replies = tuple(ReplyRead(name, fisher, LINE, True) for name in names)
    own = Threshold(threshold, 0.05, 20, 1, 0.1)
    return Anchor(Gate(guard_of(model), own, replies, every=6, least=4), floors, **more)


def app_of(model=None, *, guard=None, anchor=None, directions=None, **settings):
    from demur.serve.app import create_app

    model = model if model is not None else tiny_model()
    return create_app(
        model,
        guard=guard,
        anchor=anchor,
        directions=directions or {},
        settings=ServeSettings(**settings),
    )


class Asked:
    """An application without a network."""

    def __init__(self, app):
        self.app = app
        self.engine = app.state.engine.start()

    def __call__(self, method, path, **options):
        async def ask():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as own:
                return await own.request(method, path, **options)

        return asyncio.run(ask())

    def chat(self, text="a tree", *, headers=None, **body):
        whole = {"model": "tiny-llama", "max_tokens": 6, "temperature": 0, **body}
        whole.setdefault("messages", [{"role": "user", "content": text}])
        return self("POST", "/v1/chat/completions", json=whole, headers=headers)


@contextmanager
def asked_of(app):
    own = Asked(app)
    try:
        yield own
    finally:
        own.engine.close(0)


def asked(*args, **options):
    return asked_of(app_of(*args, **options))


@contextmanager
def refused(status, match=None):
    """The block ends in an error of that status."""
    with pytest.raises(RequestError, match=match) as found:
        yield found
    assert found.value.status == status


def slowed(engine, seconds):
    own = engine._step

    def step():
        time.sleep(seconds)
        own()

    engine._step = step
    return engine


def held_up(engine):
    """It writes no token until the event is set."""
    own, go = engine._step, threading.Event()

    def step():
        assert go.wait(60)
        own()

    engine._step = step
    return go


@contextmanager
def served(app):
    """An application over HTTP on loopback; yields its address."""
    import socket

    from demur.serve.run import serve

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread = threading.Thread(target=serve, args=(app,), kwargs={"sock": sock})
        thread.start()
        until(lambda: app.state.engine.open)
        until(lambda: getattr(app.state.server, "started", False))
        try:
            yield address
        finally:
            app.state.server.should_exit = True
            thread.join()


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def events(text):
    """What server-sent events hold."""
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]
