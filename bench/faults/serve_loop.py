"""`python -m bench.faults.serve_loop --minutes 120`: does a server's memory stay flat?

Starts `demur serve` as a user would, with an anchor, and sends it what clients send and what they
should not: chats, streams, log-probabilities, traces, long prompts, several at once, bodies that
are refused, clients that leave in the middle; prompts of all lengths first. Once a minute it reads
the server's memory, threads and open files. Fails (status 1) if memory at the end is more than 5 %
over that after warming up, if threads or files are more, or if any reply has a status of 500 or
above.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

_TOPICS = ("rivers", "bread", "chess", "the moon", "tides", "bicycles", "violins", "maps", "wool")
_TEXT = "Tell me about {topic}, and say in plain words why people like it. "
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Reading:
    """The server at one moment: MiB resident, threads, open files, requests until then."""

    minute: float
    resident: float
    peak: float
    threads: int
    files: int
    requests: int


@dataclass
class Sent:
    """What was sent and what came back."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    left: int = 0
    worst: float = 0.0


def reading(pid: int, began: float, sent: Sent) -> Reading:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    mib = {name: int(found[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")}
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    minute = (time.monotonic() - began) / 60
    threads = int(found["Threads"])
    return Reading(
        minute, mib["VmRSS"], mib["VmHWM"], threads, files, sum(sent.statuses.values()) + sent.left
    )


def body(rng: random.Random, model: str, *, long: bool = False, **more: Any) -> dict[str, Any]:
    text = _TEXT.format(topic=rng.choice(_TOPICS)) * (rng.randrange(10, 30) if long else 1)
    turns = [{"role": "user", "content": text}]
    if rng.random() < 0.2:
        turns = [*turns, {"role": "assistant", "content": "Gladly."}, *turns]
    return {"model": model, "messages": turns, "max_tokens": rng.randrange(1, 12)} | more


async def _chat(own: httpx.AsyncClient, rng: random.Random, model: str, sent: Sent) -> None:
    more: dict[str, Any] = {"temperature": rng.choice((0, 0.7))}
    if rng.random() < 0.3:
        more |= {"logprobs": True, "top_logprobs": rng.randrange(5)}
    await _post(own, "/v1/chat/completions", body(rng, model, **more), sent)


async def _long(own: httpx.AsyncClient, rng: random.Random, model: str, sent: Sent) -> None:
    await _post(own, "/v1/chat/completions", body(rng, model, long=True), sent)


async def _burst(own: httpx.AsyncClient, rng: random.Random, model: str, sent: Sent) -> None:
    await asyncio.gather(*(_chat(own, rng, model, sent) for _ in range(rng.randrange(2, 7))))


async def _trace(own: httpx.AsyncClient, rng: random.Random, model: str, sent: Sent) -> None:
    asked = body(rng, model)
    one = {k: asked[k] for k in ("messages",)} | {"direction": "anchor", "max_tokens": 2}
    await _post(own, "/demur/trace", one, sent)


async def _refused(own: httpx.AsyncClient, rng: random.Random, model: str, sent: Sent) -> None:
    good = body(rng, model)
    bad = [
        good | {"model": "another"},
        good | {"max_tokens": -1},
        good | {"messages": []},
        good | {"temperature": "hot"},
        {"model": model},
    ]
    await _post(own, "/v1/chat/completions", rng.choice(bad), sent)


async def _garbled(own: httpx.AsyncClient, rng: random.Random, model: str, sent: Sent) -> None:
    raw = json.dumps(body(rng, model)).encode()
    raw = raw[: rng.randrange(len(raw))] + bytes(rng.randrange(256) for _ in range(4))
    reply = await own.post(
        "/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
    )
    sent.statuses[str(reply.status_code)] += 1


async def _stream(own: httpx.AsyncClient, rng: random.Random, model: str, sent: Sent) -> None:
    whole = body(rng, model, stream=True)
    async with own.stream("POST", "/v1/chat/completions", json=whole) as reply:
        async for _ in reply.aiter_lines():
            pass
        sent.statuses[str(reply.status_code)] += 1


async def _leave(own: httpx.AsyncClient, rng: random.Random, model: str, sent: Sent) -> None:
    whole = body(rng, model, stream=rng.random() < 0.5) | {"max_tokens": 200}
    try:
        async with asyncio.timeout(rng.uniform(0.02, 0.8)):
            async with own.stream("POST", "/v1/chat/completions", json=whole) as reply:
                async for _ in reply.aiter_lines():
                    pass
                sent.statuses[str(reply.status_code)] += 1
    except TimeoutError:
        sent.left += 1


async def _page(own: httpx.AsyncClient, rng: random.Random, _model: str, sent: Sent) -> None:
    path = rng.choice(("/", "/health", "/metrics", "/v1/models", "/openapi.json", "/nowhere"))
    reply = await own.get(path)
    sent.statuses[str(reply.status_code)] += 1


async def _post(own: httpx.AsyncClient, path: str, asked: dict[str, Any], sent: Sent) -> None:
    began = time.monotonic()
    reply = await own.post(path, json=asked)
    sent.worst = max(sent.worst, time.monotonic() - began)
    sent.statuses[str(reply.status_code)] += 1


async def _warm(own: httpx.AsyncClient, model: str, sent: Sent) -> None:
    """Prompts of all lengths, alone and together, so that each kernel has been made once."""
    rng = random.Random(1)
    for times in range(1, 31):
        text = _TEXT.format(topic="rivers") * times
        asked = body(rng, model) | {"messages": [{"role": "user", "content": text}]}
        together = 1 + (times % 6)
        await asyncio.gather(
            *(_post(own, "/v1/chat/completions", asked, sent) for _ in range(together))
        )
        if times % 10 == 1:
            await _trace(own, rng, model, sent)


_KINDS = (_chat, _long, _burst, _trace, _refused, _garbled, _stream, _leave, _page)
_WEIGHTS = (5, 1, 1, 1, 1, 1, 3, 1, 1)


async def send(
    url: str, model: str, pid: int, *, minutes: float, every: float, out: Path | None
) -> tuple[Sent, list[Reading]]:
    import httpx

    sent, readings, rng = Sent(), [], random.Random(0)
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=300) as own:
        await _warm(own, model, sent)
        began = time.monotonic()
        while (now := time.monotonic() - began) < minutes * 60:
            if not readings or now - readings[-1].minute * 60 >= 60:
                readings.append(reading(pid, began, sent))
                print(_line(readings[-1]), flush=True)
                if out is not None:
                    _keep(out, sent, readings)
            kind = rng.choices(_KINDS, _WEIGHTS)[0]
            sent.kinds[kind.__name__.strip("_")] += 1
            await kind(own, rng, model, sent)
            pause = every - (time.monotonic() - began - now)
            await asyncio.sleep(max(0.0, pause))
        await asyncio.sleep(2)
        readings.append(reading(pid, began, sent))
        print(_line(readings[-1]), flush=True)
    return sent, readings


def _line(one: Reading) -> str:
    return (
        f"minute {one.minute:6.1f}: {one.resident:7.1f} MiB (at most {one.peak:.1f}), "
        f"{one.threads} threads, {one.files} files, {one.requests} requests"
    )


def _keep(out: Path, sent: Sent, readings: list[Reading]) -> None:
    whole = {
        "readings": [asdict(one) for one in readings],
        "kinds": dict(sent.kinds),
        "statuses": dict(sent.statuses),
        "left": sent.left,
        "slowest_s": sent.worst,
    }
    out.write_text(json.dumps(whole, indent=1), encoding="utf-8")


def judged(sent: Sent, readings: list[Reading], warm: float) -> bool:
    """Print what was found; whether memory, threads and files stayed where they were."""
    kept = [one for one in readings if one.minute >= warm]
    tenth = max(3, len(kept) // 10)
    first, last = kept[:tenth], kept[-tenth:]

    def middle(rows: list[Reading], name: str) -> float:
        return statistics.median(getattr(one, name) for one in rows)

    before, after = middle(first, "resident"), middle(last, "resident")
    print("requests by kind:", ", ".join(f"{k} {n}" for k, n in sorted(sent.kinds.items())))
    print("statuses:", ", ".join(f"{k}: {n}" for k, n in sorted(sent.statuses.items())))
    print(f"{sent.left} clients left in the middle; slowest reply {sent.worst:.1f} s")
    print(
        f"resident memory, median of {tenth} readings: {before:.0f} MiB from minute {warm:g} on, "
        f"{after:.0f} MiB at the end ({after / before - 1:+.1%})"
    )
    rows = [(one.requests / 1000, one.resident) for one in kept]
    if len(rows) > 2:
        slope = statistics.linear_regression(*zip(*rows, strict=True)).slope
        print(f"slope {slope:+.2f} MiB per 1,000 requests")
    flat = after <= before * (1 + _TOLERANCE)
    # Requests under way hold some; what is never given back raises the least that is seen.
    third = max(3, len(kept) // 3)

    def least(rows: list[Reading], name: str) -> float:
        return min(getattr(one, name) for one in rows)

    still = all(
        least(kept[-third:], name) <= least(kept[:third], name) + 1 for name in ("threads", "files")
    )
    broken = sum(n for status, n in sent.statuses.items() if int(status) >= 500)
    print(f"threads and files {'as before' if still else 'grew'}; {broken} of 500 or above")
    good = flat and still and not broken
    print("pass" if good else "fail")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--anchor", type=Path, help="anchor file of `demur anchor fit`")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--warm", type=float, default=15.0, help="minutes before the first reading")
    parser.add_argument("--every", type=float, default=1.5, help="seconds from request to request")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON of all readings")
    asked = parser.parse_args()
    command = [sys.executable, "-m", "demur.cli", "serve", asked.model, "--port", "0"]
    command += ["--dtype", asked.dtype]
    if asked.anchor is not None:
        command += ["--anchor", str(asked.anchor)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as p:
        try:
            url = _url(p)
            sent, readings = asyncio.run(
                send(
                    url,
                    asked.model,
                    p.pid,
                    minutes=asked.minutes,
                    every=asked.every,
                    out=asked.out,
                )
            )
        finally:
            p.send_signal(signal.SIGINT)
    if asked.out is not None:
        _keep(asked.out, sent, readings)
    sys.exit(not judged(sent, readings, min(asked.warm, asked.minutes / 4)))


def _url(server: subprocess.Popen[str]) -> str:
    """The address that the server prints when it is ready; its log is read on, and dropped."""
    import re
    import threading

    assert server.stdout is not None
    seen = ""
    for line in server.stdout:
        seen += line
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return found[0]
    raise SystemExit(f"the server did not start:\n{seen}")


if __name__ == "__main__":
    main()
