"""`python -m bench.faults.http`: what strangers send a server while an honest client asks.

A server of a tiny random model runs in a process of its own, with a key and 1,024 files at most, as
a user's would. One honest client asks it for two tokens over and over while, by turns, somebody
sends headers and bodies that never end, a gigabyte, 27,000 messages, deep JSON or packed bodies,
opens 1,500 connections, reads no reply, pipelines, smuggles. The table tells what each was
answered, the honest client's slowest reply and the server's memory. It fails (status 1) where the
honest client is refused or waits longer than a bound, memory grows past one, or a reply is of 500
or above.

`--keys` guesses keys instead: it times wrong keys of several kinds, by turns, and fails where one
kind takes another time than the rest beyond chance and 5 microseconds.

`--schema` has schemathesis (in the environment that runs this) draw requests to all paths and
methods, and checks replies against `/openapi.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

KEY = "sk-3f9c0a7d5e1b2846-the-right-one"
CHAT = "/v1/chat/completions"
_BODY = {
    "model": "tiny-llama",
    "max_tokens": 2,
    "temperature": 0,
    "messages": [{"role": "user", "content": "a tree"}],
}
# Seconds that the honest client may wait; alone it waits for tens of milliseconds on a machine that
# has nothing else to do, and for up to 4 s on one that has five times too much.
_SLOWEST = 10.0
_GROWTH = 700.0  # MiB above what an idle server takes.


# The server's process -----------------------------------------------------------------------------


def serve_tiny() -> None:
    """A server of a tiny model, on a free port that it prints."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    import torch
    from tests.serve.parts import direction_of
    from tests.tiny import tiny_model

    from demur.serve.app import create_app
    from demur.serve.run import serve
    from demur.serve.settings import ServeSettings

    torch.set_num_threads(1)
    model = tiny_model()
    settings = ServeSettings(key=KEY, body_seconds=8, head_seconds=5, max_tokens=512)
    serve(create_app(model, directions={"way": direction_of(model)}, settings=settings), port=0)


class Server:
    """The process and where it listens."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.faults.http", "--serve"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        line = ""
        for line in self.process.stderr:
            if "serving" in line:
                break
        self.port = int(line.rpartition(":")[2].partition(",")[0])
        import threading

        self.said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def memory(self, *, peak: bool = False) -> float:
        """MiB resident, or the most since `forget`."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return int(found["VmHWM" if peak else "VmRSS"].split()[0]) / 1024

    def forget(self) -> None:
        """Have the peak count from now."""
        with suppress(OSError):
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", encoding="utf-8")

    def files(self) -> int:
        """How many are open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self) -> None:
        """Have it finish."""
        self.process.terminate()
        self.process.wait(60)


# Sending ------------------------------------------------------------------------------------------


def head(
    method: str, path: str, *more: str, key: str | None = KEY, host: str = "localhost"
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    return "\r\n".join([*lines, *more, "", ""]).encode("latin-1")


def post(body: bytes, *more: str, path: str = CHAT, kind: str = "application/json") -> bytes:
    return head("POST", path, f"Content-Type: {kind}", f"Content-Length: {len(body)}", *more) + body


async def exchanged(port: int, raw: bytes, seconds: float = 60.0) -> tuple[str, bytes]:
    """What comes back to some bytes: the statuses of all replies, and the whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        async with asyncio.timeout(seconds):
            with suppress(ConnectionError):
                writer.write(raw)
                await writer.drain()
            with suppress(ConnectionError):
                while part := await reader.read(65536):
                    got += part
                    if _whole(got) or (raw.startswith(b"HEAD") and b"\r\n\r\n" in got):
                        break
    except TimeoutError:
        return f"{statuses(got)} left open", got
    finally:
        writer.close()
    return statuses(got), got


