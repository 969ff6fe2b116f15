"""What the answers on top of a page say, where one figure alone would mislead."""

from dataclasses import replace

import pytest

from demur.features.rows.dose import ArmBreaks
from demur.pipeline.features_findings import _holds
from demur.stats import Estimate, proportion

PLAIN = ArmBreaks(
    arm="none",
    n=8,
    broken=proportion(6, 8),
    change=None,
    p=None,
    held=Estimate(1.0, 0.5, 1.5, 8, "Student t 95%"),
    held_change=None,
    degenerate=proportion(0, 32),
    over_refused=proportion(0, 32),
)
HELD = replace(
    PLAIN,
    arm="set lifted",
    broken=proportion(0, 8),
    change=Estimate(-0.75, -0.93, -0.28, 8, "Newcombe paired 95%"),
    p=0.03,
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "holds"),
        ({"over_refused": proportion(29, 32)}, "holds by refusing harmless twins as well"),
        ({"over_refused": None}, "holds"),
        ({"degenerate": proportion(32, 32)}, "writes no replies to speak of"),
        ({"change": Estimate(0.25, 0.1, 0.4, 8, "Newcombe paired 95%")}, "breaks more"),
    ],
)
def test_a_set_that_refuses_everybody_does_not_simply_hold(change, said):
    assert _holds(replace(HELD, **change), PLAIN) == said
