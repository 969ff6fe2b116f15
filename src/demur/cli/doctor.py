"""`demur doctor`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from demur.cli import talk
from demur.cli.options import Json, Out
from demur.cli.prompts import packaged_sets
from demur.errors import DemurError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class _Finding:
    """One line of `demur doctor`.

    Attributes:
        status: "missing" is something that every command needs, "note" something that some do.
        hint: What to do about it.
    """

    name: str
    value: str
    status: Literal["ok", "note", "missing"] = "ok"
    hint: str = ""


def doctor(
    out: Out = Path("runs"),
    as_json: Json = False,
) -> None:
    """Say what this machine has, what it lacks, and how to mend it.

    Exits with 1 if something is missing that demur cannot do without.
    """
    findings = [
        *_look_at_python(),
        *_look_at_torch(),
        *_look_at_data(),
        *_look_at_folders(out),
    ]
    if as_json:
        talk.put_json([asdict(one) for one in findings])
    else:
        table = talk.table("", "", "")
        table.show_header = False
        styles = {"ok": "green", "note": "yellow", "missing": "bold red"}
        from rich.markup import escape

        for one in findings:
            hint = f"{one.value}: {one.hint}" if one.hint else one.value
            table.add_row(f"[{styles[one.status]}]{one.status}[/]", one.name, escape(hint))
        talk.console().print(table)
    if any(one.status == "missing" for one in findings):
        raise typer.Exit(talk.NOT_FOUND)


def _look_at_python() -> Iterator[_Finding]:
    import platform
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    yield _Finding(
        "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    extras: dict[str, list[str]] = {}
    for line in requires("demur") or ():
        wanted = Requirement(line)
        extra = next((part for part in str(wanted.marker or "").split('"') if part.isalpha()), "")
        if wanted.marker is not None and not extra and not wanted.marker.evaluate():
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = None
        if extra:
            if found is None or not wanted.specifier.contains(found, prereleases=True):
                extras.setdefault(extra, []).append(str(wanted).partition(";")[0])
        elif found is None:
            hint = f"`pip install '{wanted.name}{wanted.specifier}'`"
            yield _Finding(wanted.name, "not installed", "missing", hint)
        elif not wanted.specifier.contains(found, prereleases=True):
            hint = f"needs {wanted.specifier}: `pip install '{wanted.name}{wanted.specifier}'`"
            yield _Finding(wanted.name, found, "missing", hint)
        else:
            yield _Finding(wanted.name, f"{found} ({wanted.specifier})")
    for extra, lacking in extras.items():
        hint = f"only if you use it: `pip install 'demur[{extra}]'`"
        yield _Finding(f"extra {extra}", f"lacks {', '.join(lacking)}", "note", hint)


def _look_at_torch() -> Iterator[_Finding]:
    try:
        import torch
    except Exception as error:
        # A library that does not fit the machine raises OSError, ImportError and more.
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield _Finding("torch", first, "missing", "install it again; `pip install torch`")
        return
    threads = f"{torch.get_num_threads()} threads, {os.cpu_count()} CPUs"
    yield _Finding("threads", threads)
    try:
        known = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        known = set()
    fast = sorted(known & {"amx_bf16", "avx512_bf16"})
    level = torch.backends.cpu.get_cpu_capability()
    what = f"bfloat16 units {', '.join(fast)}" if fast else "no bfloat16 units: float32 throughout"
    yield _Finding("cpu", f"{level}, {what}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            yield _Finding(f"cuda:{i}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB")
    else:
        yield _Finding("cuda", "none; models run on the CPU")
    if torch.backends.mps.is_available():
        yield _Finding("mps", "available")
    engine = os.environ.get("DEMUR_VLLM_PYTHON")
    if engine is None:
        yield _Finding("vllm", "none named; only if you use it: scripts/setup-vllm", "note")
    elif not Path(engine).exists():
        yield _Finding("vllm", f"DEMUR_VLLM_PYTHON names {engine}, which is not there", "missing")
    else:
        yield _Finding("vllm", engine)


def _look_at_data() -> Iterator[_Finding]:
    from demur.models.load import EMBEDDED, cache_root, embedded_gguf, packaged_adapter

    try:
        gguf = embedded_gguf()
    except DemurError as error:
        yield _Finding(EMBEDDED, "not installed", "note", error.hint)
    else:
        ready = any((cache_root() / "models").glob(f"{gguf.stem}-*/config.json"))
        later = "converted" if ready else "not converted yet; the first use does it (30 s)"
        yield _Finding(EMBEDDED, f"{gguf.stat().st_size / 1e6:.0f} MB, {later}")
        if adapter := packaged_adapter(EMBEDDED):
            yield _Finding("refusal adapter", adapter.name)
        else:
            hint = "`demur organism train refusal` makes one; else audits run on the bare model"
            yield _Finding("refusal adapter", "not in the package", "note", hint)
    for row in packaged_sets():
        labels = ", ".join(f"{count} {label}" for label, count in row["labels"].items())
        yield _Finding(f"prompts {row['name']}", f"{row['prompts']}: {labels}")


def _look_at_folders(out: Path) -> Iterator[_Finding]:
    import shutil

    from demur.models.load import cache_root

    places = (
        ("cache", cache_root(), "point DEMUR_CACHE at another folder", 2.0),
        ("runs", out.resolve(), "choose another place with `--out`", 0.2),
    )
    for name, folder, hint, needs in places:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free / 1e9
        about = f"{folder}, {free:.0f} GB free" if free >= 10 else f"{folder}, {free:.1f} GB free"
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield _Finding(name, f"{there} cannot be written", "missing", hint)
        elif free < needs:
            yield _Finding(name, about, "note", f"less than {needs:g} GB: make room, or {hint}")
        else:
            yield _Finding(name, about)