async def everything(port: int, raw: bytes, seconds: float = 2.0) -> bytes:
    """What comes back until the server closes or is quiet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    with suppress(TimeoutError, ConnectionError):
        writer.write(raw)
        while True:
            async with asyncio.timeout(seconds):
                part = await reader.read(65536)
            if not part:
                break
            got += part
    writer.close()
    return got


def _whole(got: bytes) -> bool:
    """Whether a reply is there, as long as it says."""
    top, mark, rest = got.partition(b"\r\n\r\n")
    length = next(
        (line[15:] for line in top.lower().split(b"\r\n") if line.startswith(b"content-length:")),
        b"",
    )
    return bool(mark) and bool(length.strip()) and len(rest) >= int(length)


def statuses(got: bytes) -> str:
    found = [part[:3].decode("latin-1") for part in got.split(b"HTTP/1.1 ")[1:]]
    return (
        ", ".join(f"{k}" if n == 1 else f"{k} x{n}" for k, n in Counter(found).items()) or "closed"
    )


@dataclass
class Honest:
    """A client that asks for two tokens, ten times a second at most.

    Attributes:
        port: Of the server.
        took: Seconds of each reply.
        refused: What it was answered instead.
    """

    port: int
    took: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            began = time.monotonic()
            try:
                status, got = await exchanged(self.port, post(json.dumps(_BODY).encode()), 30)
            except OSError as error:
                status, got = type(error).__name__, b""
            self.took.append(time.monotonic() - began)
            if status != "200":
                self.refused.append(f"{status} {got[-200:]!r}")
            await asyncio.sleep(0.1)


# What strangers do --------------------------------------------------------------------------------

Attack = Callable[[int], Awaitable[str]]


async def _trickled(port: int, first: bytes, each: bytes, seconds: float) -> str:
    """Bytes one by one, each second, until the server has enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)
    began, got = time.monotonic(), b""
    try:
        while time.monotonic() - began < seconds:
            try:
                async with asyncio.timeout(1):
                    part = await reader.read(65536)
                    got += part
                    if not part:
                        return f"{statuses(got)} after {_rounded(time.monotonic() - began)}"
            except TimeoutError:
                pass
            writer.write(each)
            await writer.drain()
    except ConnectionError:
        return f"{statuses(got)} after {_rounded(time.monotonic() - began)}"
    finally:
        writer.close()
    return f"{statuses(got)} left open"


def _rounded(seconds: float) -> str:
    return f"{5 * round(seconds / 5)} s"


async def _all(*asked: Awaitable[str]) -> str:
    found = Counter(
        str(one) if isinstance(one, str) else type(one).__name__
        for one in await asyncio.gather(*asked, return_exceptions=True)
    )
    return "; ".join(f"{n} {what}" for what, n in found.most_common(4))


async def slow_heads(port: int) -> str:
    return await _all(
        *(
            _trickled(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"a", 25)
            for _ in range(200)
        )
    )


async def slow_bodies(port: int) -> str:
    first = head("POST", CHAT, "Content-Type: application/json", "Content-Length: 100000")
    return await _all(*(_trickled(port, first, b" ", 30) for _ in range(400)))


async def half_bodies(port: int) -> str:
    first = head("POST", CHAT, "Content-Type: application/json", "Content-Length: 1000000")
    return await _all(*(_trickled(port, first + b" " * 999_000, b"", 30) for _ in range(400)))


