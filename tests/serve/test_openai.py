"""OpenAI's own client and curl, unchanged, over HTTP on loopback."""

import shutil
import signal
import subprocess
import threading
import time

import httpx
import pytest
from tests.serve.parts import (
    PROMPTS,
    app_of,
    direction_of,
    events,
    guard_of,
    served,
    slowed,
    until,
)
from tests.tiny import tiny_model

from demur.serve import Job

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

KEY = "s3cret-key"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def app(model):
    return app_of(model, guard=guard_of(model, 0.6), directions={"w": direction_of(model)}, key=KEY)


@pytest.fixture(scope="module")
def address(app):
    with served(app) as found:
        yield found


def client_of(address, key=KEY):
    return openai.OpenAI(
        base_url=f"{address}/v1",
        api_key=key,
        max_retries=0,
        http_client=httpx.Client(trust_env=False, timeout=60),
    )


@pytest.fixture(scope="module")
def client(address):
    with client_of(address) as found:
        yield found


def ask(client, text="a tree", **more):
    return client.chat.completions.create(
        model="tiny-llama",
        messages=[{"role": "user", "content": text}],
        **{"max_tokens": 8, "temperature": 0, **more},
    )


def test_a_reply(client, model):
    expected = model.generate(["a tree"], max_new_tokens=8)[0]
    reply = ask(client)
    assert reply.choices[0].message.content == expected.text
    assert reply.usage.completion_tokens == len(expected.ids)
    assert reply.model_extra["demur"]["guard"]["threshold"] == 0.6
    raw = client.chat.completions.with_raw_response.create(
        model="tiny-llama", messages=[{"role": "user", "content": "a tree"}], max_tokens=2
    )
    assert float(raw.headers["x-demur-guard-score"]) > 0
    assert [one.id for one in client.models.list()] == ["tiny-llama"]
    assert client.models.retrieve("tiny-llama").owned_by == "demur"
    text = client.completions.create(
        model="tiny-llama",
        prompt="a tree",
        max_tokens=8,
        temperature=0,
        extra_body={"demur": {"template": True}},
    )
    assert text.choices[0].text == expected.text


def test_a_stream(client, model):
    expected = model.generate(["a tree"], max_new_tokens=30)[0]
    chunks = list(ask(client, stream=True, max_tokens=30, stream_options={"include_usage": True}))
    texts = [one.choices[0].delta.content for one in chunks if one.choices]
    assert "".join(one or "" for one in texts) == expected.text
    assert chunks[-1].usage.completion_tokens == len(expected.ids)
    finish = [one.choices[0].finish_reason for one in chunks if one.choices]
    assert finish[-1] == ("stop" if expected.finished else "length")
    assert len([one for one in texts if one]) > 3
    parts = client.completions.create(
        model="tiny-llama",
        prompt="a tree",
        max_tokens=30,
        temperature=0,
        stream=True,
        extra_body={"demur": {"template": True}},
    )
    assert "".join(one.choices[0].text for one in parts) == expected.text


def test_logprobs(client):
    reply = ask(client, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    for one in content:
        assert [one.logprob] == [two.logprob for two in one.top_logprobs[:1]]  # Greedy.
        assert len(one.top_logprobs) == 3


def test_edits_as_an_extra_field(client):
    own = {"demur": {"edits": [{"kind": "add", "direction": "w", "strength": 3}]}}
    reply = ask(client, extra_body=own)
    assert reply.choices[0].message.content != ask(client).choices[0].message.content
    assert reply.model_extra["demur"]["edits"][0]["applied"] > 0


def test_errors_are_of_the_clients_classes(client, address):
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        ask(client, top_logprobs=2)
    with pytest.raises(openai.NotFoundError) as none:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "a"}])
    assert none.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError):
        ask(client, extra_body={"demur": {"guard": False}})
    with pytest.raises(openai.PermissionDeniedError, match="raw prompt"):
        client.completions.create(model="tiny-llama", prompt="a tree")
    with client_of(address, "wrong") as other, pytest.raises(openai.AuthenticationError) as who:
        ask(other)
    assert "send the header `Authorization: Bearer KEY`" in str(who.value)


