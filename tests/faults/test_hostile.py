"""What strangers put into prompt files, run folders and requests stays text, or is refused."""

import json
import logging
import os
import re
import socket
import time
import unicodedata
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from bench.faults.http import KEY, head, post, smuggling, wrong_keys
from bench.faults.prompt_files import _TOKENS, KINDS, acts, tried
from tests.faults.payloads import ALL
from tests.serve.parts import app_of, asked, direction_of, served, until
from tests.tiny import TEMPLATES, tiny_model
from typer.testing import CliRunner

from demur import cli, prompts
from demur.cli import talk
from demur.errors import OverlapError, PromptFileError
from demur.exports.card import plain
from demur.prompts import PromptSet, check_disjoint, load, overlap, split
from demur.serve.runs import listed, report_of

SLOW = {"1,000,000 short rows", "Parquet that unpacks to 20 GB", "texts of 100 kB to 10 MB"}


# Prompt files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SLOW])
def test_an_odd_file_is_loaded_right_or_refused_with_its_line(tmp_path, kind):
    import random

    for seed in range(4):
        case = KINDS[kind][1](random.Random(f"{kind} {seed}"))
        (folder := tmp_path / str(seed)).mkdir()
        assert tried(case, folder, shown=seed == 0) is None, case.name


def test_parquet_is_unpacked_no_further_than_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "_MOST_BYTES", 1 << 20)
    path = tmp_path / "p.parquet"
    one = pyarrow.array([0] * 100, pyarrow.int32())
    for size, fits in ((1000, True), (90_000, False)):
        column = pyarrow.DictionaryArray.from_arrays(one, pyarrow.array(["a" * size]))
        pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path, compression="zstd")
        assert path.stat().st_size < 10_000
        if fits:
            assert len(load(str(path))) == 100
        else:
            with pytest.raises(PromptFileError, match="unpacks to more"):
                load(str(path))


def test_parquet_that_python_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "p.parquet"
    bad = pyarrow.py_buffer(b"\xff\xfe"), pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, bad[1], bad[0]])
    late = pyarrow.array([2**60], pyarrow.timestamp("us"))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    for table, why in (
        (pyarrow.table({"prompt": text}), "not Parquet that can be read: 'utf-8'"),
        (pyarrow.table({"prompt": ["a"], "when": late}), "out of range"),
        (twice, "two columns are called `prompt`"),
    ):
        pyarrow.parquet.write_table(table, path)
        with pytest.raises(PromptFileError, match=re.escape(why)):
            load(str(path))


def test_an_error_is_short_however_many_columns_and_however_long_they_are(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({f"{'k' * 5000}{i}": "x" for i in range(500)}))
    with pytest.raises(PromptFileError) as caught:
        load(str(path))
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize(
    "other",
    [
        unicodedata.normalize("NFD", "Où est le café près d'ici"),
        "O\u200bù est le ca\u2060fé près d'i\u00adci",
        "\u202aOù est le café près d'ici\u202c",
        "\ufeffOù est le café près d'ici\U000e0041",
    ],
)
def test_prompts_that_read_the_same_are_the_same(other):
    one = "Où est le café près d'ici"
    assert one != other
    a, b = PromptSet.of([one]), PromptSet.of([other])
    assert [pair.jaccard for pair in overlap(a, b)] == [1.0]
    with pytest.raises(OverlapError):
        check_disjoint({"fit": a, "test": b})
    both = PromptSet.of([one, other, "How tall do sunflowers grow", "Name two old bridges"])
    for seed in range(8):
        parts = split(both, {"fit": 2, "test": 2}, seed=seed)
        assert any({one, other} <= set(part.texts) for part in parts.values())


@pytest.mark.parametrize("layout", TEMPLATES)
def test_what_looks_like_a_special_token_is_encoded_as_its_letters(layout):
    model = tiny_model(template=layout)
    ours = model.template.tokenizer.added_tokens_decoder

    def special(text):
        return [x for x in model.encode([text]).ids[0].tolist() if x in ours]

    everything = " ".join((*_TOKENS, *(str(token) for token in ours.values())))
    assert special(f"hello {everything} there") == special("hello there")


# The terminal -------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def test_markup_of_tables_is_not_read_in_a_prompt(tmp_path):
    path = tmp_path / "p.jsonl"
    texts = ["[/INST] [red]x[/red]", "[link=http://evil.example]y[/link]", "\x1b[2J\x9b2J\u202ez\\"]
    rows = [json.dumps({"prompt": text, "label": f"[/b]{i}"}) for i, text in enumerate(texts)]
    path.write_text("\n".join(rows))
    done = run("prompts", "show", path)
    assert done.exit_code == 0, done.output
    assert "[/INST] [red]x[/red]" in done.output
    assert "[link=http://evil.example]y[/link]" in done.output
    assert acts(done.output) == set()
    told = run("prompts", "show", path, "--json")
    assert {row["prompt"] for row in json.loads(told.stdout)["rows"]} == set(texts)
    assert acts(told.output) == set()


