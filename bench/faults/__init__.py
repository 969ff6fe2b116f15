"""Trials that try to break demur: each is run by hand with `python -m bench.faults.NAME`."""