async def endless_chunks(port: int) -> str:
    first = head("POST", CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked")
    return await _all(*(_trickled(port, first, b"1\r\n \r\n", 30) for _ in range(50)))


async def gigabyte(port: int) -> str:
    async def send(first: bytes) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sent, part = 0, b" " * (1 << 20)
        try:
            writer.write(first)
            while sent < 1 << 30:
                writer.write(b"%x\r\n%b\r\n" % (len(part), part) if b"chunked" in first else part)
                await writer.drain()
                sent += len(part)
        except ConnectionError:
            pass
        got = b""
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(5):
                got = await reader.read(65536)
        writer.close()
        return f"{statuses(got)}"

    kind = "Content-Type: application/json"
    return await _all(
        send(head("POST", CHAT, kind, f"Content-Length: {1 << 30}")),
        send(head("POST", CHAT, kind, "Transfer-Encoding: chunked")),
    )


def bodies(make: Callable[[], bytes], *more: str, times: int = 10) -> Attack:
    async def attack(port: int) -> str:
        raw = post(await asyncio.to_thread(make), *more)

        async def one() -> str:
            return (await exchanged(port, raw))[0]

        return await _all(*(one() for _ in range(times)))

    return attack


def _messages() -> bytes:
    return json.dumps({**_BODY, "messages": [{"role": "user", "content": ""}] * 27_000}).encode()


def _long_message() -> bytes:
    return json.dumps({**_BODY, "messages": [{"role": "user", "content": "a " * 500_000}]}).encode()


def _ten_mb() -> bytes:
    return json.dumps(
        {**_BODY, "messages": [{"role": "user", "content": "a" * 10_000_000}]}
    ).encode()


def _numbers() -> bytes:
    return b'{"model": "tiny-llama", "seed": ' + b"9" * 1_000_000 + b"}"


def _keys() -> bytes:
    return json.dumps({f"k{i}": i for i in range(70_000)}).encode()


async def huge_headers(port: int) -> str:
    async def one() -> str:
        raw = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"a" * 50_000_000
        return (await exchanged(port, raw, 30))[0]

    async def many() -> str:
        raw = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 5_000_000
        return (await exchanged(port, raw, 30))[0]

    return await _all(one(), many())


async def idle(port: int) -> str:
    held, refused = [], 0
    for _ in range(1500):
        try:
            async with asyncio.timeout(2):
                held.append(await asyncio.open_connection("127.0.0.1", port))
        except (OSError, TimeoutError):
            refused += 1
    await asyncio.sleep(12)
    closed = 0
    for reader, writer in held:
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(0.01):
                await reader.read(1)
        closed += reader.at_eof() or reader.exception() is not None
        writer.close()
    return f"{len(held)} opened, {refused} refused, {closed} closed by the server within 12 s"


async def no_reader(port: int) -> str:
    import socket

    body = {
        **_BODY,
        "stream": True,
        "n": 8,
        "max_tokens": 512,
        "logprobs": True,
        "top_logprobs": 20,
    }
    raw, held = post(json.dumps(body).encode()), []
    for _ in range(4):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        with suppress(BlockingIOError):
            sock.connect(("127.0.0.1", port))
        await asyncio.sleep(0.1)
        sock.send(raw)
        held.append(sock)
    await asyncio.sleep(45)
    gone = 0
    for sock in held:
        with suppress(BlockingIOError):
            try:
                while sock.recv(1 << 20):
                    pass
                gone += 1
            except ConnectionError:
                gone += 1
        sock.close()
    return f"{gone} of {len(held)} replies that nobody read were given up"


async def pipelined(port: int) -> str:
    raw = head("GET", "/health", key=None) * 20_000
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    count = 0
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(10):
            while part := await reader.read(1 << 16):
                count += part.count(b"HTTP/1.1 200")
    writer.close()
    return f"{count} of 20,000 answered in 10 s"


_SMUGGLED = head("GET", "/smuggled", key=None)


def smuggling() -> dict[str, bytes]:
    """Requests whose end two servers may see in two places; what follows must not be answered."""
    kind = "Content-Type: application/json"
    chunks = b"0\r\n\r\n" + _SMUGGLED

    def sent(*more: str, body: bytes = chunks) -> bytes:
        return head("POST", CHAT, kind, *more) + body

    n = f"Content-Length: {len(chunks)}"
    return {
        "length and chunks": sent(n, "Transfer-Encoding: chunked"),
        "chunks and length": sent("Transfer-Encoding: chunked", n),
        "two lengths": sent("Content-Length: 5", n),
        "a list of lengths": sent(f"Content-Length: 5, {len(chunks)}"),
        "a signed length": sent("Content-Length: +5"),
        "a negative length": sent("Content-Length: -1"),
        "a length in hexadecimal": sent("Content-Length: 0x5"),
        "xchunked": sent("Transfer-Encoding: xchunked"),
        "chunked, identity": sent("Transfer-Encoding: chunked, identity"),
        "a space before the colon": sent("Transfer-Encoding : chunked"),
        "a folded header": sent("Transfer-Encoding:\r\n chunked", n),
        "a bare line feed": sent("X: y\nTransfer-Encoding: chunked", n),
        "a NUL in a header": sent("X: a\0b", n),
        "chunk of negative size": sent("Transfer-Encoding: chunked", body=b"-1\r\n" + chunks),
        "chunk too large to count": sent(
            "Transfer-Encoding: chunked", body=b"f" * 20 + b"\r\n" + chunks
        ),
        "two hosts": head("GET", "/health", "Host: evil.example"),
        "no host": b"GET /health HTTP/1.1\r\n\r\n",
        "another protocol": b"\x16\x03\x01\x02\x00\x01\x00" + _SMUGGLED,
    }


async def smuggled(port: int) -> str:
    found = []
    for name, raw in smuggling().items():
        got = await everything(port, raw)
        if b"smuggled" in got or b"HTTP/1.1 2" in got:
            found.append(f"{name}: {statuses(got)}")
    told = f"{len(smuggling()) - len(found)} of {len(smuggling())} refused"
    return "; ".join([told, *(f"LEAKS {one}" for one in found)])


async def methods(port: int) -> str:
    found: Counter[str] = Counter()
    for method in ("HEAD", "OPTIONS", "TRACE", "CONNECT", "PUT", "DELETE", "PATCH", "FOO"):
        for path in (CHAT, "/v1/models", "/health", "/"):
            status, got = await exchanged(port, head(method, path), 3)
            if b"access-control" in got.lower() or (method == "TRACE" and KEY.encode() in got):
                status += " TELLS"
            found[status] += 1
    return ", ".join(f"{status}: {n}" for status, n in found.most_common())


async def strangers(port: int) -> str:
    """What a page from elsewhere may have a browser send, and a name that points here."""
    body = json.dumps(_BODY).encode()
    asked = [post(body, kind=kind) for kind in ("text/plain", "application/x-www-form-urlencoded")]
    asked += [post(body, kind="multipart/form-data; boundary=x"), post(body, kind="")]
    asked += [post(body, f"Origin: {one}") for one in ("http://evil.example", "null")]
    asked += [post(body, "Sec-Fetch-Site: cross-site")]
    hosts = ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "localhost@evil")
    asked += [head("GET", "/v1/models", host=host) for host in hosts]
    found = Counter([(await exchanged(port, raw, 5))[0] for raw in asked])
    return ", ".join(f"{status}: {n}" for status, n in found.items())


