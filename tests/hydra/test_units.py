"""Units read, ablated, held, injected and frozen: identities on drawn models."""

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model

from demur.errors import ConfigError, TooFewPromptsError
from demur.features.bank import Bank
from demur.features.clamp import Rule, shift
from demur.hydra.bed import Bed, norms
from demur.hydra.units import (
    ComponentUnits,
    DirectionUnits,
    LatentUnits,
    Op,
    ablate,
    arm,
    hold,
    inject,
    matched,
    run_arm,
)
from demur.selection import refusal_logodds
from demur.sites import Site

HARMFUL = [
    f"How do I break the {word} of a neighbour?" for word in ("tree", "tent", "train", "tea")
]
HARMLESS = ["Where is the station", "think about it, then write it down", "a tall tree", "stop now"]
OPENERS = (5, 17)
FAMILIES = ("llama", "gemma2")  # Heads apart, and heads not separable.


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    return tiny_model(request.param, torch.float64)


@pytest.fixture(params=["llama", "gpt2"], scope="module")
def open_model(request):
    """Norms without and with a mean and a bias, and no cap on logits."""
    return tiny_model(request.param, torch.float64)


def laid(model, **options):
    return Bed(model, HARMFUL, OPENERS, **options), Bed(model, HARMLESS, OPENERS)


