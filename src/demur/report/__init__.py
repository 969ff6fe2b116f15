"""One self-contained page from the records of a finished run; neither torch nor a model needed."""

from demur.report.anchor import write_anchor
from demur.report.build import build, write
from demur.report.compare import write_compare
from demur.report.em import write_em
from demur.report.guard import write_guard

__all__ = ["build", "write", "write_anchor", "write_compare", "write_em", "write_guard"]