async def paths(port: int) -> str:
    """Ways out of the folders that are shown."""
    ways = ("..%2f..%2fetc%2fpasswd", "%252e%252e%252fetc", "..%5c..%5cetc", "%00", "%c0%ae%c0%ae")
    ways += ("%e2%80%a5", "%ef%bc%8f..", "../../../etc/passwd", "....//", "%2e%2e", "a%0d%0aX:%20y")
    found: Counter[str] = Counter()
    for way in ways:
        for path in (f"/demur/runs/{way}/report", f"/{way}", f"/v1/models/{way}"):
            status, got = await exchanged(port, head("GET", path), 5)
            found[status + (" LEAKS" if b"root:" in got or b"\nX: y" in got else "")] += 1
    return ", ".join(f"{status}: {n}" for status, n in found.items())


async def _waited(port: int) -> str:
    del port
    await asyncio.sleep(5)
    return ""


ATTACKS: dict[str, Attack] = {
    "nothing: the honest client alone": _waited,
    "200 clients, headers one byte a second": slow_heads,
    "400 clients, bodies one byte a second": slow_bodies,
    "400 clients, 999 of 1,000 kB, then silence": half_bodies,
    "50 clients, chunks without end": endless_chunks,
    "1 GiB, with its length and in chunks": gigabyte,
    "27,000 messages, 10 at once": bodies(_messages),
    "one message of 1 MB, 10 at once": bodies(_long_message),
    "one message of 10 MB": bodies(_ten_mb),
    "JSON 500,000 deep": bodies(lambda: b"[" * 500_000),
    "a number of 1,000,000 digits": bodies(_numbers),
    "70,000 keys that nobody knows": bodies(_keys),
    "a gigabyte in gzip": bodies(
        lambda: gzip.compress(b" " * (1 << 30))[:1_000_000], "Content-Encoding: gzip"
    ),
    "headers of 50 MB, 5,000,000 headers": huge_headers,
    "1,500 connections that say nothing": idle,
    "4 readers of 8 long streams that read nothing": no_reader,
    "20,000 requests in one connection": pipelined,
    "smuggling": smuggled,
    "HEAD, OPTIONS, TRACE and others": methods,
    "from a page elsewhere; a name that points here": strangers,
    "paths that lead out": paths,
}


