import json
from dataclasses import asdict, replace

import pytest
import torch
from pydantic import TypeAdapter
from tests import planted

from demur.compare.dimensions import (
    Prompts,
    claimed,
    dimensions,
    independence,
    mixtures,
    read_rows,
    searches,
)
from demur.compare.rows.dimensions import Cone, Dimension, Independence
from demur.directions import Direction
from demur.errors import ConfigError, TooFewPromptsError
from demur.selection import RefusalTokens
from demur.sites import Site
from demur.stats import Estimate

SITE = Site(planted.PLANTED_LAYER, "resid_pre")


def prompts(n, seed):
    return Prompts(
        tuple(planted.prompts(n, harmful=True, seed=seed)),
        tuple(planted.prompts(n, harmful=False, seed=seed + 1)),
        tuple(range(n)),
        tuple(range(n)),
    )


def tokens(model):
    return RefusalTokens((model.refusal_id,), ("Sorry",), (1.0,), (0.0,), 10, True)


@pytest.fixture(scope="module")
def known():
    return planted.planted()


@pytest.fixture(scope="module")
def found(known):
    return dimensions(
        known.model, prompts(24, 0), prompts(12, 40), tokens=tokens(known), site=SITE, n_null=19
    )


def drawn(width, n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, n, generator=rng, dtype=torch.float64))[0].T
    return [Direction.from_vector(v, site=SITE, position=-1, recipe="drawn") for v in basis]


def read_out(known):
    """What the head reads for a refusal, outside the planted direction."""
    head = known.model.hf.lm_head.weight[known.refusal_id].double()
    rest = head - (head @ known.direction) * known.direction
    return Direction.from_vector(rest, site=SITE, position=-1, recipe="read")


def outside(one, known):
    vector = one.unit.double()
    for axis in (known.direction, read_out(known).unit.double()):
        vector = vector - (vector @ axis) * axis
    return Direction.from_vector(vector, site=SITE, position=-1, recipe="idle")


def test_one_planted_direction_is_called_enough(found, known):
    assert found.cone.claim == "one direction is enough", found.cone.reason
    assert found.cone.k == 1
    assert abs(float(found.directions[0].unit.double() @ known.direction)) > 0.95
    first = found.rows[0]
    assert first.counts
    assert first.change.high < 0
    assert first.auroc.value == 1.0
    # What is left of the planted axis, since the first is an estimate, is found, and is not needed.
    assert found.rows[1].p <= 0.05
    assert not found.rows[1].counts
    assert found.cone.before.value > 0.9
    assert first.refusing.value < 0.1
    assert found.cone.is_cone is None  # There is no mixture of one direction.


def test_the_difference_of_means_cannot_be_iterated_on_the_same_rows(known):
    rows = read_rows(known.model, prompts(24, 0), SITE, -1)
    causal = searches.make("causal")
    first = Direction.from_vector(causal(rows, []), site=SITE, position=-1, recipe="first")
    again = causal(rows, [first])
    assert float(again.norm()) < 1e-5 * first.norm  # 1e-7 of float32 is left.


@pytest.mark.parametrize("name", list(searches))
def test_every_search_gives_a_vector_orthogonal_to_those_before_and_signed_to_harm(name):
    rng = torch.Generator().manual_seed(1)
    harmful, harmless = (torch.randn(60, 16, generator=rng, dtype=torch.float64) for _ in "ab")
    harmful[:, 0] += 3.0
    harmful[:, 1] += 1.0
    search, axes = searches.make(name), torch.eye(16, dtype=torch.float64)
    first = Direction.from_vector(axes[0], site=SITE, position=-1, recipe="first")
    vector = search((harmful, harmless), [first])
    assert abs(float(vector @ axes[0])) < 1e-6 * float(vector.norm())
    assert float(vector @ axes[1]) > 0.5 * float(vector.norm())