def test_an_error_shows_what_a_terminal_would_obey():
    done = run("prompts", "show", "\x1b]0;owned\x07\u202efile.jsonl")
    assert done.exit_code == 2
    assert "⟦U+001B⟧]0;owned⟦U+0007⟧⟦U+202E⟧file.jsonl" in done.output
    assert acts(done.output) == set()


def test_a_cell_that_is_odd_markup_is_printed_as_it_stands(capsys):
    console, table = talk.console(), talk.table("[bold]a[/]", title="t")
    table.add_row(talk.cell("[/x] [on red]\x1b[31m"))
    table.add_row("[/never opened]")
    console.print(table)
    said = capsys.readouterr().out
    assert "[/x] [on red]⟦U+001B⟧[31m" in said
    assert "[/never opened]" in said
    assert "[bold]a[/]" in said


def test_nesting_is_an_error_of_the_file_not_of_demur(tmp_path):
    path = tmp_path / "a.safetensors"
    meta = json.dumps({"__metadata__": {"demur": "[" * 100_000}}).encode()
    path.write_bytes(len(meta).to_bytes(8, "little") + meta)
    done = run("import", path)
    assert done.exit_code == 2, done.output
    recipe = tmp_path / "r.toml"
    recipe.write_text("a = " + "[" * 100_000)
    done = run("audit", "tiny", "--config", recipe)
    assert done.exit_code == 2, done.output


# Cards --------------------------------------------------------------------------------------------


def test_a_card_makes_no_link_or_element_of_foreign_text():
    text = plain(f"a\n\n# big\n[x](http://evil.example) ![y][z] {ALL}\x1b[31m")
    assert "\n" not in text
    assert "<" not in text
    assert "](" not in text
    assert "][" not in text
    assert acts(text) == set()
    assert plain("SmolLM2_135M [0.31, 0.42]") == "SmolLM2_135M [0.31, 0.42]"


def test_the_card_of_an_export_keeps_a_strangers_recipe_in_its_cell(tmp_path):
    from dataclasses import replace

    from demur.exports import Steering, export
    from demur.interventions import Ablate

    model = tiny_model()
    recipe = "`| </td> ](x)\n\n## Evidence\n\nMeasured: proved. <script>x</script>"
    direction = replace(direction_of(model), recipe=recipe)
    made = export(model, Steering((Ablate(direction),)), tmp_path / "o", "peft")
    text = (made.folder / "README.md").read_text()
    assert text.count("\n## Evidence") == 1
    row = next(line for line in text.splitlines() if "Measured: proved" in line)
    assert row.startswith("| recipe | `'\\| </td>")
    assert row.endswith("</script>` |")


# Run folders --------------------------------------------------------------------------------------


def test_a_folder_of_runs_shows_what_is_in_it_and_no_more(tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "report.html").write_text("secret")
    (secret / "results.json").write_text('{"verdict": {"headline": "secret"}}')
    root = tmp_path / "runs"
    names = ("good", "linked", "device", "pipe", "huge", "deep", "a\nb\x1b[31m", "late", "half")
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "report.html").write_text(name)
    (root / "away").symlink_to(secret)
    for file in ("results.json", "report.html"):
        (root / "linked" / file).unlink(missing_ok=True)
        (root / "linked" / file).symlink_to(secret / file)
    (root / "device" / "results.json").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe" / "results.json")
    for file in ("results.json", "report.html"):
        with (root / "huge" / file).open("wb") as out:
            out.truncate(1 << 40)
    (root / "deep" / "results.json").write_text("[" * 1_000_000)
    os.utime(root / "late" / "report.html", (1 << 40, 1 << 40))
    (root / "half" / "results.json").write_text('{"verdict": {"headline": "\\ud800<b>"}}')
    found = {row["name"]: row for row in listed(root)}
    assert set(found) == set(names) - {"linked", "huge"}
    assert "secret" not in json.dumps(listed(root))
    assert found["device"]["verdict"] == found["pipe"]["verdict"] == found["deep"]["verdict"] == ""
    assert report_of(root, "good") == b"good"
    for name in ("away", "linked", "huge", "../secret", "..", ".", "", "/etc", "good/../good"):
        assert report_of(root, name) is None
    with asked(runs=root) as ask:
        told = ask("GET", "/demur/runs")
        assert told.status_code == 200
        assert {row["name"] for row in told.json()["runs"]} == set(found)
        for way in ("..%2fsecret", "%252e%252e%252fsecret", "..%5csecret", "%00", "%e2%80%a5"):
            reply = ask("GET", f"/demur/runs/{way}/report")
            assert reply.status_code == 404
            assert "secret" not in reply.text.partition("(see")[2]


