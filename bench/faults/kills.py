"""`python -m bench.faults.kills --kills 50`: is anything lost, or different, after kills?

Runs `demur audit`, `demur organism train`, `demur anchor fit` and `demur sweep` on tiny models and
sends SIGKILL at moments drawn uniformly over the time that a whole run takes, then the same command
again, and so on until it ends. Of a sweep the coordinator is killed alone, with its workers, or one
worker is. After every kill each file at a final name is read; after every end the figures are
compared bit for bit with those of a run that nobody disturbed. `--points` also goes through every
call that changes the disk: the folder is copied before each, and once more with the file cut in
half where it is about to be synced, which is what a kill or a power cut would leave; copies are
read, and `--resumes` of them are gone on from. `--signal int` and `term` send these instead.

Fails (status 1) if a file is damaged, if figures differ, if a run does not come to its end, or if
drafts are left in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.faults.commands import NAMES, Command, damaged, drafts, kill, preload, run, start, wait
from bench.faults.commands import world as made_world

_ENDS = {0, 1}  # 1: an audit found no usable direction, which these random models have not.
_INTERRUPTED = 130
_STARTS = 60  # Of one folder; a run that has not ended by then does not go on.


@dataclass
class Found:
    """What became of a command under fire."""

    command: str
    signal: str
    seconds: float
    kills: int = 0
    starts: int = 0
    ends: int = 0
    identical: int = 0
    where: Counter[str] = field(default_factory=Counter)
    whom: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    most_drafts: int = 0
    drafts: list[str] = field(default_factory=list)
    points: int = 0
    torn: int = 0
    resumed: int = 0

    @property
    def good(self) -> bool:
        """Whether nothing was lost and nothing differs."""
        return not (self.damaged or self.wrong or self.drafts) and self.ends == self.identical > 0


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(rest[1]) == pid:
            found.append(int(path.parent.name))
    return found


def _stage(log: Path) -> str:
    """The last stage that the program said was done."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    for line in reversed(lines):
        if line.startswith("["):
            return line.partition("] ")[2].partition(":")[0].split(", ")[-1]
        if ": " in line and not line.startswith(("note", "error", "hint")):
            return line.partition(":")[0]
    return "(start)"


def _strike(child: int, command: Command, number: int, rng: random.Random, found: Found) -> bool:
    """Send the signal; whether the command itself was meant, and not a worker."""
    workers = _children(child) if command.name == "sweep" else []
    whom = rng.choice(("coordinator", "all", "worker")) if workers else "command"
    found.whom[whom] += 1
    if whom == "worker":
        kill(rng.choice(workers), group=False)
        return False
    for one in workers if whom == "all" else ():
        kill(one, group=False)
    kill(child, number)
    return True


def _under_fire(
    command: Command,
    place: Path,
    found: Found,
    *,
    kills: int,
    number: int,
    whole: Any,
    seed: int,
) -> None:
    rng = random.Random(f"{seed} {command.name} {number}")
    while found.kills < kills:
        out = place / f"{command.name}-{found.ends}"
        out.mkdir()
        for _ in range(_STARTS):
            log = place / f"{command.name}.log"
            log.unlink(missing_ok=True)
            child = start(command.args(out), log)
            found.starts += 1
            code = None
            while code is None and found.kills < kills:
                code = wait(child, rng.uniform(0, found.seconds))
                if code is not None:
                    break
                found.kills += 1
                found.where[_stage(log)] += 1
                if _strike(child, command, number, rng, found):
                    break
                found.damaged += damaged(out)
            ended = wait(child) if code is None else code
            found.codes[str(ended)] += 1
            found.damaged += damaged(out)
            found.most_drafts = max(found.most_drafts, len(drafts(out)))
            if ended in _ENDS or (ended == 2 and _is_there(command, out, log)):
                break
            if ended != (_INTERRUPTED if number == signal.SIGINT else -number):
                text = log.read_text(encoding="utf-8")[-400:] if log.exists() else ""
                found.wrong.append(f"status {ended}: {text}")
                break
        _ended(command, out, whole, found)
        print(_line(found), flush=True)


def _is_there(command: Command, out: Path, log: Path) -> bool:
    """Killed between the last rename and the exit: the command finds its result and says so."""
    said = log.read_text(encoding="utf-8")
    return "exists already" in said and command.place(out).exists()


def _ended(command: Command, out: Path, whole: Any, found: Found) -> None:
    found.ends += 1
    try:
        figures = command.figures(out)
    except Exception as error:  # Whatever it is, the run did not end as it should.
        found.wrong.append(f"{out.name}: {type(error).__name__}: {error}")
        return
    differ = [key for key in whole | figures if whole.get(key) != figures.get(key)]
    if differ:
        found.wrong.append(f"{out.name}: {', '.join(differ[:5])} differ")
        return
    found.identical += 1
    found.drafts += drafts(out)
    shutil.rmtree(out)


# Every point ----------------------------------------------------------------------------------