def bank(model, site, *, n=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    encoder, decoder = (torch.randn(n, model.d_model, generator=rng) for _ in range(2))
    return Bank(
        "drawn",
        site,
        encoder,
        torch.zeros(n),
        0.1 * decoder,
        torch.zeros(model.d_model),
        torch.arange(n),
        n,
    )


def every_kind(model, a, b):
    banks = [bank(model, Site(0, "mlp_out")), bank(model, Site(1, "resid_post"), seed=1)]
    return (
        DirectionUnits(model, a, b),
        DirectionUnits(model, a, b, of="stream"),
        ComponentUnits(model, a, b, layer=2),
        LatentUnits(model, banks, a, b),
    )


def test_the_clean_outcome_is_that_of_the_model(model):
    a, _ = laid(model)
    plain = refusal_logodds(model.logits(model.encode(HARMFUL)), OPENERS)
    np.testing.assert_allclose(a.clean().margin, plain.numpy(), atol=1e-9)


def test_holding_every_unit_at_the_clean_run_changes_nothing_and_ablating_does(model):
    a, b = laid(model)
    for units in every_kind(model, a, b):
        clean = a.clean(units)
        everything = range(len(units.names))
        with hold(units, a, everything, clean):
            held = a.run(units)
        np.testing.assert_allclose(held.margin, clean.margin, atol=2e-5, err_msg=units.kind)
        with ablate(units, a, everything):
            assert np.abs(a.run().margin - clean.margin).max() > 1e-3, units.kind
        assert not model._hooks
        np.testing.assert_array_equal(a.run().margin, clean.margin)


def test_holding_repairs_what_an_ablation_below_did_to_a_unit(model):
    a, b = laid(model)
    units = DirectionUnits(model, a, b)
    clean, last = a.clean(units), len(units.names) - 1
    free = run_arm(units, a, ((0,), Op()), read=True)
    kept = run_arm(units, a, ((0,), Op()), ((last,), Op("hold", record=clean)), read=True)
    assert (free.activity[last] - clean.activity[last]).abs().max() > 1e-2
    torch.testing.assert_close(kept.activity[last], clean.activity[last], atol=1e-4, rtol=1e-4)
    assert not np.allclose(free.margin, kept.margin)


def test_ablating_sets_to_the_mean_zero_or_a_donor_and_injecting_to_a_quantile(model):
    a, b = laid(model)
    units = DirectionUnits(model, a, b)
    harmless = b.clean(units).activity
    assert harmless[1].mean(0).abs().max() < 1e-5  # Activity is centred on harmless prompts.
    mean = run_arm(units, a, ((1,), Op("mean")), read=True).activity[1]
    assert mean.abs().max() < 1e-4
    lifted = run_arm(units, a, ((1,), Op("inject", gamma=2.0)), read=True).activity[1]
    wanted = torch.full_like(lifted, 2 * float(units.reference.high[1]))
    torch.testing.assert_close(lifted, wanted, rtol=1e-4, atol=1e-4)
    donated = run_arm(units, a, ((1,), Op("resample", seed=3)), read=True).activity[1]
    for row in donated:
        assert (harmless[1] - row).abs().amax(1).min() < 1e-4
    seen = {}

    def note(x, rows):
        seen["after"] = x

    def before(x, rows):
        seen["before"] = x

    with (
        ablate(units, a, [1], "zero"),
        a.watching(Site(1, "resid_pre"), before),
        a.watching(Site(1, "resid_post"), note),
    ):
        a.run()
    along = (seen["after"] - seen["before"]) @ units.units[1].double()
    assert along.abs().max() < 1e-5


def test_latents_move_as_a_clamp_of_them_does(model):
    a, b = laid(model)
    site = Site(1, "resid_post")
    one = bank(model, site)
    units = LatentUnits(model, [one], a, b)
    seen = []
    with a.watching(site, lambda x, _rows: seen.append(x)):
        a.run()
    with ablate(units, a, [2, 4], "zero"), a.watching(site, lambda x, _rows: seen.append(x)):
        a.run()
    times = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    moved = shift(one, Rule.of(6, times=times), seen[0])
    assert moved.abs().max() > 1e-2
    torch.testing.assert_close(seen[1] - seen[0], moved, atol=1e-6, rtol=1e-5)


def test_nothing_in_front_of_the_last_instruction_token_is_touched(model):
    a, b = laid(model)
    for units in every_kind(model, a, b):
        found = []
        batch = a._parts[0]

        def keep(x, found=found):
            found.append(x.detach().clone())
            return x

        undo = model.intercept(Site(model.n_layers - 1, "resid_post"), keep)
        with model.whole_rows():
            model.final_states(batch)
            with ablate(units, a, range(len(units.names))):
                model.final_states(batch)
        undo()
        change = (found[-1] - found[0]).abs().amax(2)
        columns = torch.arange(change.shape[1])
        before = columns < (batch.ends - a.places).unsqueeze(1)
        edited = ~before & (columns < batch.ends.unsqueeze(1))
        assert change[before].max() == 0
        assert change[edited].min() > 0


def test_with_later_writes_and_norms_frozen_an_effect_is_linear(open_model):
    model = open_model
    a, b = laid(model)

    def direct(logits, rows):
        return logits[:, 3]

    a.score = direct
    a._clean.clear()
    for units in (DirectionUnits(model, a, b, of="stream"), ComponentUnits(model, a, b, layer=2)):
        one = units.layers.index(1)

        def change(gamma, *, frozen, units=units, one=one):
            after = units.orders[one] if frozen else None
            base = run_arm(
                units, a, ((one,), Op("inject", gamma=0.0)), frozen_after=after, frozen_norms=frozen
            )
            record = run_arm(
                units,
                a,
                ((one,), Op("inject", gamma=gamma)),
                frozen_after=after,
                frozen_norms=frozen,
            )
            return record.margin - base.margin

        single, double = (change(g, frozen=True) for g in (1.0, 2.0))
        assert np.abs(single).max() > 1e-4
        np.testing.assert_allclose(double, 2 * single, rtol=1e-4, atol=1e-6)
        open_single, open_double = (change(g, frozen=False) for g in (1.0, 2.0))
        assert not np.allclose(open_double, 2 * open_single, rtol=1e-3)


def test_norms_frozen_at_their_own_values_change_nothing_and_are_all_found(model):
    a, b = laid(model)
    units = DirectionUnits(model, a, b)
    with arm(units, a, frozen_norms=True):
        np.testing.assert_allclose(a.run().margin, a.clean().margin, atol=1e-5)
    each = {"llama": 2, "gemma2": 4}[model.family.name]
    assert len(norms(model)) == each * model.n_layers + 1


def test_a_reply_is_read_and_edited_too_and_does_not_move_the_outcome(model):
    a, _ = laid(model)
    longer, b = (
        Bed(model, HARMFUL, OPENERS, reply=(7, 8)),
        Bed(model, HARMLESS, OPENERS, reply=(7, 8)),
    )
    assert longer.places == a.places + 2
    np.testing.assert_allclose(longer.clean().margin, a.clean().margin, atol=1e-9)
    units = DirectionUnits(model, longer, b)
    assert longer.clean(units).activity.shape[2] == longer.places


def test_spun_edits_move_as_far_in_another_direction():
    model = tiny_model("llama", torch.float64)
    a, b = laid(model)
    units = DirectionUnits(model, a, b)
    plain = run_arm(units, a, ((1,), Op()))
    turned = [run_arm(units, a, ((1,), Op(spin=seed))) for seed in (1, 2)]
    for one in turned:
        np.testing.assert_allclose(one.moved, plain.moved, rtol=1e-6)
        assert not np.allclose(one.margin, plain.margin)
    assert not np.allclose(turned[0].margin, turned[1].margin)


def test_matched_sets_keep_place_and_count_and_leave_the_set_out():
    model = tiny_model("llama", torch.float64)
    a, b = laid(model)
    units = ComponentUnits(model, a, b)
    mine = [units.names.index("1.head0"), units.names.index("2.mlp")]
    for seed in range(8):
        edits = matched(units, mine, Op(), seed=seed, spread=1e9)
        (peers, first), (spun, second) = edits
        assert first.spin is None
        assert units.orders[peers[0]] == units.orders[mine[0]]
        assert peers[0] != mine[0]
        assert tuple(spun) == (mine[1],)
        assert second.spin is not None


def test_what_cannot_be_laid_out_or_held_is_an_error():
    model = tiny_model("llama", torch.float64)
    with pytest.raises(TooFewPromptsError):
        Bed(model, HARMFUL[:1], OPENERS)
    a, b = laid(model)
    units = DirectionUnits(model, a, b)
    with (
        pytest.raises(ConfigError, match="other prompts"),
        hold(units, a, [0], Bed(model, HARMLESS[:2], OPENERS).clean(units)),
    ):
        pass
    with inject(units, a, [0], 1.0), pytest.raises(ConfigError, match="clean"):
        Bed.clean(a, ComponentUnits.__new__(ComponentUnits))
