"""`python -m bench.footprint`: what demur costs to install and to import.

Sizes are of the files that each distribution's record lists, in this environment, for the closure
of the core's requirements and of each extra's beyond it; times are of fresh processes, by turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from statistics import median

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_IMPORTS = {
    "python": "pass",
    "import demur": "import demur",
    "import torch": "import torch",
    "demur --help": "import sys; sys.argv = ['demur', '--help']; import demur.cli as c; c.main()",
    "demur.Model": "from demur.models import Model",
    "demur.pipeline": "import demur.pipeline",
}


def closure(names: Iterable[Requirement]) -> tuple[set[str], set[str]]:
    """All that these requirements bring, and what of it is not installed."""
    found: set[str] = set()
    absent: set[str] = set()
    ahead = [(canonicalize_name(one.name), frozenset(one.extras)) for one in names]
    seen: set[tuple[str, frozenset[str]]] = set()
    while ahead:
        name, extras = ahead.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found_here = distribution(name)
        except PackageNotFoundError:
            absent.add(name)
            continue
        found.add(name)
        for text in found_here.requires or ():
            one = Requirement(text)
            if one.marker is None or any(
                one.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            ):
                ahead.append((canonicalize_name(one.name), frozenset(one.extras)))
    return found, absent


def size(name: str) -> float:
    """MiB of a distribution's files."""
    paths = (Path(str(one.locate())) for one in distribution(name).files or ())
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


def sizes() -> None:
    """Print the closure's sizes, largest first."""
    wanted = [Requirement(text) for text in distribution("demur").requires or ()]
    core = [one for one in wanted if one.marker is None]
    found, absent = closure(core)
    each = {name: size(name) for name in found}
    print(f"core: {len(core)} requirements, {len(found)} packages, {sum(each.values()):.0f} MiB")
    for name, mib in sorted(each.items(), key=lambda pair: -pair[1])[:8]:
        print(f"  {name:<20} {mib:7.1f} MiB")
    if absent:
        print(f"  not installed here: {', '.join(sorted(absent))}")
    for extra in sorted(distribution("demur").metadata.get_all("Provides-Extra") or ()):
        own = [o for o in wanted if o.marker is not None and o.marker.evaluate({"extra": extra})]
        more, lacking = closure(own)
        more -= found
        line = f"extra {extra:<8} {len(more):3d} more packages, {sum(map(size, more)):6.1f} MiB"
        print(line + (f" (not installed here: {', '.join(sorted(lacking))})" if lacking else ""))


def times(repeats: int) -> None:
    """Print seconds of fresh processes, by turns."""
    kept: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    for number in range(repeats + 1):
        for name, code in _IMPORTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            if number:  # The first fills the disk's cache.
                kept[name].append(time.perf_counter() - began)
    for name, found in kept.items():
        print(
            f"{name:<16} {median(found):6.2f} s [{min(found):.2f}, {max(found):.2f}], n={repeats}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    sizes()
    times(asked.repeats)


if __name__ == "__main__":
    main()
