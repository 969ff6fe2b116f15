"""The routes, without a network: what is answered, and what is refused in which words."""

import threading

import pytest
import torch
from tests.serve.parts import (
    PROMPTS,
    anchor_of,
    asked,
    direction_of,
    events,
    guard_of,
    held_up,
    slowed,
    until,
)
from tests.tiny import tiny_model

from demur.anchor import Anchor
from demur.guard import Guard

pytest.importorskip("fastapi")
from demur.serve.trace import trace


def test_a_reply_is_that_of_generate_and_is_counted():
    model = tiny_model()
    expected = model.generate(PROMPTS[:3], max_new_tokens=6)
    with asked(model) as ask:
        for prompt, one in zip(PROMPTS, expected, strict=False):
            reply = ask.chat(prompt).json()
            choice = reply["choices"][0]
            assert choice["message"] == {
                "role": "assistant",
                "content": one.text,
                "refusal": None,
            }
            assert choice["finish_reason"] == ("stop" if one.finished else "length")
            length = model.encode([prompt]).ids.shape[1]
            assert reply["usage"] == {
                "prompt_tokens": length,
                "completion_tokens": len(one.ids),
                "total_tokens": length + len(one.ids),
            }
            assert reply["object"] == "chat.completion"
            assert reply["demur"]["guard"] is None
            assert reply["demur"]["anchor"]["gate"] == "none"
        text = ask("GET", "/metrics").text
        assert 'demur_requests_total{route="/v1/chat/completions",status="200"} 3.0' in text
        assert f"demur_completion_tokens_total {sum(len(one.ids) for one in expected)}.0" in text
        assert "demur_time_to_first_token_seconds_count 3.0" in text
        assert "demur_queue_length 0.0" in text


def test_a_conversation_of_parts_and_with_a_system_message():
    model = tiny_model(system="Say little.")
    expected = model.generate(["here"], max_new_tokens=6)[0]
    plain = tiny_model()
    with asked(plain) as ask:
        messages = [
            {"role": "system", "content": "Say little."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "re"}],
            },
        ]
        reply = ask.chat(messages=messages)
        assert reply.json()["choices"][0]["message"]["content"] == expected.text
        # What a client got back may be sent again as it came.
        own = reply.json()["choices"][0]["message"]
        turns = [*messages, own, {"role": "user", "content": "and then", "name": "ann"}]
        assert ask.chat(messages=turns).status_code == 200


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_stream_adds_up_to_the_whole_reply(kind):
    model = tiny_model()
    with asked(model, guard=guard_of(model)) as ask:
        path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
        body = {"model": "tiny-llama", "max_tokens": 20, "seed": 3, "n": 2}
        if kind == "chat":
            body["messages"] = [{"role": "user", "content": "a tree"}]
        else:
            body |= {"prompt": ["a tree", "far from here"], "demur": {"template": True}}
        whole = ask("POST", path, json=body).json()
        streamed = ask(
            "POST", path, json={**body, "stream": True, "stream_options": {"include_usage": True}}
        )
        assert streamed.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(streamed.text)
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert len(whole["choices"]) == (2 if kind == "chat" else 4)
        for choice in whole["choices"]:
            own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            if kind == "chat":
                assert own[0]["delta"] == {"role": "assistant", "content": ""}
                text = "".join(one["delta"].get("content", "") for one in own)
                assert text == choice["message"]["content"]
            else:
                assert "".join(one["text"] for one in own) == choice["text"]
            assert [one["finish_reason"] for one in own][-1] == choice["finish_reason"]
            assert all(one["finish_reason"] is None for one in own[:-1])
        texts = {str(one.get("text", one.get("message"))) for one in whole["choices"]}
        assert len(texts) == len(whole["choices"])  # Each is drawn anew.
        assert streamed.headers["x-demur-guard-score"]
        ended = chunks[-1]["demur"]
        found = whole["choices"][ended["index"]]["demur"]["guard"]
        assert ended["guard"]["score"] == pytest.approx(found["score"])
        assert len({one["demur"]["guard"]["score"] for one in whole["choices"]}) == (
            1 if kind == "chat" else 2
        )


