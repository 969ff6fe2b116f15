"""`make vulnerabilities`: are advisories known against what requirements.lock installs?

pip-audit passes in silence what its service does not know, so behind an index without advisories
all of it reads as "none found". What was not looked up is counted here, and is a failure with
`--required` (or DEMUR_VULNERABILITIES=required, as in the repository's workflow): a machine without
the service can still run `make check`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Answer:
    """What the service said: packages it knows, those it does not, and advisories as lines."""

    known: int
    unknown: tuple[str, ...]
    advisories: tuple[str, ...]


def parsed(text: str) -> Answer:
    """Read pip-audit's JSON."""
    rows = json.loads(text)["dependencies"]
    unknown = tuple(row["name"] for row in rows if "skip_reason" in row)
    advisories = tuple(
        f"{row['name']} {row['version']}: {found['id']}, mended in "
        f"{', '.join(found['fix_versions']) or 'no version yet'}"
        for row in rows
        for found in row.get("vulns", ())
    )
    return Answer(len(rows) - len(unknown), unknown, advisories)


def asked(lock: Path, options: list[str]) -> Answer | str:
    """Ask about a lock file; a text says why there is no answer."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(lock), "--require-hashes"]
    command += ["--disable-pip", "--progress-spinner", "off", "--format", "json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return parsed(done.stdout)
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or [f"pip-audit ended with {done.returncode}"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements.lock")
    parser.add_argument("--required", action="store_true", help="what was not looked up fails too")
    own, options = parser.parse_known_args()  # The others are pip-audit's, such as --osv-url.
    required = own.required or os.environ.get("DEMUR_VULNERABILITIES") == "required"
    answer = asked(own.lock, options)
    if isinstance(answer, str):
        print(f"advisories: not looked up: {answer}")
        return int(required)
    for line in answer.advisories:
        print(line)
    found = len(answer.advisories)
    print(f"advisories: {found} known against {answer.known} packages", end="")
    print(f"; {len(answer.unknown)} were NOT looked up" if answer.unknown else "")
    return int(bool(found) or (required and bool(answer.unknown)))


if __name__ == "__main__":
    sys.exit(main())