def test_a_direction_that_ablation_does_not_need_is_not_counted(known):
    held = prompts(8, 40)
    model = known.model
    idle = outside(drawn(model.d_model, 1, seed=5)[0], known)

    class Idle:
        edits = False

        def __call__(self, rows, found):  # noqa: ARG002
            return idle.unit.double()

    searches.register("idle-in-tests")(Idle)
    try:
        row = dimensions(
            model, prompts(8, 0), held, tokens=tokens(known), site=SITE, method="idle-in-tests",
            n_null=19, most=1,
        )  # fmt: skip
    finally:
        searches._targets.pop("idle-in-tests")
    assert not row.rows[0].counts
    assert row.cone.claim == "undetermined"


def estimate(value, half=0.1):
    return Estimate(value, value - half, value + half, 20, "made up")


def made(k, change, *, counts, refusing=0.0, half=0.1):
    return Dimension(
        k, "causal", str(SITE), -1, estimate(change, half), 1.0, (0.0,), 0.05 if counts else 0.5,
        estimate(0.9), estimate(0.9), estimate(0.1), estimate(-3.0),
        Estimate(refusing, 0.0, 1.0, 20, "made up"), counts, "made up",
    )  # fmt: skip


def test_the_claim_follows_from_the_rows():
    before, idle = Estimate(1.0, 0.9, 1.0, 20, "made up"), "direction 2 does no more"
    one, none = made(1, -8.0, counts=True), made(2, -0.1, counts=False)
    assert claimed([one, none], before, idle)[0] == "one direction is enough"
    wide = made(2, -0.1, counts=False, half=3.0)
    assert claimed([one, wide], before, idle)[0] == "undetermined"
    left = made(1, -8.0, counts=True, refusing=0.5)
    assert claimed([left, none], before, idle)[0] == "undetermined"
    assert claimed([one, made(2, -3.0, counts=True)], before, idle)[0] == "several directions"
    assert claimed([made(1, -1.0, counts=False)], before, idle)[0] == "undetermined"
    broken = replace(one, kl=estimate(6.0))
    assert claimed([broken, none], before, idle)[0] == "undetermined"
    rarely = Estimate(0.1, 0.0, 0.2, 20, "made up")
    assert claimed([one, none], rarely, idle)[0] == "undetermined"
    assert claimed([one], before, "the limit of 1 was reached")[0] == "undetermined"


def test_mixtures_lie_in_the_cone():
    basis = drawn(16, 3)
    for one in mixtures(basis, 20, seed=0):
        along = torch.stack([b.unit for b in basis]).double() @ one.unit.double()
        assert (along >= 0).all()
        assert abs(float(along.norm()) - 1) < 1e-6
        assert abs(one.norm - basis[0].norm) < 1e-6
    with pytest.raises(ConfigError):
        mixtures([], 3, seed=0)


def test_ablating_what_another_direction_is_made_from_is_seen(known):
    """Block 2 makes r2 from r: ablating r takes r2 away, and not the other way round."""
    model = known.model
    made_from = Direction.from_vector(known.direction, site=SITE, position=-1, recipe="r")
    made_of = read_out(known)
    quiet = outside(drawn(model.d_model, 1, seed=6)[0], known)
    pairs = independence(
        model, prompts(8, 60).harmful, [made_from, made_of, quiet], prompts(16, 0), n_null=19
    )
    row = {(pair.ablated, pair.read): pair for pair in pairs}
    assert not row[1, 2].independent
    assert row[1, 2].change > 3 * row[3, 2].change
    assert row[2, 1].change < row[1, 2].change / 3
    assert all(pair.independence == 1 - pair.change for pair in pairs)
    with pytest.raises(ConfigError):
        independence(model, ["bad0"], [made_from], prompts(8, 0))


def test_rows_survive_json(found):
    for kind, rows in ((Dimension, found.rows), (Cone, [found.cone])):
        for row in rows:
            text = json.dumps(asdict(row), allow_nan=False)
            assert TypeAdapter(kind).validate_json(text) == row
    row = Independence(1, 2, 0.1, 0.9, (0.1,), 0.5, True)
    assert TypeAdapter(Independence).validate_json(json.dumps(asdict(row))) == row


def test_bad_prompts_are_refused():
    good = prompts(4, 0)
    with pytest.raises(ConfigError, match="clusters"):
        replace(good, harmful_clusters=(1,))
    with pytest.raises(TooFewPromptsError):
        replace(good, harmful=("a",), harmful_clusters=(1,))
