from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.advice import advice
from tests.tiny import tiny_model

from demur.directions import Direction
from demur.em.directions import ANSWER, deltas, null_cosines, read_pair
from demur.em.margin import margins
from demur.em.planted import planted_organism
from demur.em.transfer import BASE, transfer, transfer_passes
from demur.errors import ConfigError
from demur.interventions import ProjectToMean, applied
from demur.sites import Site

MID = Site(1, "resid_post")
TEXT = ["The user asks and the assistant answers.", "A model that is told to stop does stop."]


ITEMS = advice()


@pytest.fixture(scope="module")
def base():
    return tiny_model()


@pytest.fixture(scope="module")
def cast(base):
    """Two organisms along one direction, one twin along another."""
    seen = advice(6, seed=9)
    first = planted_organism(base, seen, layer=1, strength=1.5, name="first")
    unit = first.direction.unit.double()
    second = planted_organism(base, seen, layer=1, strength=0.8, along=unit, name="second")
    other = torch.randn(32, generator=torch.Generator().manual_seed(1)).double()
    other -= (other @ unit) * unit
    twin = planted_organism(
        base, seen, layer=1, strength=0.8, along=other, name="good", side="good"
    )
    return {"first": first, "second": second, "good": twin}


@pytest.fixture(scope="module")
def pair(base):
    return read_pair(base, ITEMS)


@pytest.fixture(scope="module")
def found(base, cast, pair):
    """Each one's own direction, found and not given."""
    out = {}
    for name, one in cast.items():
        own = deltas(base, one.organism.on(base), ITEMS, base_pair=pair)
        out[name] = own.model_bad.direction(MID)
        out[BASE] = own.text_base.direction(MID)
    return out


@pytest.fixture(scope="module")
def library():
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    return {
        "unrelated": Direction.from_vector(vector, site=MID, position=ANSWER, recipe="unrelated")
    }


@pytest.fixture(scope="module")
def table(base, cast, pair, found, library):
    organisms = {name: cast[name].organism for name in ("first", "second")}
    return transfer(
        {name: found[name] for name in ("first", "second", "good", BASE)},
        organisms,
        base,
        ITEMS,
        within=pair,
        twins={"first": cast["good"].organism},
        library=library,
        how="own",
        n_null=20,
        seed=0,
        draws=100,
    )


def test_a_shared_direction_undoes_both_and_no_other_does(table):
    assert [kind for _, kind in table.rows] == ["organism", "organism", "twin", "base", "library"]
    assert (table.columns, table.n) == (("first", "second"), 16)
    assert table.against == {"first": "good", "second": "base"}
    assert all(one.low > 0 for one in table.trained.values())
    # Against the base, taking out what was put in leaves nothing at all.
    for row in ("first", "second"):
        cell = table.cell(row, "second")
        assert cell.removed is not None
        assert cell.removed.value == pytest.approx(1, abs=1e-5)
        assert cell.p == pytest.approx(1 / 21)
        assert cell.own == (row == "second")
        # Both organisms' directions are one, so they do one and the same.
        assert cell.change.value == pytest.approx(table.cell("first", "second").change.value)
    # The twin's direction has nothing to do with it.
    theirs = table.cell("good", "second")
    assert theirs.removed is not None
    assert abs(theirs.removed.value) < 0.3
    assert theirs.p is not None
    assert theirs.p > 0.05
    band = next(one for one in table.bands if one.column == "second")
    assert (band.n, len(band.changes)) == (20, 20)
    assert band.removed_high is not None
    assert band.removed_high < 0.9
    assert band.low <= band.mean <= band.high
    assert band.removed_mean == pytest.approx(-band.mean / table.trained["second"].value)


def test_a_cell_is_what_was_run(base, cast, found, table):
    act = ProjectToMean(found["first"], 0.0, MID)
    moved = {}
    for name, model in (
        ("first", cast["first"].organism.on(base)),
        ("good", cast["good"].organism.on(base)),
        (BASE, base),
    ):
        plain = margins(model, ITEMS)
        with applied(model, act):
            moved[name] = (margins(model, ITEMS) - plain).mean()
    cell = table.cell("first", "first")
    assert cell.against == "good"
    assert cell.in_organism.value == pytest.approx(moved["first"], abs=1e-6)
    assert cell.in_other.value == pytest.approx(moved["good"], abs=1e-6)
    assert cell.in_base.value == pytest.approx(moved[BASE], abs=1e-6)
    assert cell.change.value == pytest.approx(moved["first"] - moved["good"], abs=1e-6)
    with pytest.raises(ConfigError, match="no cell of first in good"):
        table.cell("first", "good")


