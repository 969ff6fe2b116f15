"""One self-contained page from the records of a finished run; neither torch nor a model needed."""

from demur.report.build import build, write

__all__ = ["build", "write"]
