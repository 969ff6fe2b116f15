"""The table of broken lines does not rot: each still stands in the source, and its tests exist."""

import re
from pathlib import Path

import pytest
from bench.faults.mutate import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.name)
def test_a_mutant_has_its_line_and_its_tests(mutant):
    text = (ROOT / "src" / "demur" / mutant.file).read_text("utf-8")
    compile(mutant.applied_to(text), mutant.file, "exec")
    for one in mutant.tests:
        file, _, name = one.partition("::")
        assert re.search(rf"def {name or 'test_'}", (ROOT / file).read_text("utf-8")), one


def test_there_are_many_and_none_stands_twice():
    assert len(MUTANTS) >= 15
    assert len({(one.file, one.new) for one in MUTANTS}) == len(MUTANTS)