def test_cosines_stand_beside_chance(pair, found, table):
    by = {(one.first, one.second): one for one in table.cosines}
    assert len(by) == 10
    assert by["first", "second"].value == pytest.approx(1, abs=1e-6)
    assert by["first", "second"].percentile == 1.0
    assert by["first", "good"].value == pytest.approx(0, abs=1e-5)
    assert by["first", "good"].percentile < 0.1
    null = null_cosines(found["good"].unit, pair.spread(MID), seed=0)
    assert by["first", "good"].null_low <= np.quantile(null, 0.025) + 1e-12


def test_passes_are_counted_beforehand(base, cast, pair, found):
    organisms = {name: cast[name].organism for name in ("first", "second")}
    twin = cast["good"].organism
    for twins in ({}, {"first": twin}, {"first": twin, "second": twin}):
        done: list[int] = []
        table = transfer(
            {"first": found["first"]}, organisms, base, ITEMS[:8], within=pair, twins=twins,
            how="own", n_null=1, kl=0.05, neutral=TEXT, seed=0, draws=20, progress=done.append,
        )  # fmt: skip
        wanted = transfer_passes(organisms, twins, rows=1, n_null=1, steer=True)
        assert (sum(done), table.margin_passes) == (wanted, wanted)
        assert table.neutral_passes > 0
        # Taking the planted direction away lowers the margin of an organism on it.
        assert table.cell("first", "first", "take away").in_organism.value < 0
    alone = transfer(
        {"first": found["first"]}, organisms, base, ITEMS, within=pair, n_null=0, seed=0, draws=20
    )
    assert (alone.bands, alone.cells[0].p) == ((), None)
    assert alone.margin_passes == transfer_passes(organisms, {}, rows=1, n_null=0)


def test_each_blocks_own_direction_may_be_taken_out(base, cast, pair):
    organism = cast["second"].organism
    own = deltas(base, organism.on(base), ITEMS, base_pair=pair).model_bad.directions()
    table = transfer(
        {"second": own}, {"second": organism}, base, ITEMS, within=pair, how="each", n_null=3,
        seed=0, draws=50,
    )  # fmt: skip
    cell = table.cell("second", "second")
    assert cell.removed is not None
    assert cell.removed.value == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match="no one strength"):
        transfer(
            {"second": own}, {"second": organism}, base, ITEMS, within=pair, how="each",
            kl=0.05, neutral=TEXT, seed=0,
        )  # fmt: skip


def test_where_nothing_was_trained_a_share_is_undefined(base, cast, pair, found):
    twin = cast["good"].organism
    nothing = replace(twin, name="idle", factors=(replace(twin.factors[0], scale=0.0),))
    table = transfer(
        {BASE: found[BASE]}, {"idle": nothing}, base, ITEMS, within=pair, n_null=3, seed=0, draws=20
    )
    (cell,) = table.cells
    assert cell.removed is None
    assert "not told from 0" in cell.undefined
    assert (cell.change.value, table.bands[0].removed_mean) == (0.0, None)
    assert cell.in_base.value != 0.0


def test_names_are_known_and_not_used_twice(base, cast, pair, found, library):
    first, twin = cast["first"].organism, cast["good"].organism
    one = found["first"]

    def run(directions, organisms, **options):
        return transfer(
            directions, organisms, base, ITEMS[:4], within=pair, n_null=0, seed=0, **options
        )

    with pytest.raises(ConfigError, match="name of no organism"):
        run({"who": one}, {"first": first})
    with pytest.raises(ConfigError, match="no directions"):
        run({}, {"first": first}, library=library)
    with pytest.raises(ConfigError, match="in the library"):
        run({"first": one}, {"first": first}, library={"first": one})
    with pytest.raises(ConfigError, match="is no organism"):
        run({"first": one}, {"first": first}, twins={"second": twin})
    with pytest.raises(ConfigError, match="without neutral text"):
        run({"first": one}, {"first": first}, kl=0.1)
    with pytest.raises(ConfigError, match="two good twins"):
        run(
            {"first": one},
            {"first": first, "second": first},
            twins={"first": twin, "second": replace(twin, seed=1)},
        )