def test_many_at_once_get_what_each_gets_alone(client, model):
    expected = [one.text for one in model.generate(PROMPTS, max_new_tokens=20)]
    found = {}

    def one(i):
        if i % 2:
            chunks = ask(client, PROMPTS[i], max_tokens=20, stream=True)
            found[i] = "".join(part.choices[0].delta.content or "" for part in chunks)
        else:
            found[i] = ask(client, PROMPTS[i], max_tokens=20).choices[0].message.content

    threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(16)] == expected


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(address):
    body = (
        '{"model": "tiny-llama", "max_tokens": 4, "stream": true,'
        ' "messages": [{"role": "user", "content": "a tree"}]}'
    )
    found = subprocess.run(
        [
            *("curl", "-sN", "--noproxy", "*", f"{address}/v1/chat/completions", "-d", body),
            *("-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert len(events(found.stdout)) > 2


# A busy server of its own -------------------------------------------------------------------------


def test_too_many_requests_and_a_client_that_leaves():
    app = app_of(batch=1, queue=1)
    engine = app.state.engine
    with served(app) as address, client_of(address) as client:
        slowed(engine, 0.05)
        with httpx.Client(trust_env=False, base_url=address) as own:
            body = {
                "model": "tiny-llama",
                "max_tokens": 400,
                "temperature": 0,  # Drawn, it might end at once.
                "messages": [{"role": "user", "content": "a tree"}],
            }
            with own.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
                lines = reply.iter_lines()
                next(lines)
                job = Job(app.state.service.model.encode(["here"]), 4)
                waiting = engine.submit([job], lambda _: None)
                with pytest.raises(openai.RateLimitError) as busy:
                    ask(client)
                assert int(busy.value.response.headers["retry-after"]) >= 1
                waiting.cancel()
        # That client is gone; the next one leaves before its reply is done.
        until(lambda: engine.running == 0 and engine.waiting == 0)
        _leave(address, body)
        until(lambda: engine.running == 0 and engine.waiting == 0)
        assert ask(client).choices[0].finish_reason in ("length", "stop")
        metrics = httpx.get(f"{address}/metrics", trust_env=False).text
        dropped = float(metrics.split("\ndemur_replies_dropped_total ")[1].split()[0])
        assert dropped >= 2


def _leave(address, body):
    with httpx.Client(trust_env=False, timeout=0.2) as own, pytest.raises(httpx.TimeoutException):
        own.post(f"{address}/v1/chat/completions", json=body)


def test_stopping_finishes_what_was_accepted():
    model = tiny_model()
    app = app_of(model, batch=2)
    expected = [one.text for one in model.generate(PROMPTS[:4], max_new_tokens=30)]
    found = {}
    with served(app) as address, client_of(address) as client:
        slowed(app.state.engine, 0.01)

        def one(i):
            reply = ask(client, PROMPTS[i], max_tokens=30)
            found[i] = reply.choices[0].message.content

        threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: app.state.engine.running + app.state.engine.waiting == 4)
        app.state.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            ask(client)
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(4)] == expected
    assert not app.state.engine.open


def test_a_reply_does_not_wait_for_its_headers_to_be_acknowledged(app, address, monkeypatch):
    import socket

    found = []
    own = app.state.service.check_model

    def checked(name):
        for connection in app.state.server.server_state.connections:
            peer = connection.transport.get_extra_info("socket")
            found.append(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        own(name)

    monkeypatch.setattr(app.state.service, "check_model", checked)
    headers = {"Authorization": f"Bearer {KEY}"}
    httpx.get(f"{address}/v1/models/tiny-llama", headers=headers, trust_env=False)
    assert found
    assert all(found)


def test_the_first_token_does_not_wait_for_the_last(client, app):
    own = app.state.engine._step
    try:
        slowed(app.state.engine, 0.03)
        began = time.monotonic()
        stream = ask(client, stream=True, max_tokens=40)
        next(iter(stream))
        first = time.monotonic() - began
        rest = list(stream)
        assert len(rest) > 5
        assert first < (time.monotonic() - began) / 2
    finally:
        app.state.engine._step = own
