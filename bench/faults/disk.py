"""`python -m bench.faults.disk`: full disks, read-only ones, folders that vanish, two at once.

Runs `demur audit`, `organism train`, `anchor fit` and `sweep` on tiny models into small file
systems of their own (tmpfs; needs root) of several sizes, so that the disk is full at different
writes: each must end with status 2 and one error, leave nothing damaged, and go on to the figures
of an undisturbed run once there is room. Then the same with a disk that is mounted read-only before
the start and midway, with a folder that belongs to somebody else, with a file where a folder should
be, with the folder deleted midway, and with two processes of the same command at once: both end
well, or the second says that another is at work. Fails (status 1) if anything else happens.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.faults.commands import NAMES, Command, damaged, kill, preload, run, start, wait
from bench.faults.commands import world as made_world

_ENDS = {0, 1}
_NOBODY = 65534


@contextmanager
def mounted(place: Path, kib: int) -> Iterator[Path]:
    """A file system of that size."""
    place.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={kib}k", "none", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()


def _mount(*args: str) -> None:
    subprocess.run(["mount", *args], check=True)


def _remount(place: Path, how: str) -> bool:
    return not subprocess.run(
        ["mount", "-o", f"remount,{how}", str(place)], check=False, capture_output=True
    ).returncode


class Trial:
    """Trials of one command."""

    def __init__(self, command: Command, place: Path) -> None:
        self.command, self.place = command, place
        self.log = place / f"{command.name}.log"
        self.bad: list[str] = []
        out = place / f"{command.name}-whole"
        out.mkdir()
        code, self.seconds = self.run(out)
        if code not in _ENDS:
            raise SystemExit(f"{command.name} ends with {code}:\n{self.said()[-2000:]}")
        self.whole = command.figures(out)
        self.kib = sum(-(-one.stat().st_size // 4096) * 4 for one in out.rglob("*"))
        shutil.rmtree(out)

    def run(self, out: Path, **how: Any) -> tuple[int, float]:
        """Run it to its end, its words in a log of their own."""
        self.log.unlink(missing_ok=True)
        return run(self.command.args(out), self.log, **how)

    def said(self) -> str:
        """What it said."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def error(self) -> str:
        """Its one error; more than one, or a traceback, is a fault."""
        said = self.said()
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if len(errors) != 1 or "Traceback" in said or "\nhint: " not in said:
            self.fault("not one error with a hint", said[-800:])
        return errors[0] if errors else "(no error)"

    def fault(self, what: str, about: object) -> None:
        """Note something that must not be."""
        self.bad.append(f"{self.command.name}: {what}: {about}")
        print("  !", self.bad[-1], flush=True)

    def tell(self, fault: str, code: int, more: str = "") -> None:
        """Print one line."""
        print(f"{self.command.name}: {fault}: status {code}{more}", flush=True)

    def ends_alike(self, out: Path, fault: str) -> None:
        """The same command ends now, with the figures of an undisturbed run."""
        code, _ = self.run(out)
        if code not in _ENDS:
            self.fault(f"{fault}: does not go on", self.said()[-800:])
            return
        self.alike(out, fault)

    def alike(self, out: Path, fault: str) -> None:
        """Figures are those of an undisturbed run, and nothing is damaged."""
        if found := damaged(out):
            self.fault(f"{fault}: damaged", found)
        try:
            figures = self.command.figures(out)
        except Exception as error:
            self.fault(f"{fault}: no figures", repr(error))
            return
        if differ := [k for k in self.whole | figures if self.whole.get(k) != figures.get(k)]:
            self.fault(f"{fault}: figures differ", differ)


def full(trial: Trial, sizes: int) -> None:
    """A disk that is full sooner or later."""
    for number in range(sizes):
        kib = max(4, trial.kib * number // sizes)
        with mounted(trial.place / f"disk-{number}", kib) as out:
            code, _ = trial.run(out)
            what = f"disk of {kib} KiB, of {trial.kib} needed"
            if code in _ENDS and trial.command.name != "sweep":
                trial.tell(what, code)
                trial.alike(out, what)
                continue
            error = trial.error() if code not in _ENDS else "(cells failed)"
            trial.tell(what, code, f", {error}")
            if code not in (2, *_ENDS):
                trial.fault(what, trial.said()[-800:])
            if found := damaged(out):
                trial.fault(f"{what}: damaged", found)
            if not _remount(out, "size=64m"):
                trial.fault(what, "could not be made larger")
            trial.ends_alike(out, what)


def read_only(trial: Trial) -> None:
    """From the start, midway, and after the end."""
    with mounted(trial.place / "disk", 65536) as out:
        _remount(out, "ro")
        code, _ = trial.run(out)
        trial.tell("read-only from the start", code, f", {trial.error()}")
        if code != 2:
            trial.fault("read-only from the start", code)
        _remount(out, "rw")
        what = "read-only midway"
        timer = _when_there(out, trial, lambda: _remount(out, "ro"))
        code, _ = trial.run(out)
        timer.join()
        trial.tell(what, code, f", {trial.error()}" if code not in _ENDS else "")
        if code not in (2, *_ENDS):
            trial.fault(what, trial.said()[-800:])
        _remount(out, "rw")
        if code in _ENDS and trial.command.name != "sweep":
            trial.alike(out, what)  # It was quicker.
        else:
            trial.ends_alike(out, what)
    out = trial.place / "locked"
    out.mkdir(mode=0o755)
    trial.place.chmod(0o755)
    code, _ = trial.run(out, prepare=_as_nobody)
    trial.tell("a folder of somebody else's", code, f", {trial.error()}")
    if code != 2:
        trial.fault("a folder of somebody else's", trial.said()[-800:])
    if any(out.iterdir()):
        trial.fault("a folder of somebody else's", "something was written")
    out.rmdir()
    out.write_text("a file\n", encoding="utf-8")
    code, _ = trial.run(out / "under")
    trial.tell("a file where a folder should be", code, f", {trial.error()}")
    if code != 2 or out.read_text(encoding="utf-8") != "a file\n":
        trial.fault("a file where a folder should be", trial.said()[-800:])
    out.unlink()


def _as_nobody() -> None:
    os.environ["HOME"] = "/nonexistent"
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)


