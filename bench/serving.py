"""`python -m bench.serving`: many clients of the server beside one reply after the other.

Both run in one process on the same prompts, by turns. Clients run in a process of their own.
`--fuzz` sends bodies drawn from the OpenAPI schema, and malformed ones, and looks for a status of
500 or above, which fails it, and for memory that grows; `--model tiny` is a random one, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from demur.models import Model

_PATHS = ("/v1/chat/completions", "/v1/completions", "/demur/trace")
_JSON = {"content-type": "application/json"}


# The clients' process -----------------------------------------------------------------------------


def clients(task: Path) -> None:
    """Send what a task asks for, and print what came back as JSON."""
    import asyncio

    print(json.dumps(asyncio.run(_clients(json.loads(task.read_text(encoding="utf-8"))))))


async def _clients(task: dict[str, Any]) -> dict[str, Any]:
    import asyncio

    import httpx

    waiting = list(enumerate(task["prompts"]))
    waiting.reverse()
    found: dict[int, Any] = {}
    killed = 0

    async def one(own: httpx.AsyncClient, number: int, prompt: str) -> None:
        body = {
            "model": task["model"],
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": task["tokens"],
            "temperature": 0,
        }
        began = time.perf_counter()
        first = None
        if number % 2:
            text = ""
            whole = {**body, "stream": True}
            async with own.stream("POST", "/v1/chat/completions", json=whole) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            delta = choice["delta"].get("content") or ""
                            first = first or (delta and time.perf_counter() - began) or None
                            text += delta
        else:
            reply = await own.post("/v1/chat/completions", json=body)
            text = reply.json()["choices"][0]["message"]["content"]
        found[number] = [text, time.perf_counter() - began, first]

    async def client(own: httpx.AsyncClient) -> None:
        while waiting:
            await one(own, *waiting.pop())

    async def killer(own: httpx.AsyncClient, seed: int) -> None:
        """Leaves in the middle of a stream, or before the reply has begun."""
        nonlocal killed
        rng = random.Random(seed)
        for prompt in rng.sample(task["prompts"], task["kills"]):
            body = {
                "model": task["model"],
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": task["tokens"],
                "stream": rng.random() < 0.5,
            }
            try:
                async with asyncio.timeout(rng.uniform(0.05, 2.0)):
                    async with own.stream("POST", "/v1/chat/completions", json=body) as reply:
                        async for _ in reply.aiter_lines():
                            pass
            except TimeoutError:
                killed += 1

    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(
        base_url=task["url"], trust_env=False, timeout=600, limits=limits
    ) as own:
        began = time.perf_counter()
        leaving = [killer(own, seed) for seed in range(2)] if task["kills"] else []
        await asyncio.gather(*(client(own) for _ in range(task["clients"])), *leaving)
        return {
            "seconds": time.perf_counter() - began,
            "replies": [found.get(i) for i in range(len(task["prompts"]))],
            "killed": killed,
        }


# The server ---------------------------------------------------------------------------------------


@contextmanager
def _served(app: Any) -> Iterator[str]:
    from demur.serve.run import serve

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=serve, args=(app,), kwargs={"sock": sock})
        thread.start()
        while not getattr(getattr(app.state, "server", None), "started", False):
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            app.state.server.should_exit = True
            thread.join()


def _asked(url: str, name: str, prompts: Sequence[str], **more: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"
        whole = {"url": url, "model": name, "prompts": list(prompts), **more}
        task.write_text(json.dumps(whole), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "bench.serving", "--clients-of", str(task)],
            check=True,
            capture_output=True,
            text=True,
        )
    return json.loads(done.stdout)


def _gap(model: Model, prompt: str, mine: str, theirs: str) -> float:
    """How much less likely the other reply's token was where two replies part, in logits."""
    assert model.template is not None
    first, second = (model.template.reply_ids(text) for text in (mine, theirs))
    at = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    logits = model.logits(model.encode([prompt], [first[:at]]))[0]
    ends = model.stop_ids[0]
    a = first[at] if at < len(first) else ends
    b = second[at] if at < len(second) else ends
    return float(logits[a] - logits[b])