def test_the_guard_is_told_in_body_and_headers_and_cannot_be_left_out():
    model = tiny_model()
    guard = guard_of(model, 0.6)
    expected = guard.score(model, PROMPTS)
    with asked(model, guard=guard) as ask:
        for i, prompt in enumerate(PROMPTS[:6]):
            reply = ask.chat(prompt)
            found = reply.json()["demur"]["guard"]
            assert found["score"] == pytest.approx(expected.scores[i])
            assert found["flagged"] == bool(expected.flagged[i])
            assert found["threshold"] == 0.6
            assert found["reads"]["t_inst"] == pytest.approx(expected.reads["t_inst"][i])
            assert float(reply.headers["x-demur-guard-score"]) == pytest.approx(
                expected.scores[i], rel=1e-4
            )
            assert reply.headers["x-demur-gate"] == "none"
        refused = ask.chat(demur={"guard": False})
        assert refused.status_code == 403
        assert refused.json()["error"]["param"] == "demur.guard"
        flags = int(expected.flagged[:6].sum())
        assert 0 < flags < 6
        assert f"demur_guard_flags_total {flags}.0" in ask("GET", "/metrics").text
    with asked(model, guard=guard, opt_out=True) as ask:
        assert ask.chat(demur={"guard": False}).json()["demur"]["guard"] is None
    with asked(model) as ask:
        assert ask.chat(demur={"guard": True}).status_code == 400


def test_a_flagged_request_is_refused_where_that_is_asked_for():
    model = tiny_model()
    with asked(model, guard=guard_of(model, -99.0), on_flag="refuse", refusal="No.") as ask:
        choice = ask.chat().json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("No.", "content_filter")
        chunks = events(ask.chat(stream=True).text)
        text = "".join(one["choices"][0]["delta"].get("content", "") for one in chunks)
        assert text == "No."


def test_the_anchor_holds_unless_one_may_opt_out():
    model = tiny_model()
    anchor = anchor_of(model, 0.6)
    with anchor.holding(model) as held:
        expected = model.generate(["the tree"], max_new_tokens=12)[0]
        trace = held.traces[0]
    plain = model.generate(["the tree"], max_new_tokens=12)[0]
    assert expected.text != plain.text
    with asked(model, anchor=anchor) as ask:
        reply = ask.chat("the tree", max_tokens=12)
        assert reply.json()["choices"][0]["message"]["content"] == expected.text
        own = reply.json()["demur"]["anchor"]
        assert (own["gate"], own["opened_at"], own["by"]) == ("open", trace.opened, trace.by)
        assert reply.headers["x-demur-gate"] == "open"
        assert "demur_gate_openings_total 1.0" in ask("GET", "/metrics").text
        assert ask.chat(demur={"anchor": False}).status_code == 403
        weaker = {"edits": [{"kind": "anchor", "strength": 0.5}]}
        assert ask.chat(demur=weaker).status_code == 403
        stronger = {"edits": [{"kind": "anchor", "strength": 1.5}]}
        assert ask.chat(demur=stronger).json()["demur"]["anchor"]["gate"] == "open"
    with asked(model, anchor=anchor, opt_out=True) as ask:
        reply = ask.chat("the tree", max_tokens=12, demur={"anchor": False}).json()
        assert reply["choices"][0]["message"]["content"] == plain.text
        assert ask.chat(demur=weaker).status_code == 200
    with asked(model) as ask:
        assert ask.chat(demur={"anchor": True}).status_code == 400


def test_an_edit_is_no_way_round_an_anchor():
    """Its gate reads the edited stream, so edits need the leave that going without it needs."""
    model = tiny_model()
    own = {"anchor": anchor_of(model, 0.6), "directions": {"refusal": direction_of(model)}}
    edit = {"edits": [{"direction": "refusal", "kind": "ablate", "strength": 1.0}]}
    with asked(model, **own) as ask:
        refused = ask.chat("the tree", demur=edit)
        assert refused.status_code == 403
        assert "unedited" in refused.json()["error"]["message"]
    with asked(model, **own, opt_out=True) as ask:
        assert ask.chat("the tree", demur=edit).status_code == 200


