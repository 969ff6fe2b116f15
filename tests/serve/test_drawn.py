"""Bodies drawn from the server's own schema, whole and damaged: none is answered by a failure."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest
from tests.serve.parts import anchor_of, app_of, asked_of, direction_of, guard_of
from tests.tiny import tiny_model

pytest.importorskip("fastapi")

PATHS = ("/v1/chat/completions", "/v1/completions", "/demur/trace")
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.just(10**40),
    st.just("\ud800"),
    st.just("<|im_start|>"),
)


def of_schema(schema, known, depth=0):
    """Values that a JSON schema takes, as far as those of this server go."""
    if "$ref" in schema:
        return of_schema(known[schema["$ref"].rsplit("/", 1)[1]], known, depth)
    if "anyOf" in schema:
        return st.one_of([of_schema(one, known, depth) for one in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "object":
        fields = {
            k: of_schema(v, known, depth + 1) for k, v in schema.get("properties", {}).items()
        }
        needed = {k: fields.pop(k) for k in schema.get("required", ())}
        return st.fixed_dictionaries(needed, optional=fields)
    if kind == "array":
        if "prefixItems" in schema:
            return st.tuples(*(of_schema(one, known, depth + 1) for one in schema["prefixItems"]))
        return st.lists(of_schema(schema.get("items", {}), known, depth + 1), max_size=3)
    low, high = schema.get("minimum", -5), schema.get("maximum", 400)
    low = schema.get("exclusiveMinimum", low)
    if kind == "integer":
        return st.integers(low, min(high, 400))
    return {
        "number": st.floats(low, high),
        "boolean": st.booleans(),
        "null": st.none(),
        "string": st.one_of(st.text(max_size=12), st.sampled_from(["a tree", "tiny-llama", "w"])),
    }.get(kind, JUNK)


@st.composite
def bodies(draw, path, schema, known):
    """A path and a body for it that is mostly in order, or that is not."""
    body = draw(of_schema(schema, known))
    if draw(st.integers(0, 3)):  # Else hardly any gets as far as the model.
        kept = draw(st.sets(st.sampled_from(sorted(body)), max_size=4)) - UNSUPPORTED
        body = {name: body[name] for name in body if name in kept | NEEDED}
        body |= {"model": "tiny-llama"} if path != PATHS[2] else {"direction": "w"}
        if "messages" in body:
            body["messages"] = [{"role": "user", "content": draw(st.text(min_size=1, max_size=9))}]
        if "prompt" in body and draw(st.booleans()):
            body["prompt"] = draw(PROMPT)
        if draw(st.booleans()):
            body.pop("demur", None)
        if path == PATHS[1] and draw(st.booleans()):
            body["demur"] = {"template": True}
    if not draw(st.integers(0, 4)):
        body[draw(st.sampled_from([*body, "more"]))] = draw(JUNK)
    raw = json.dumps(body).encode()
    if not draw(st.integers(0, 9)):
        raw = raw[: draw(st.integers(0, len(raw)))] + draw(st.binary(max_size=2))
    return path, raw


PROMPT = st.one_of(st.text("a tree", min_size=1), st.lists(st.integers(20, 120), min_size=1))
NEEDED = {"messages", "prompt", "direction"}
UNSUPPORTED = {
    *("frequency_penalty", "presence_penalty", "logit_bias", "tools", "tool_choice", "functions"),
    *("function_call", "response_format", "modalities", "audio", "prediction", "best_of", "suffix"),
    *("reasoning_effort", "verbosity", "web_search_options", "stream_options"),
}


@pytest.mark.parametrize("loaded", ["bare", "guard and anchor"])
def test_drawn_bodies_are_answered_in_order(loaded):
    model = tiny_model()
    own = {"directions": {"w": direction_of(model)}, "max_tokens": 4}
    if loaded != "bare":
        own |= {
            "guard": guard_of(model, 0.6),
            "anchor": anchor_of(model, 0.6),
            "opt_out": True,
            "raw": True,
        }
    app = app_of(model, **own)
    drawn = drawn_bodies(app, 75)
    seen = []
    with asked_of(app) as ask:
        for path, raw in drawn:
            reply = ask("POST", path, content=raw, headers={"content-type": "application/json"})
            seen.append((path, reply.status_code))
            assert reply.status_code < 500, (path, raw, reply.text)
            if reply.status_code != 200:
                assert reply.json()["error"]["message"]
        assert ask.chat(max_tokens=4).status_code == 200
        assert ask.engine.running == ask.engine.waiting == 0
    for path in PATHS:  # Bodies that are all refused would show nothing.
        assert seen.count((path, 200)) >= 5, seen
    assert sum(status != 200 for _, status in seen) >= 15


def drawn_bodies(app, count):
    whole = app.openapi()
    known, kept = whole["components"]["schemas"], []
    for path in PATHS:
        content = whole["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]

        @hypothesis.settings(
            max_examples=count // len(PATHS),
            database=None,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(body=bodies(path, schema, known))
        def draw(body):
            kept.append(body)

        draw()
    return kept