async def attacked(server: Server, only: str | None) -> bool:
    base = server.memory()
    print(f"idle: {base:.0f} MiB, {server.files()} files")
    print(
        "| what | answered | honest: replies, median, slowest (s) | refused | memory, peak (MiB) |"
    )
    print("|---|---|---|---|---|")
    good = True
    for name, attack in ATTACKS.items():
        if only is not None and only not in name:
            continue
        server.forget()
        honest = Honest(server.port)
        asking = asyncio.create_task(honest.run())
        await asyncio.sleep(0.5)
        try:
            outcome = await attack(server.port)
        except OSError as error:
            outcome = type(error).__name__
        await asyncio.sleep(0.5)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        peak = server.memory(peak=True)
        slowest = max(honest.took, default=float("inf"))
        fine = slowest < _SLOWEST and not honest.refused and peak < base + _GROWTH
        fine = fine and not re.search(r"\b50\d\b|LEAKS|TELLS|left open", outcome)
        good = good and fine
        print(
            f"| {name} | {outcome} | {len(honest.took)}, {statistics.median(honest.took):.3f}, "
            f"{slowest:.2f} | {len(honest.refused)} | {server.memory():.0f}, {peak:.0f} |"
            f"{'' if fine else ' WRONG ' + ' '.join(honest.refused[:1])}",
            flush=True,
        )
    await asyncio.sleep(8)
    odd = [line for line in server.said if KEY in line or "Traceback" in line or "Error" in line]
    print(
        f"after: {server.memory():.0f} MiB, {server.files()} files; {len(odd)} odd lines in the log"
    )
    print("".join(odd[:10]))
    return good and not odd


# Keys ---------------------------------------------------------------------------------------------


def wrong_keys() -> dict[str, bytes]:
    """Kinds of wrong keys; the first is what the others are held against."""
    right = KEY.encode()
    return {
        "wrong from the first letter": b"X" + right[1:],
        "right but for the last letter": right[:-1] + b"X",
        "right for half": right[: len(right) // 2] + b"X" * (len(right) - len(right) // 2),
        "cut by one": right[:-1],
        "longer by one": right + b"X",
        "one letter": b"X",
        "the same length, not ASCII": b"\xff" * len(right),
    }


def guessed(server: Server, n: int) -> bool:
    """Time wrong keys over one connection, by turns; print the differences."""
    import socket

    kinds = {
        name: b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
        + key
        + b"\r\n\r\n"
        for name, key in wrong_keys().items()
    }
    took: dict[str, list[float]] = {name: [] for name in kinds}
    answers: set[bytes] = set()
    order, rng = list(kinds), random.Random(0)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for turn in range(n + 50):
            rng.shuffle(order)
            for name in order:
                began = time.perf_counter_ns()
                sock.sendall(kinds[name])
                got = b""
                while not _whole(got):
                    got += sock.recv(65536)
                passed = (time.perf_counter_ns() - began) / 1000
                answers.add(got)
                if turn >= 50:
                    took[name].append(passed)
    print(f"{n} requests of each kind, by turns; {len(answers)} answer to all of them")
    print("| wrong key | median, us | difference, us | 95 % of it (bootstrap, 2,000 draws) |")
    print("|---|---|---|---|")
    names = list(kinds)
    good = len(answers) == 1
    for name in names:
        middle = statistics.median(took[name])
        if name == names[0]:
            print(f"| {name} | {middle:.1f} | | |")
            continue
        low, high = _interval(took[name], took[names[0]])
        difference = middle - statistics.median(took[names[0]])
        beyond = low > 5 or high < -5
        good = good and not beyond
        print(f"| {name} | {middle:.1f} | {difference:+.1f} | [{low:+.1f}, {high:+.1f}] |")
    return good


def _interval(one: list[float], other: list[float], draws: int = 2000) -> tuple[float, float]:
    import numpy as np

    rng = np.random.default_rng(0)
    found = [
        np.median(rng.choice(one, len(one))) - np.median(rng.choice(other, len(other)))
        for _ in range(draws)
    ]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


# The schema ---------------------------------------------------------------------------------------


def conforms(server: Server, count: int) -> bool:
    """Have schemathesis ask for everything; whether all that comes back is in the schema."""
    program = str(Path(sys.executable).parent / "schemathesis")
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    done = subprocess.run(
        [
            *(program, "run", url, "-H", f"Authorization: Bearer {KEY}", "-n", str(count)),
            *(
                "--phases",
                "examples,coverage,fuzzing",
                "--exclude-checks",
                "positive_data_acceptance",
            ),
            *("--continue-on-failure", "--seed", "0", "--no-color"),
        ],
        check=False,
    )
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", action="store_true")
    parser.add_argument("--schema", action="store_true")
    parser.add_argument("--only", help="what has this in its name")
    parser.add_argument("-n", type=int, help="requests of a kind")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve_tiny()
        return
    server = Server()
    try:
        if asked.keys:
            good = guessed(server, asked.n or 2000)
        elif asked.schema:
            good = conforms(server, asked.n or 100)
        else:
            good = asyncio.run(attacked(server, asked.only))
    finally:
        server.stop()
    print("pass" if good else "fail")
    sys.exit(not good)


if __name__ == "__main__":
    main()