def test_a_stream_that_begins_anew_says_so():
    model = tiny_model()
    with asked(model, anchor=anchor_of(model, 0.6)) as ask:
        for prompt in PROMPTS:
            whole = ask.chat(prompt, max_tokens=20).json()
            if whole["demur"]["anchor"]["begun_anew"]:
                break
        else:
            pytest.fail("no gate opened midway")
        chunks = events(ask.chat(prompt, max_tokens=20, stream=True).text)
        anew = [i for i, one in enumerate(chunks) if one.get("demur", {}).get("anew")]
        assert len(anew) == 1
        assert chunks[anew[0]]["demur"]["anchor"]["gate"] == "open"
        after = "".join(
            one["choices"][0]["delta"].get("content", "") for one in chunks[anew[0] + 1 :]
        )
        assert after == whole["choices"][0]["message"]["content"]


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"foo": 1}, 400, "foo"),
        ({"model": "gpt-4o"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, 400, "messages"),
        ({"temperature": 2.1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 9}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**400}, 400, "max_tokens"),
        ({"max_tokens": 5000}, 400, "max_tokens"),
        ({"max_tokens": 500}, 400, "messages"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"demur": {"edits": [{"kind": "ablate", "direction": "nope"}]}}, 400, "demur.edits"),
        ({"demur": {"edits": [{"kind": "ablate"}]}}, 400, "demur.edits"),
        ({"demur": {"edits": [{"kind": "add", "direction": "w", "layers": [2, 9]}]}}, 400, None),
        ({"demur": {"edits": [{"kind": "add", "direction": "w", "strength": 1e9}]}}, 400, None),
        ({"demur": {"edits": [{"kind": "add", "direction": "w"}] * 9}}, 400, "demur.edits"),
        ({"demur": {"more": 1}}, 400, "demur.more"),
    ],
)
def test_what_is_refused(shared, body, status, param):
    reply = shared.chat(**body)
    error = reply.json()["error"]
    assert (reply.status_code, error.keys()) == (status, {"message", "type", "param", "code"})
    if param is not None:
        assert error["param"] == param
    assert error["message"]


@pytest.fixture(scope="module")
def shared():
    model = tiny_model()
    with asked(model, directions={"w": direction_of(model)}) as ask:
        yield ask


@pytest.mark.parametrize(
    "body",
    [
        {
            "logprobs": False,
            "tools": [],
            "tool_choice": "auto",
            "response_format": {"type": "text"},
        },
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "ann"},
        {"max_tokens": None, "max_completion_tokens": 3, "n": None, "stop": None, "stream": None},
        {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "modalities": ["text"]},
    ],
)
def test_parameters_without_effect_are_taken(shared, body):
    assert shared.chat(**body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [384]},
        {"prompt": [-1]},
        {"prompt": [0] * 513},
        {"prompt": "a " * 600},
        {"prompt": ["a", 1]},
        {"prompt": "a", "logprobs": 21},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "echo": True, "demur": {"template": True}},
        {"prompt": [1, 2], "demur": {"template": True}},
        {
            "prompt": "a",
            "demur": {"edits": [{"direction": "w", "kind": "add", "at": "instruction"}]},
        },
        {"prompt": "a", "best_of": 2},
        {"prompt": "a", "suffix": "b"},
        {"prompt": ["a"] * 9},
        {},
    ],
)
def test_what_completions_refuse(shared, body):
    reply = shared("POST", "/v1/completions", json={"model": "tiny-llama", **body})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_cold_temperature_is_greedy(shared):
    greedy = shared.chat().json()["choices"][0]["message"]["content"]
    for temperature in (1e-300, 1e-9):
        reply = shared.chat(temperature=temperature).json()
        assert reply["choices"][0]["message"]["content"] == greedy


def test_urls_and_methods(shared):
    for method, path, status in (
        ("GET", "/nope", 404),
        ("GET", "/v1/models/nope", 404),
        ("GET", "/demur/runs/../../report", 404),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
    ):
        reply = shared(method, path)
        assert (reply.status_code, reply.json()["error"].keys()) == (
            status,
            {"message", "type", "param", "code"},
        )
    assert shared("GET", "/v1/models/tiny-llama").json()["id"] == "tiny-llama"
    paths = shared("GET", "/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/demur/trace", "/demur/info"} <= paths.keys()


# When things go wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_guard_that_fails_lets_nothing_through(monkeypatch, stream):
    model = tiny_model()
    with asked(model, guard=guard_of(model)) as ask:
        monkeypatch.setattr(Guard, "judge", lambda *_: 1 / 0)
        reply = ask.chat("a secret tree", stream=stream)
        assert reply.status_code == 500
        assert reply.json()["error"]["type"] == "server_error"
        assert "choices" not in reply.json()


def test_an_anchor_that_fails_midway_ends_the_stream_with_an_error(monkeypatch):
    model = tiny_model()
    anchor = anchor_of(model, 100.0)
    with asked(model, anchor=anchor) as ask:
        from demur.anchor import Holding

        own = Holding._replied

        def replied(self, x, reply, traces, gate):
            if traces[0].tokens >= 3:
                raise ZeroDivisionError
            own(self, x, reply, traces, gate)

        monkeypatch.setattr(Holding, "_replied", replied)
        reply = ask.chat("a tree", stream=True, max_tokens=20)
        assert reply.status_code == 200
        assert '"error"' in reply.text.split("\n\n")[-2]
        assert "[DONE]" not in reply.text
        assert ask.chat("a tree", max_tokens=20).status_code == 500
        assert isinstance(anchor, Anchor)


