"""What an edit's kind, strength and band of layers come to."""

import pytest
import torch
from tests.serve.parts import asked, direction_of
from tests.tiny import tiny_model

from demur.activations import reading
from demur.directions import Direction
from demur.errors import ConfigError, UnknownNameError
from demur.interventions import Ablate, Add, applied
from demur.serve import Edit
from demur.serve.edits import named
from demur.sites import Site


def streams(model, edit, sites):
    undo = [model.intercept(site, act) for site, act in edit.acts(model)]
    with reading(model, sites) as held:
        model.logits(model.encode(["far from here", "a tree"]))
    for one in undo:
        one()
    return held


def test_a_band_of_all_blocks_is_no_band():
    model = tiny_model()
    way = direction_of(model)
    whole, band = Edit("w", way, "ablate"), Edit("w", way, "ablate", layers=(0, 2))
    assert (
        dict(whole.acts(model))
        == dict(band.acts(model))
        == dict.fromkeys(model.write_sites, Ablate(way))
    )


def test_in_a_band_the_stream_holds_nothing_of_an_ablated_direction():
    model = tiny_model()
    way = direction_of(model)
    unit = way.unit.double()
    blocks = [Site(layer, "resid_post") for layer in range(3)]
    held = streams(model, Edit("w", way, "ablate", layers=(1, 1)), blocks)
    along = [float((held[site] @ unit).abs().max()) for site in blocks]
    assert along[1] < 1e-6 < min(along[0], along[2])


def test_half_an_ablation_takes_half():
    model = tiny_model()
    way = direction_of(model)
    unit = way.unit.double()
    site = Site(0, "resid_pre")
    plain = streams(model, Edit("w", way, "ablate", 0.0), [site])[site] @ unit
    half = streams(model, Edit("w", way, "ablate", 0.5), [site])[site] @ unit
    assert torch.allclose(half, plain / 2, atol=1e-6)


def test_a_clamp_holds_the_coordinate_at_each_block_of_its_band():
    model = tiny_model()
    way = direction_of(model, length=4.0)
    sites = [Site(layer, "resid_pre") for layer in (0, 1, 2)]
    held = streams(model, Edit("w", way, "clamp", -0.5, (1, 2)), sites)
    for site in sites[1:]:
        along = held[site] @ way.unit.double()
        assert torch.allclose(along, torch.full_like(along, -2.0), atol=1e-5)
    assert (held[sites[0]] @ way.unit.double() + 2).abs().min() > 1e-3


def test_adding_in_a_band_adds_at_each_block():
    way = direction_of(tiny_model())
    acts = Edit("w", way, "add", 2.0, (0, 2)).acts(tiny_model())
    assert acts == tuple((Site(layer, "resid_pre"), Add(way, 2.0)) for layer in range(3))


def test_what_does_not_fit_is_refused():
    model = tiny_model()
    way = direction_of(model)
    for layers in ((2, 1), (0, 3), (-1, 1)):
        with pytest.raises(ConfigError, match="no blocks"):
            Edit("w", way, "add", layers=layers).acts(model)
    narrow = Direction.from_vector(
        torch.ones(5), site=Site(0, "resid_pre"), position=-1, recipe="test"
    )
    with pytest.raises(ConfigError, match="5 wide"):
        Edit("w", narrow, "add").acts(model)
    with pytest.raises(ConfigError, match="no direction is loaded"):
        named({}, "w")
    with pytest.raises(UnknownNameError, match="refusal"):
        named({"refusal": way}, "refusel")


def test_edits_over_http_change_one_request_and_are_reported():
    model = tiny_model()
    way = direction_of(model)
    plain = model.generate(["a tree"], max_new_tokens=8)[0]
    with applied(model, Ablate(way)):
        ablated = model.generate(["a tree"], max_new_tokens=8)[0]
    assert plain.text != ablated.text
    with asked(model, directions={"w": way}) as ask:
        for edits, expected in (((), plain), (({"kind": "ablate", "direction": "w"},), ablated)):
            reply = ask.chat("a tree", max_tokens=8, demur={"edits": edits, "trace": True}).json()
            assert reply["choices"][0]["message"]["content"] == expected.text
            assert reply["demur"]["ids"] == list(expected.ids)
        told = reply["demur"]["edits"][0]
        # Seven sites, each in the pass that reads the prompt and in one for each token but the
        # first.
        passes = len(expected.ids) + (1 if expected.finished else 0)
        assert told == {
            "direction": "w",
            "kind": "ablate",
            "strength": 1.0,
            "layers": None,
            "at": "all",
            "applied": 7 * passes,
        }
    with asked(model, directions={"w": way}, edits=False) as ask:
        refused = ask.chat(demur={"edits": [{"kind": "ablate", "direction": "w"}]})
        assert refused.status_code == 403
        assert ask("GET", "/demur/info").json()["edit_kinds"] == []