def load(model: Model, prompts: Sequence[str], tokens: int, n: int, repeats: int) -> dict[str, Any]:
    """Replies one after the other and through the server, by turns."""
    from demur.serve.app import create_app
    from demur.serve.settings import ServeSettings

    model.generate(prompts[:1], max_new_tokens=4)
    rows: list[dict[str, Any]] = []
    expected: list[Any] = []
    settings = ServeSettings(batch=n, queue=4 * n)
    for _ in range(repeats):
        latencies, began, used = [], time.perf_counter(), time.process_time()
        expected = []
        for prompt in prompts:
            start = time.perf_counter()
            expected += model.generate([prompt], max_new_tokens=tokens)
            latencies.append(time.perf_counter() - start)
        seconds, spent = time.perf_counter() - began, time.process_time() - used
        written = sum(len(one.ids) for one in expected)
        rows.append({"what": "sequential", "seconds": seconds, "cpu": spent, "tokens": written})
        rows[-1] |= _percentiles(latencies)
        for kills in (0, 6):
            app = create_app(model, settings=settings)
            with _served(app) as url:
                used = time.process_time()
                got = _asked(url, model.name, prompts, tokens=tokens, clients=n, kills=kills)
                busy = time.process_time() - used
                left = app.state.engine.running + app.state.engine.waiting
            replies = got["replies"]
            lost = sum(one is None for one in replies)
            parted = [
                (i, one[0])
                for i, one in enumerate(replies)
                if one is not None and one[0] != expected[i].text
            ]
            gaps = [_gap(model, prompts[i], expected[i].text, text) for i, text in parted]
            rows.append(
                {
                    "what": f"{n} clients" + (f", {got['killed']} killed" if kills else ""),
                    "seconds": got["seconds"],
                    "tokens": written,
                    "cpu": busy,
                    "ratio": seconds / got["seconds"],
                    "cpu ratio": spent / busy,
                    "lost": lost,
                    "same": len(prompts) - len(parted) - lost,
                    "parted at a gap of at most": max(gaps, default=0.0),
                    "left running": left,
                    **_percentiles([one[1] for one in replies if one is not None]),
                    "first token p50": _percentile([o[2] for o in replies if o and o[2]], 50),
                }
            )
    return {"model": repr(model), "prompts": len(prompts), "tokens": tokens, "rows": rows}