@pytest.mark.parametrize("make", ["device", "pipe", "folder", "deep", "huge", "twice", "digits"])
def test_a_strangers_run_folder_is_refused_in_two_lines(tmp_path, make):
    path = tmp_path / "results.json"
    if make == "device":
        path.symlink_to("/dev/zero")
    elif make == "pipe":
        os.mkfifo(path)
    elif make == "folder":
        path.mkdir()
    elif make == "huge":
        with path.open("wb") as out:
            out.truncate(1 << 40)
    else:
        many = ",".join(f'"k{i}":1' for i in range(50_000))
        texts = {"deep": '{"a":' * 100_000, "twice": f'{{{many},"k0":2}}', "digits": "9" * 5000}
        path.write_text(texts[make])
    began = time.monotonic()
    done = run("report", tmp_path)
    assert done.exit_code == 2, done.output
    assert done.output.count("error: ") == done.output.count("hint: ") == 1
    assert time.monotonic() - began < 20


def test_an_archive_of_tensors_that_unpacks_to_more_is_not_unpacked(tmp_path):
    import io
    import zipfile

    import torch

    plain, packed = io.BytesIO(), tmp_path / "packed.pt"
    torch.save({"layer_activations": {1: torch.zeros(20_000_000)}, "layer_type": "x"}, plain)
    with (
        zipfile.ZipFile(plain) as one,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for name in one.namelist():
            other.writestr(name, one.read(name))
    assert packed.stat().st_size < 1_000_000
    done = run("import", packed)
    assert done.exit_code == 2, done.output
    assert "unpacks to" in done.output


# Requests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded():
    with asked(key=KEY) as ask:
        yield ask


def test_wrong_keys_are_told_apart_by_nothing(guarded, caplog):
    caplog.set_level(logging.DEBUG)
    found = set()
    for key in wrong_keys().values():
        reply = guarded("GET", "/v1/models", headers={"Authorization": b"Bearer " + key})
        found.add((reply.status_code, reply.text, tuple(reply.headers.items())))
    assert len(found) == 1
    assert {status for status, *_ in found} == {401}
    for path in (f"/v1/models?key={KEY}", f"/v1/models?api_key={KEY}", f"/v1/{KEY}"):
        assert guarded("GET", path).status_code == 401
    assert guarded("GET", "/v1/models", headers={"X-Api-Key": KEY}).status_code == 401
    both = [("Authorization", "Bearer no"), ("Authorization", f"Bearer {KEY}")]
    for pair in (both, both[::-1]):
        assert guarded("GET", "/v1/models", headers=pair).status_code == 400
    right = {"Authorization": f"BEARER {KEY}"}
    shown = [guarded("GET", path, headers=right).text for path in ("/demur/info", "/metrics")]
    shown += [guarded("GET", "/health").text, guarded("GET", f"/{KEY}").text.replace(f"/{KEY}", "")]
    assert not any(KEY in text for text in shown)
    said = [one.getMessage() for one in caplog.records if one.name.startswith(("demur", "uvicorn"))]
    assert said
    assert not any(KEY in line for line in said)


def test_keys_are_compared_as_digests_of_one_length(guarded, monkeypatch):
    import hmac

    lengths = set()

    def compare(a, b):
        lengths.add((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in wrong_keys().values():
        guarded("GET", "/v1/models", headers={"Authorization": b"Bearer " + key})
    assert len(lengths) == 1
    assert len(set(*lengths)) == 1


def test_what_needs_no_key_is_known_by_name(guarded):
    without = [
        route.path
        for route in guarded.app.routes
        for method in route.methods
        if guarded(method, route.path.replace("{name}", "x")).status_code != 401
    ]
    assert set(without) == {"/health"}


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "POST", "OPTIONS", "TRACE"])
def test_a_method_that_a_route_lacks_is_named_as_such(guarded, method):
    right = {"Authorization": f"Bearer {KEY}"}
    for route in guarded.app.routes:
        if method not in route.methods:
            reply = guarded(method, route.path, headers=right)
            assert reply.status_code == 405, route.path
            assert set(reply.headers["allow"].split(", ")) == set(route.methods)


def test_long_lists_are_refused_before_each_of_them_is_looked_at(guarded):
    bodies = [
        {"messages": [{}] * 200_000},
        {"messages": [{"role": "user", "content": ""}] * 20_000},
        {"messages": [{"role": "user", "content": [{}] * 200_000}]},
        {"demur": {"edits": [{}] * 200_000}},
    ]
    for body in bodies:
        raw = json.dumps({"model": "tiny-llama", **body})
        began = time.process_time()
        reply = guarded(
            "POST",
            "/v1/chat/completions",
            content=raw,
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        assert reply.status_code == 400
        assert time.process_time() - began < 0.7  # It was 1.5 where each was.
        assert len(reply.content) < 500


# Connections --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patient():
    """A server with little patience, whose limits can be reached."""
    import demur.serve.protocol as protocol

    app = app_of(key=KEY, head_seconds=0.5, body_seconds=1.0, requests=8, max_tokens=64)
    with served(app) as address:
        kind = app.state.server.config.http_protocol_class
        assert issubclass(kind, protocol.Patient)
        assert kind.most == 16
        yield SimpleNamespace(app=app, port=int(address.rpartition(":")[2]))


def talked(port, raw, seconds=30.0, quiet=None):
    """What comes back to some bytes until the server closes, or is quiet for so many seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        sock.sendall(raw)
        sock.settimeout(quiet or seconds)
        got = b""
        try:
            while part := sock.recv(65536):
                got += part
        except TimeoutError:
            assert quiet, "the connection was left open"
        except ConnectionError:
            pass
        return got


def honest(port):
    body = {"model": "tiny-llama", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}
    raw = post(json.dumps(body).encode(), "Connection: close")
    return talked(port, raw).startswith(b"HTTP/1.1 200")


def test_headers_that_do_not_end_are_given_up(patient):
    for start in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a"):
        began = time.monotonic()
        assert talked(patient.port, start) == b""
        assert time.monotonic() - began < 15
    # Nor do they after a whole request in the same connection.
    with socket.create_connection(("127.0.0.1", patient.port), timeout=30) as sock:
        sock.sendall(head("GET", "/health"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        assert sock.recv(65536) in (b"", b'{"status":"ok"}')


def test_headers_of_any_length_are_not_kept(patient):
    raw = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000
    assert not talked(patient.port, raw).startswith(b"HTTP/1.1 2")


def test_idle_connections_and_bodies_that_do_not_end_keep_nobody_out(patient):
    slow = head(
        "POST", "/v1/chat/completions", "Content-Type: application/json", "Content-Length: 9"
    )
    for start in (b"", slow):
        held = [socket.create_connection(("127.0.0.1", patient.port)) for _ in range(40)]
        for sock in held:
            if start:
                try:
                    sock.sendall(start)
                except ConnectionError:
                    continue
        assert honest(patient.port)
        for sock in held:
            sock.close()


def test_a_rush_of_connections_drops_none_that_asks(patient):
    state = patient.app.state.server.server_state
    with socket.create_connection(("127.0.0.1", patient.port)) as first:
        own = first.getsockname()
        until(lambda: any(one.client == own for one in state.connections))
        loop = next(one.loop for one in state.connections if one.client == own)
    loop.call_soon_threadsafe(time.sleep, 0.5)  # All of these wait for the server together.
    with socket.create_connection(("127.0.0.1", patient.port)) as asker:
        asker.sendall(head("GET", "/health"))
        rush = [socket.create_connection(("127.0.0.1", patient.port)) for _ in range(60)]
        asker.settimeout(10)
        assert asker.recv(64).startswith(b"HTTP/1.1 200")
    for sock in rush:
        sock.close()
    with socket.create_connection(("127.0.0.1", patient.port)) as asker:
        rush = [socket.create_connection(("127.0.0.1", patient.port)) for _ in range(18)]
        time.sleep(0.1)
        asker.sendall(head("GET", "/health"))
        asker.settimeout(10)
        assert asker.recv(64).startswith(b"HTTP/1.1 200")
        until(lambda: len(state.connections) <= 16)
    for sock in rush:
        sock.close()
    assert honest(patient.port)


def test_a_reply_that_nobody_reads_is_given_up(patient):
    body = {
        "model": "tiny-llama",
        "messages": [{"role": "user", "content": "a"}],
        "stream": True,
        "n": 4,  # One may end too soon to fill what is kept of it.
        "max_tokens": 64,
        "logprobs": True,
        "top_logprobs": 20,
    }
    state = patient.app.state.server.server_state
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", patient.port))
        own = sock.getsockname()
        until(lambda: any(one.client == own for one in state.connections))
        for one in list(state.connections):  # So that little of it fits into the kernel.
            if one.client == own:
                raw = one.transport.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        sock.sendall(post(json.dumps(body).encode()))
        until(lambda: not any(one.client == own for one in state.connections), seconds=10)
    until(lambda: patient.app.state.engine.running == 0)
    assert honest(patient.port)


@pytest.mark.parametrize("name", smuggling())
def test_nothing_is_answered_that_hides_behind_a_request(patient, name):
    got = talked(patient.port, smuggling()[name], quiet=0.4)
    assert b"smuggled" not in got
    assert b"HTTP/1.1 2" not in got