def _when_there(out: Path, trial: Trial, what: Any) -> threading.Thread:
    """Do something once there are files, and some time has gone by."""

    def wait_for() -> None:
        until = time.monotonic() + 4 * trial.seconds
        while time.monotonic() < until and not any(one.is_file() for one in out.rglob("*")):
            time.sleep(0.02)
        time.sleep(0.1 * trial.seconds)
        # Not while a file is open for writing.
        while what() is False and time.monotonic() < until:
            time.sleep(0.001)

    thread = threading.Thread(target=wait_for, daemon=True)
    thread.start()
    return thread


def vanishing(trial: Trial) -> None:
    """The folder is deleted midway."""
    out = trial.place / "vanishing"
    out.mkdir()
    timer = _when_there(out, trial, lambda: shutil.rmtree(out, ignore_errors=True))
    code, _ = trial.run(out)
    timer.join()
    what = "the folder is deleted midway"
    trial.tell(what, code, f", {trial.error()}" if code not in _ENDS else "")
    if code not in (2, *_ENDS):
        trial.fault(what, trial.said()[-800:])
    if code in _ENDS and any(out.rglob("*")):  # Else it was deleted after the end.
        trial.alike(out, what)
    shutil.rmtree(out, ignore_errors=True)


def two_at_once(trial: Trial, pairs: int) -> None:
    """Two processes of the same command in one folder."""
    rng = random.Random(0)
    for number in range(pairs):
        out = trial.place / f"two-{number}"
        out.mkdir()
        logs = [trial.place / f"two-{who}.log" for who in "ab"]
        for log in logs:
            log.unlink(missing_ok=True)
        children = []
        for log in logs:
            children.append(start(trial.command.args(out), log))
            time.sleep(rng.choice((0.0, 0.0, 0.3)) * trial.seconds)
        codes = [wait(child, 20 * trial.seconds + 60) for child in children]
        said = [log.read_text(encoding="utf-8") for log in logs]
        refused = [
            "is at work in" in text or "exists already" in text or "unfinished" in text
            for text in said
        ]
        what = f"two at once ({number})"
        told = ", ".join(
            f"{code} {'refused' if no else 'ended'}"
            for code, no in zip(codes, refused, strict=True)
        )
        print(f"{trial.command.name}: {what}: {told}", flush=True)
        for child, code, no, text in zip(children, codes, refused, said, strict=True):
            if code is None:
                kill(child)
                trial.fault(what, "does not end")
            elif not (code in _ENDS or (code == 2 and no)):
                trial.fault(what, text[-800:])
        if not any(code in _ENDS for code in codes):
            trial.fault(what, "neither ended")
        else:
            trial.alike(out, what)
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", choices=NAMES, action="append")
    parser.add_argument("--sizes", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    kinds = ("full", "read-only", "vanishing", "two")
    parser.add_argument("--fault", choices=kinds, action="append")
    asked = parser.parse_args()
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="demur-disk-") as folder:
        place = Path(folder).resolve()
        place.chmod(0o755)
        commands = made_world(place / "world").commands
        for one in (place / "world").rglob("*"):
            one.chmod(0o755 if one.is_dir() else 0o644)
        preload()
        for name in asked.command or NAMES:
            trial = Trial(commands[name], place)
            for fault in asked.fault or kinds:
                if fault == "full":
                    full(trial, asked.sizes)
                elif fault == "read-only":
                    read_only(trial)
                elif fault == "vanishing":
                    vanishing(trial)
                else:
                    two_at_once(trial, asked.pairs)
            bad += trial.bad
    print(f"{len(bad)} faults" if bad else "pass")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
