"""Audits over models, estimators and seeds, read in shards by many workers and merged exactly."""

from demur.sweep.config import SweepConfig, SweepModel, read_sweep
from demur.sweep.plan import Plan
from demur.sweep.run import Event, Sweep, sweep
from demur.sweep.table import SweepResults, SweepRow

__all__ = [
    "Event",
    "Plan",
    "Sweep",
    "SweepConfig",
    "SweepModel",
    "SweepResults",
    "SweepRow",
    "read_sweep",
    "sweep",
]
