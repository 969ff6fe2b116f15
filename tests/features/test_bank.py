from dataclasses import replace

import pytest
import torch
from tests.tiny import TINY_CONFIGS, tiny_model

from demur.activations import reading
from demur.errors import ConfigError
from demur.features.bank import Bank
from demur.sites import Site

WIDTH = 32
SITE = Site(1, "resid_post")


def a_bank(kind="jumprelu", n=20, seed=0, **fields):
    rng = torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    own = {"jumprelu": {"threshold": drawn(n).abs()}, "topk": {"k": 5}, "relu": {}}[kind]
    return Bank(
        name=kind,
        site=SITE,
        encoder=drawn(n, WIDTH),
        bias=drawn(n),
        decoder=drawn(n, WIDTH),
        offset=drawn(WIDTH),
        ids=torch.arange(n),
        width=n,
        activation=kind,
        **{**own, **fields},
    )


def rows(n=40, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(4, n // 4, WIDTH, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("centred", [False, True])
def test_a_slice_encodes_as_the_whole_does(kind, normalise, centred):
    bank = a_bank(kind, normalise=normalise, centred=centred)
    x = rows()
    whole = bank.encode(x)
    assert 0 < (whole > 0).double().mean() < 1
    torch.testing.assert_close(bank.sliced([7, 3, 12]).encode(x), whole[..., [7, 3, 12]])
    torch.testing.assert_close(
        bank.sliced([7, 3, 12]).sliced([12, 7]).encode(x), whole[..., [12, 7]]
    )


def test_jumprelu_lets_through_what_lies_above_the_threshold_and_does_not_shrink_it():
    bank = a_bank()
    x = rows()
    raw = x @ bank.encoder.T + bank.bias  # By hand: no offset is taken off.
    torch.testing.assert_close(bank.encode(x), torch.where(raw > bank.threshold, raw, 0.0))


def test_topk_keeps_k_of_all_latents_and_only_positive_ones():
    bank = a_bank("topk")
    counts = (bank.encode(rows()) > 0).sum(-1)
    assert counts.max() == 5
    low = replace(bank, bias=bank.bias - 1e3)
    assert not low.encode(rows()).any()


def test_the_offset_is_taken_off_only_where_it_should_be():
    bank = a_bank("relu", centred=True)
    x = rows()
    moved = replace(bank, centred=False)
    torch.testing.assert_close(bank.encode(x), moved.encode(x - bank.offset))


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm"])
def test_normalised_banks_see_no_length_and_write_with_it(normalise):
    bank = a_bank("relu", normalise=normalise)
    x = rows()
    f = bank.encode(x)
    torch.testing.assert_close(bank.encode(10 * x), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bank.decode(f, 10 * x), 10 * bank.decode(f, x), rtol=1e-6, atol=1e-6)
    # One more unit of a latent moves the reconstruction by scale times its decoder row.
    f2 = f.clone()
    f2[..., 4] += 1.0
    step = bank.decode(f2, x) - bank.decode(f, x)
    torch.testing.assert_close(step, bank.scale(x) * bank.decoder[4].expand_as(x))


def test_sinks_activate_nothing():
    x = rows()
    x[0, 0] *= 1000
    bank = a_bank(largest_norm=float(x[1].norm(dim=-1).max()) * 3)
    assert not bank.encode(x)[0, 0].any()
    assert bank.encode(x)[1].any()
    assert not bank.usable(x)[0, 0]


def test_a_latent_that_is_not_there_is_an_error():
    bank = a_bank().sliced([3, 4])
    with pytest.raises(ConfigError, match=r"holds no latent 5\n.*it holds 2 of 20"):
        bank.sliced([5])


def test_thresholds_and_k_belong_to_their_kinds():
    with pytest.raises(ConfigError, match="has no thresholds"):
        replace(a_bank(), threshold=None)
    with pytest.raises(ConfigError, match="has k = 3"):
        replace(a_bank("relu"), k=3)


def test_what_a_latent_writes_is_a_direction():
    bank = a_bank()
    direction = bank.direction(9)
    torch.testing.assert_close(direction.unit.double() * direction.norm, bank.decoder[9])
    assert direction.site == SITE
    assert "latent 9" in direction.recipe


@pytest.mark.parametrize("family", list(TINY_CONFIGS))
def test_mlp_in_is_what_the_mlp_reads(family):
    model = tiny_model(family)
    into, out = Site(1, "mlp_in"), Site(1, "mlp_out")
    ids = torch.randint(5, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    with reading(model, [into, out]) as seen:
        model.logits(ids)
    if model.family.linear_writes:
        mlp = model.blocks[1].get_submodule(model.family.mlp)
        again = mlp(seen[into])
        again = again[0] if isinstance(again, tuple) else again
        torch.testing.assert_close(again, seen[out])
    undo = model.intercept(into, torch.zeros_like)
    with reading(model, [out]) as changed:
        model.logits(ids)
    undo()
    assert not torch.allclose(changed[out], seen[out])
