"""Audits' folders, as a server shows them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

_MOST = 500
_REPORT, _RESULTS = "report.html", "results.json"
_MOST_BYTES = 1 << 28  # Of a file that is read whole: the folder may be a stranger's.


def _folders(root: Path | None) -> dict[str, Path]:
    """By name; nothing that leads out of the folder."""
    if root is None or not root.is_dir():
        return {}
    whole = root.resolve()
    found = {}
    for path in whole.iterdir():
        if path.is_symlink() or not path.is_dir() or path.name.startswith("."):
            continue
        if _ours(path / _RESULTS) or _ours(path / _REPORT):
            found[path.name] = path
    return found


def _ours(path: Path) -> bool:
    """A file of that folder, of a size to be read; no link, device or pipe."""
    return not path.is_symlink() and path.is_file() and path.stat().st_size <= _MOST_BYTES


def listed(root: Path | None) -> list[dict[str, Any]]:
    """Name, time and verdict of each, newest first."""
    found = []
    for name, path in _folders(root).items():
        results, report = path / _RESULTS, path / _REPORT
        times = [one.stat().st_mtime for one in (results, report) if _ours(one)]
        if times:  # Else it went meanwhile.
            # A file may bear any time; that of one from the year 60,000 is no date.
            found.append((min(max(0.0, *times), 4e9), name, results, report))
    return [
        {
            "name": name,
            "when": datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
            "verdict": _verdict(results, at) if _ours(results) else "",
            "report": _ours(report),
        }
        for at, name, results, report in sorted(found, reverse=True)[:_MOST]
    ]


@lru_cache(maxsize=_MOST)
def _verdict(path: Path, at: float) -> str:
    del at  # A file that changed is read again.
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return str(value["verdict"]["headline"])[:500]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def report_of(root: Path | None, name: str) -> bytes | None:
    """The page of the folder of that name."""
    path = _folders(root).get(name)
    report = None if path is None else path / _REPORT
    if report is None or not _ours(report):
        return None
    return report.read_bytes()