def test_too_many_requests_are_told_when_to_come_back():
    with asked(batch=1, queue=1) as ask:
        go = held_up(ask.engine)
        threads = [threading.Thread(target=ask.chat, kwargs={"max_tokens": 60}) for _ in range(2)]
        threads[0].start()
        until(lambda: ask.engine.running == 1)
        threads[1].start()
        until(lambda: ask.engine.waiting == 1)
        reply = ask.chat()
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["type"] == "rate_limit_error"
        go.set()
        for thread in threads:
            thread.join()


def test_requests_at_a_time_are_bounded_before_their_bodies_are_read():
    with asked(requests=1) as ask:
        go = held_up(ask.engine)
        thread = threading.Thread(target=ask.chat, kwargs={"max_tokens": 40})
        thread.start()
        until(lambda: ask.engine.running == 1)
        assert ask.chat().status_code == 429
        go.set()
        thread.join()
        assert ask.chat().status_code == 200


def test_a_reply_that_takes_too_long_is_an_error():
    with asked(timeout=0.1) as ask:
        slowed(ask.engine, 0.02)
        assert ask.chat(max_tokens=100).status_code == 504
        late = ask.chat(max_tokens=100, stream=True)
        assert "[DONE]" not in late.text
        assert '"error"' in late.text


def test_a_server_that_stops_says_so():
    with asked() as ask:
        ask.engine.drain()
        assert ask.chat().status_code == 503
        assert ask("GET", "/health").status_code == 503


# Beside OpenAI's ----------------------------------------------------------------------------------


def test_info_tells_what_may_be_asked():
    model = tiny_model()
    with asked(
        model,
        guard=guard_of(model, float("inf")),
        anchor=anchor_of(model, 1.0),
        directions={"w": direction_of(model)},
    ) as ask:
        info = ask("GET", "/demur/info").json()
        assert info["directions"][0] | {"recipe": ""} == {
            "name": "w",
            "site": "1.resid_pre",
            "position": -1,
            "norm": pytest.approx(3.0),
            "recipe": "",
        }
        assert info["edit_kinds"] == ["ablate", "add", "clamp", "anchor"]
        assert info["guard"]["threshold"]["value"] is None  # JSON has no infinity.
        assert info["anchor"]["sites"] == ["1.resid_pre", "2.resid_pre"]
        assert "key" not in str(info["limits"])


def test_a_trace_holds_the_projections_and_their_null():
    model = tiny_model()
    way = direction_of(model)
    messages = [
        {"role": "user", "content": "a tree"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "in a garden"},
    ]
    with asked(model, directions={"w": way}) as ask:
        body = {"messages": messages, "direction": "w", "reply": "far from here"}
        found = ask("POST", "/demur/trace", json=body).json()
        assert found == ask("POST", "/demur/trace", json=body).json()
        spans = [one["span"] for one in found["tokens"]]
        order = list(dict.fromkeys(spans))
        assert order == ["template", "earlier", "instruction", "post_instruction", "response"]
        assert spans.count("post_instruction") == model.template.n_post
        t_inst = [i for i, one in enumerate(found["tokens"]) if one["t_inst"]]
        assert t_inst == [spans.index("post_instruction") - 1]
        assert "".join(one["text"] for one in found["tokens"]).endswith("far from here")
        assert found["sites"] == [str(site) for site in model.stream_sites]
        values = torch.tensor(found["values"])
        assert values.shape == (model.n_layers + 1, len(spans))
        nulls = {
            kind: ask("POST", "/demur/trace", json={**body, "null": kind}).json()["null"]
            for kind in ("covariance", "isotropic")
        }
        assert nulls["covariance"] == found["null"]
        low, high = (
            torch.tensor(nulls["isotropic"][side]).unsqueeze(1) for side in ("low", "high")
        )
        inside = ((values >= low) & (values <= high)).double().mean()
        assert 0.5 < inside < 1.0
        # Where the row varies most, random directions find more.
        wide = torch.tensor(found["null"]["high"]) - torch.tensor(found["null"]["low"])
        assert (wide > (high - low).squeeze(1)).all()
        edits = [{"kind": "ablate", "direction": "w"}]
        gone = ask("POST", "/demur/trace", json={**body, "edits": edits}).json()
        assert torch.tensor(gone["values"]).abs().max() < 1e-4 < values.abs().max()
        clamp = [{"kind": "clamp", "direction": "w", "strength": 2.0, "at": "response"}]
        held = torch.tensor(
            ask("POST", "/demur/trace", json={**body, "edits": clamp}).json()["values"]
        )
        row = found["sites"].index("1.resid_pre")
        response = [i for i, span in enumerate(spans) if span == "response"]
        assert torch.allclose(held[row, response], torch.tensor(6.0), atol=1e-4)
        assert torch.equal(held[:row], values[:row])
        assert ask("POST", "/demur/trace", json={**body, "direction": "x"}).status_code == 400
    with asked(model, directions={"w": way}, trace=False) as ask:
        assert ask("POST", "/demur/trace", json=body).status_code == 403


