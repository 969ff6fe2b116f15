"""One self-contained page from the records of a finished run; neither torch nor a model needed."""

from demur.report.anchor import write_anchor
from demur.report.build import build, write
from demur.report.compare import write_compare
from demur.report.em import write_em
from demur.report.features import write_features
from demur.report.guard import write_guard
from demur.report.hydra import write_hydra

__all__ = [
    "build",
    "write",
    "write_anchor",
    "write_compare",
    "write_em",
    "write_features",
    "write_guard",
    "write_hydra",
]