def watching(out: Path, copies: Path) -> Callable[[], None]:
    """A preparation of a child that copies `out` before each of its calls that changes the disk."""

    def prepare() -> None:
        state = {"busy": False, "n": 0}
        sync, synced = os.fsync, Counter[int]()

        def copied(kind: str, torn: Path | None = None, size: int = 0) -> None:
            state["busy"] = True
            try:
                state["n"] += 1
                own = copies / f"{state['n']:04d}-{kind}"
                shutil.copytree(out, own, symlinks=True)
                if torn is not None:
                    os.truncate(own / torn.relative_to(out), size)
            finally:
                state["busy"] = False

        def changes(event: str, args: tuple[Any, ...]) -> bool:
            if event == "open":
                path, mode, flags = args
                writes = (mode and set(mode) & set("wax+")) or (
                    flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                )
                return bool(writes) and str(path).startswith(str(out))
            if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                return str(args[0]).startswith(str(out)) or args[-1] not in (-1, None)
            return False

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if not state["busy"] and changes(event, args):
                copied(event.removeprefix("os."))

        def fsync(handle: int) -> None:
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if path.is_relative_to(out) and path.is_file():
                now = path.stat()  # What was synced before stays.
                copied("torn", path, (synced[now.st_ino] + now.st_size) // 2)
                synced[now.st_ino] = now.st_size
            sync(handle)

        sys.addaudithook(hook)
        os.fsync = fsync

    return prepare


def _every_point(command: Command, place: Path, resumes: int, whole: Any, found: Found) -> None:
    out, copies = place / f"{command.name}-watched", place / f"{command.name}-copies"
    out.mkdir()
    copies.mkdir()
    log = place / f"{command.name}.log"
    code, _ = run(command.args(out), log, watching(out, copies))
    if code not in _ENDS:
        found.wrong.append(f"watched, it ended with {code}: {log.read_text()[-400:]}")
        return
    points = sorted(copies.iterdir())
    found.points = len(points)
    for one in points:
        found.torn += one.name.endswith("-torn")
        found.damaged += [f"{one.name}: {what}" for what in damaged(one)]
    step = max(1, len(points) // max(1, resumes))
    for one in points[::step] if resumes else ():
        again = place / f"{command.name}-again"
        one.rename(again)
        log.unlink(missing_ok=True)
        code, _ = run(command.args(again), log)
        found.resumed += 1
        found.codes[str(code)] += 1
        if code not in _ENDS and not (code == 2 and _is_there(command, again, log)):
            found.wrong.append(f"from {one.name}: {log.read_text()[-400:]}")
            shutil.rmtree(again)
            continue
        _ended(command, again, whole, found)
        shutil.rmtree(again, ignore_errors=True)
    print(_line(found), flush=True)
    shutil.rmtree(copies)
    shutil.rmtree(out)


def _line(one: Found) -> str:
    text = (
        f"{one.command}: {one.kills} x {one.signal}, {one.starts} starts, {one.ends} ends, "
        f"{one.identical} of them identical; {len(one.damaged)} damaged; at most "
        f"{one.most_drafts} drafts, {len(one.drafts)} in the end"
    )
    if one.points:
        text += f"; {one.points} points, {one.torn} of them torn, {one.resumed} gone on from"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", choices=NAMES, action="append")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", choices=("kill", "int", "term"), default="kill")
    parser.add_argument("--points", action="store_true", help="also every call; not of a sweep")
    parser.add_argument("--resumes", type=int, default=20, help="of these points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON of what was found")
    asked = parser.parse_args()
    number = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM}[asked.signal]
    rows: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="demur-kills-") as folder:
        place = Path(folder).resolve()
        commands = made_world(place / "world").commands
        preload()
        for name in asked.command or NAMES:
            command = commands[name]
            out, log = place / f"{name}-whole", place / f"{name}.log"
            out.mkdir()
            code, seconds = run(command.args(out), log)
            if code not in _ENDS:
                raise SystemExit(f"{name} ends with {code}:\n{log.read_text()[-2000:]}")
            found = Found(name, asked.signal, seconds)
            whole = command.figures(out)
            shutil.rmtree(out)
            began = time.monotonic()
            _under_fire(
                command,
                place,
                found,
                kills=asked.kills,
                number=number,
                whole=whole,
                seed=asked.seed,
            )
            if asked.points and name != "sweep":
                _every_point(command, place, asked.resumes, whole, found)
            print(f"{_line(found)}; {time.monotonic() - began:.0f} s", flush=True)
            print("  killed after:", ", ".join(f"{k} {n}" for k, n in found.where.most_common()))
            print("  who:", dict(found.whom), "codes:", dict(found.codes))
            for text in (*found.damaged[:5], *found.wrong[:5], *found.drafts[:5]):
                print("  !", text)
            rows.append(found)
            if asked.out is not None:
                asked.out.write_text(json.dumps([vars(row) for row in rows], indent=1))
    sys.exit(not all(row.good for row in rows))


if __name__ == "__main__":
    main()