def test_a_trace_shows_what_an_anchor_leaves_and_where_its_gate_opened():
    model = tiny_model()
    way, anchor = direction_of(model), anchor_of(model, -100.0, header=True)
    body = {
        "messages": [{"role": "user", "content": "the tree"}],
        "direction": "w",
        "reply": "a garden is far from here and so on",
    }
    with asked(model, anchor=anchor, directions={"w": way}) as ask:

        def traced(**more):
            found = ask("POST", "/demur/trace", json={**body, **more}).json()
            return found["anchor"], torch.tensor(found["values"]), found

        state, values, found = traced()
        off, plain, _ = traced(anchor=False)
        assert (off["gate"], state["gate"]) == ("none", "open")
        assert state["opened_at"] == 0
        sites = [site.layer for site in (one.site for one in anchor.actuators)]
        spans = [one["span"] for one in found["tokens"]]
        post = spans.index("post_instruction")
        assert values.shape == plain.shape
        assert torch.allclose(values[:, :post], plain[:, :post], atol=1e-4)
        assert torch.allclose(values[0], plain[0], atol=1e-4)  # Below the first floor.
        assert (values - plain)[min(sites) :, post:].abs().max() > 0.01
        # At the floor's site the stream lies where the floor lets it lie.
        none = traced(edits=[{"kind": "anchor", "strength": -100.0}])
        assert none[0]["gate"] == "open"
        assert torch.allclose(none[1], plain, atol=1e-4)
        long = ask("POST", "/demur/trace", json={**body, "reply": "a tree " * 150})
        assert (long.status_code, long.json()["error"]["param"]) == (400, "reply")


def test_the_gate_of_a_trace_is_that_of_the_reply():
    model = tiny_model()
    opened = []
    for threshold in (0.6, 0.66):
        anchor = anchor_of(model, threshold, header=True, fresh_turn=False)
        for prompt in PROMPTS[:4]:
            with anchor.holding(model) as held:
                reply = model.generate([prompt], max_new_tokens=20)[0]
                state = held.traces[0]
            # The last one of a reply that is cut is written and not read.
            row = model.encode([prompt], [reply.ids[: None if reply.finished else -1]])
            found = trace(model, row, direction_of(model), anchor=anchor).gate
            assert (found.opened_at, found.by) == (state.opened, state.by)
            assert found.score == pytest.approx(state.score)
            opened.append(found.opened_at)
    assert len(set(opened)) > 2  # At once, midway, and never.
    assert not model._hooks


def test_modules_load_where_the_machine_takes_them_for_text(monkeypatch):
    import mimetypes

    mimetypes.add_type("text/plain", ".js")
    with asked() as ask:
        kind = ask("GET", "/main.js").headers["content-type"]
    assert kind.startswith("text/javascript")


def test_runs_are_listed_and_their_reports_run_nothing(tmp_path):
    for name, verdict in (("one", '{"verdict": {"headline": "It holds."}}'), ("two", "no json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(verdict)
    (tmp_path / "one" / "report.html").write_text("<h1>One</h1>")
    (tmp_path / "none").mkdir()
    (tmp_path / "secret.html").write_text("secret")
    (tmp_path / "away").symlink_to(tmp_path / "one")
    with asked(runs=tmp_path) as ask:
        rows = {row["name"]: row for row in ask("GET", "/demur/runs").json()["runs"]}
        assert rows.keys() == {"one", "two"}
        assert rows["one"]["verdict"] == "It holds."
        assert (rows["one"]["report"], rows["two"]["report"]) == (True, False)
        page = ask("GET", "/demur/runs/one/report")
        assert page.text == "<h1>One</h1>"
        assert page.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
        for name in ("two", "away", "..", "%2e%2e", "one%2f..%2fone", "secret.html"):
            assert ask("GET", f"/demur/runs/{name}/report").status_code == 404
