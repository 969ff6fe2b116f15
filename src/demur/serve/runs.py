"""Audits' folders, as a server shows them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

_MOST = 500
_REPORT, _RESULTS = "report.html", "results.json"


def _folders(root: Path | None) -> dict[str, Path]:
    """By name; nothing that leads out of the folder."""
    if root is None or not root.is_dir():
        return {}
    whole = root.resolve()
    found = {}
    for path in whole.iterdir():
        if path.is_symlink() or not path.is_dir() or path.name.startswith("."):
            continue
        if (path / _RESULTS).is_file() or (path / _REPORT).is_file():
            found[path.name] = path
    return found


def listed(root: Path | None) -> list[dict[str, Any]]:
    """Name, time and verdict of each, newest first."""
    rows = []
    for name, path in _folders(root).items():
        results, report = path / _RESULTS, path / _REPORT
        at = max(one.stat().st_mtime for one in (results, report) if one.is_file())
        rows.append(
            {
                "name": name,
                "when": datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
                "verdict": _verdict(results, at) if results.is_file() else "",
                "report": report.is_file(),
            }
        )
    return sorted(rows, key=lambda row: (row["when"], row["name"]), reverse=True)[:_MOST]


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
    if report is None or report.is_symlink() or not report.is_file():
        return None
    return report.read_bytes()