def _percentile(values: Sequence[float], q: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[q - 1] if values else 0.0


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {"p50": _percentile(values, 50), "p95": _percentile(values, 95)}


def _show(found: dict[str, Any]) -> None:
    print(f"{found['model']}: {found['prompts']} prompts, up to {found['tokens']} tokens each")
    for row in found["rows"]:
        line = (
            f"  {row['what']:<24} {row['seconds']:6.1f} s {row['tokens'] / row['seconds']:6.0f} "
            f"tokens/s  p50 {row['p50']:5.2f} s  p95 {row['p95']:5.2f} s"
        )
        if "ratio" in row:
            line += (
                f"  {row['ratio']:4.2f}x by the wall, {row['cpu ratio']:4.2f}x by CPU seconds  "
                f"first token {row['first token p50']:.2f} s  "
                f"same {row['same']}, lost {row['lost']}, left {row['left running']}, "
                f"parted at gaps up to {row['parted at a gap of at most']:.3f}"
            )
        print(line)


# Bodies drawn from the schema ---------------------------------------------------------------------


def _bodies(app: Any, count: int, name: str) -> list[tuple[str, bytes]]:
    import warnings

    import schemathesis  # pyright: ignore[reportMissingImports]
    from schemathesis import GenerationMode  # pyright: ignore[reportMissingImports]

    schema = schemathesis.openapi.from_dict(app.openapi())
    out: list[tuple[str, bytes]] = []
    rng = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in _PATHS:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                strategy = schema[path]["POST"].as_strategy(generation_mode=mode)
                out += [(path, _bytes(body, name, rng)) for body in _drawn(strategy, count // 6)]
    return out


def _drawn(strategy: Any, count: int) -> list[Any]:
    import hypothesis

    kept: list[Any] = []

    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=_all_of(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=strategy)
    def draw(case: Any) -> None:
        kept.append(case.body)

    draw()
    return kept


def _all_of(kind: Any) -> list[Any]:
    return list(kind)


_REFUSED = {
    *("frequency_penalty", "presence_penalty", "logit_bias", "tools", "tool_choice", "functions"),
    *("function_call", "response_format", "modalities", "audio", "prediction", "best_of", "suffix"),
    *("reasoning_effort", "verbosity", "web_search_options", "stream_options"),
}


def _mended(body: dict[str, Any], name: str, rng: random.Random) -> dict[str, Any]:
    """A body that may get as far as the model: what is drawn is mostly refused at once."""
    needed = {"model", "messages", "prompt", "direction"}
    kept = {k: v for k, v in body.items() if k in needed or rng.random() < 0.4}
    kept = {k: v for k, v in kept.items() if k not in _REFUSED}
    kept |= {"direction": "way"} if "direction" in kept else {"model": name}
    if rng.random() < 0.8 and "messages" in kept:
        kept["messages"] = [{"role": "user", "content": str(body["messages"])[:300] or "a"}]
    return kept


def _bytes(body: Any, name: str, rng: random.Random) -> bytes:
    if isinstance(body, bytes):
        return body
    if isinstance(body, dict) and rng.random() < 0.7:
        body = _mended(body, name, rng)
    try:
        raw = json.dumps(body, default=str).encode()
    except (TypeError, ValueError):
        raw = str(body).encode("utf-8", "replace")
    if rng.random() < 0.1:  # Cut, or with a byte changed.
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] if rng.random() < 0.5 else raw[:at] + bytes([rng.randrange(256)]) + raw[at:]
    return raw


def _memory() -> float:
    """Resident memory, MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


_EVERY = 100  # Requests between two looks at the memory.


def fuzz(app: Any, name: str, *, count: int, rounds: int = 3) -> dict[str, Any]:
    """Send bodies several times over; the first round is for caches to fill."""
    import httpx

    bodies = _bodies(app, count, name)
    statuses, memory = Counter[int](), list[tuple[int, float]]()
    worst: list[str] = []
    sent = 0
    with _served(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=600) as own:
        before = _memory()
        for _ in range(rounds):
            for path, raw in bodies:
                reply = own.post(path, content=raw, headers=_JSON)
                statuses[reply.status_code] += 1
                sent += 1
                if reply.status_code >= 500:
                    worst.append(f"{path} {reply.status_code} {raw[:300]!r} {reply.text[:300]}")
                if sent % _EVERY == 0:
                    memory.append((sent, _memory()))
        after = _memory()
    settled = [one for one in memory if one[0] > len(bodies)]
    slope = None
    if len(settled) > 1:
        slope = 1000 * statistics.linear_regression(*zip(*settled, strict=True)).slope
    return {
        "bodies": len(bodies),
        "sent": sent,
        "statuses": dict(sorted(statuses.items())),
        "before": before,
        "after": after,
        "slope": slope,
        "worst": worst,
    }


def _fuzzed(model: Model, count: int, *, whole: bool) -> bool:
    """Fuzz a server of a model and print what came of it; whether nothing failed."""
    import torch

    from demur.directions import Direction
    from demur.serve.app import create_app
    from demur.serve.settings import ServeSettings
    from demur.sites import Site

    way = Direction.from_vector(
        torch.ones(model.d_model), site=Site(1, "resid_pre"), position=-1, recipe="bench"
    )
    # An anchor that opens on some requests, and requests that may go without it.
    more: dict[str, Any] = {}
    if whole:
        from tests.serve.parts import anchor_of, guard_of

        more = {"guard": guard_of(model, 0.6), "anchor": anchor_of(model, 0.6)}
    settings = ServeSettings(max_tokens=2, temperature=0, opt_out=whole)
    app = create_app(model, directions={"way": way}, settings=settings, **more)
    found = fuzz(app, model.name, count=count)
    failures = len(found["worst"])
    told = ", ".join(f"{status}: {times}" for status, times in found["statuses"].items())
    slope = "" if found["slope"] is None else f", {found['slope']:+.2f} MiB per 1,000 requests"
    print(f"{model!r}: {found['bodies']} bodies, {found['sent']} requests")
    print(f"statuses {told}; {failures} of 500 or above")
    print(f"resident memory {found['before']:.0f} -> {found['after']:.0f} MiB{slope} after round 1")
    print("\n".join(found["worst"][:20]) or "no reply of 500 or above")
    print("fail" if failures else "pass")
    return not failures


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="bench.serving", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="`tiny` is for `--fuzz` alone")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--fuzz", action="store_true")
    parser.add_argument("--bodies", type=int, default=1000)
    parser.add_argument("--clients-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clients_of is not None:
        clients(args.clients_of)
        return
    if args.model == "tiny":
        if not args.fuzz:
            parser.error("`--model tiny` goes with `--fuzz`")
        from tests.tiny import tiny_model

        # With guard and anchor, which nobody has to fit on a random model.
        sys.exit(not _fuzzed(tiny_model(), args.bodies, whole=True))
    import torch

    from demur.models import load as load_model
    from demur.prompts import load as load_prompts

    model = load_model(args.model)
    if args.dtype == "bfloat16":
        model = model.twin(torch.bfloat16)
    if args.fuzz:
        sys.exit(not _fuzzed(model, args.bodies, whole=False))
    texts = load_prompts("contrast_pairs?kind=near").texts[: args.prompts]
    _show(load(model, texts, args.tokens, args.clients, args.repeats))


if __name__ == "__main__":
    main()
