import json
from copy import deepcopy
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from tests.tiny import TINY_CONFIGS, tiny_model

from demur.compare.checkpoints import (
    Case,
    across,
    detection,
    emptied,
    emptied_along,
    energies,
    projected_out,
    removed,
    spectrum,
    writers,
)
from demur.compare.contrasts import Contrast
from demur.compare.rows.checkpoints import Across, Detection, Projected
from demur.directions import Direction
from demur.edits import Delta, as_delta, edited
from demur.errors import ConfigError, FamilyError
from demur.interventions import Ablate
from demur.models import Model
from demur.sites import Site

SITE = Site(1, "resid_pre")
LINEAR = [name for name in TINY_CONFIGS if tiny_model(name).family.linear_writes]


def direction(seed, width=32):
    rng = torch.Generator().manual_seed(seed)
    vector = torch.randn(width, generator=rng, dtype=torch.float64)
    return Direction.from_vector(vector, site=SITE, position=-1, recipe="drawn")


def cut(model, one, *, strength=1.0, share=1.0):
    delta = as_delta(model, Ablate(one))
    names = list(delta.up)[int(len(delta.up) * (1 - share)) :]
    return edited(
        model,
        Delta(
            {name: strength * delta.up[name] for name in names},
            {name: delta.down[name] for name in names},
        ),
    )


def altered(model, change):
    hf = deepcopy(model.hf)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.copy_(change(parameter))
    return Model(hf, model.family, model.template, name=f"{model.name}, altered")


def noisy(model, size, seed):
    rng = torch.Generator().manual_seed(seed)
    return altered(
        model,
        lambda w: w + size * w.std() * torch.randn(w.shape, generator=rng, dtype=torch.float64),
    )


def rounded(model):
    return altered(model, lambda w: w.bfloat16().double())


@pytest.mark.parametrize("name", LINEAR)
def test_writers_are_what_an_ablation_of_the_weights_edits(name):
    """Of every family, Conv1D and mixtures of experts too: nothing is left along the direction."""
    model, one = tiny_model(name), direction(3)
    before = energies(model, one.unit.double())
    after = energies(cut(model, one), one.unit.double())
    assert before.keys() == after.keys()
    assert min(before.values()) > 0.05
    assert max(after.values()) < 1e-12
    blocks = [writer for writer in writers(model) if writer.layer is not None]
    assert {writer.layer for writer in blocks} == {0, 1, 2}
    assert all(len(writer.weight) == model.d_model for writer in writers(model))


@pytest.mark.parametrize("name", [name for name in TINY_CONFIGS if name not in LINEAR])
def test_families_with_norms_behind_their_writes_are_looked_at_before_them(name):
    model = tiny_model(name)
    row = emptied(model)
    assert row.verdict == "no sign of it"
    assert "before the norms" in row.looked_at
    assert row.writers == 7
    unit = direction(3).unit.double()
    hf = deepcopy(model.hf)
    blocks = Model(hf, model.family, model.template, name="edited")
    with torch.no_grad():
        for writer in writers(blocks):
            writer.weight.sub_(torch.outer(unit, unit @ writer.weight))
    if name != "gemma3-vision":
        assert emptied(blocks).verdict == "projected out"


def test_the_spectrum_is_the_mean_logarithm():
    model = tiny_model("llama")
    own = spectrum(model)
    logs = []
    for writer in writers(model):
        left, values, _ = np.linalg.svd(writer.weight.numpy())
        energy = np.maximum(values**2 / (values**2).mean(), 1e-7)
        logs.append(left @ np.diag(np.log(energy)) @ left.T)
    np.testing.assert_allclose(own.log.numpy(), np.mean(logs, 0), atol=1e-8)
    assert own.writers == 7
    assert abs(float(own.energy.trace()) - 32) < 1e-9


def test_a_projection_is_found_without_any_direction_and_named():
    model, one = tiny_model("qwen2", seed=4), direction(8)
    changed = rounded(cut(model, one))
    row = emptied(changed)
    assert row.verdict == "projected out"
    assert row.count == 1
    assert row.empty_layers == (0, 1, 2)
    assert row.statistic < row.null_low
    _, vectors = torch.linalg.eigh(spectrum(changed).log)
    assert abs(float(vectors[:, 0] @ one.unit.double())) > 0.999
    assert emptied(model).verdict == "no sign of it"


def test_two_projections_are_counted():
    model = tiny_model("llama", seed=2)
    # The second edit brings a little of the first back, unless the two are orthogonal.
    second = direction(2).unit.double()
    first = direction(1).unit.double()
    first = first - (first @ second) * second
    one = Direction.from_vector(first, site=SITE, position=-1, recipe="orthogonal")
    twice = cut(cut(model, one), direction(2))
    assert emptied(twice).count == 2


def test_the_wrong_direction_is_not_called_projected_out():
    model = tiny_model("gpt2", seed=5)
    changed = cut(model, direction(1))
    assert emptied_along(changed, direction(1)).verdict == "projected out"
    assert emptied_along(changed, direction(2)).verdict == "no sign of it"
    wrong = removed(changed, model, directions={"other": direction(2)})[1]
    assert wrong.verdict == "no sign of it"


def test_with_the_base_the_strength_is_measured():
    model = tiny_model("llama", seed=6)
    for strength in (0.5, 1.0):
        changed = noisy(cut(model, direction(1), strength=strength), 1e-3, 0)
        searched, given = removed(changed, model, directions={"own": direction(1)})
        for row in (searched, given):
            assert row.verdict == "projected out"
            assert abs(row.statistic - strength) < 0.01
            assert row.explained > 0.9
    half = cut(model, direction(1), strength=0.5)
    assert emptied_along(half, direction(1)).verdict != "projected out"


def test_weights_that_shrank_were_not_projected():
    """Along every direction the same share is gone: the null has it too."""
    model = tiny_model("llama", seed=6)
    shrunk = altered(model, lambda w: 0.7 * w)
    for row in removed(shrunk, model, directions={"some": direction(1)}):
        assert abs(row.statistic - 0.3) < 1e-9
        assert row.verdict == "no sign of it"


def test_an_adapter_along_one_direction_is_no_projection():
    """Its rows have nothing to do with what the base writes there."""
    model = tiny_model("llama", seed=6)
    unit = direction(1).unit.double()
    hf = deepcopy(model.hf)
    merged = Model(hf, model.family, model.template, name="merged")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for writer in writers(merged):
            row = torch.randn(writer.weight.shape[1], generator=rng, dtype=torch.float64)
            writer.weight.add_(0.3 * torch.outer(unit, row))
    found = removed(merged, model, directions={"own": direction(1)})
    assert found[0].explained > 0.99
    assert all(row.verdict == "no sign of it" for row in found)


def test_the_same_weights_are_told_as_such():
    model = tiny_model("llama")
    rows = projected_out(model, base=model, directions={"some": direction(1)})
    assert [row.test for row in rows] == [
        "any direction",
        "this direction",
        "any direction, with the base",
        "this direction, with the base",
    ]
    assert all(row.verdict == "no sign of it" for row in rows)
    assert rows[2].p is None
    assert "bit for bit" in rows[2].reason
    for row in rows:
        text = json.dumps(asdict(row), allow_nan=False)
        assert TypeAdapter(Projected).validate_json(text) == row


def test_another_model_is_no_base():
    with pytest.raises(FamilyError):
        removed(tiny_model("llama"), tiny_model("gpt2"))
    with pytest.raises(ConfigError, match="coordinates"):
        emptied_along(tiny_model("llama"), direction(1, width=16))


UNTOUCHED = {
    "as it is": lambda model: model,
    "bfloat16": rounded,
    "noise of 2%": lambda model: noisy(model, 0.02, 0),
    "noise of 20%": lambda model: noisy(model, 0.2, 0),
}
EDITED = {
    "whole": cut,
    "bfloat16 after": lambda model, one: rounded(cut(model, one)),
    "noise of 2% after": lambda model, one: noisy(cut(model, one), 0.02, 0),
    "half of the weights": lambda model, one: cut(model, one, share=0.5),
    "half strength": lambda model, one: cut(model, one, strength=0.5),
}


def cases(n):
    families, out = ["llama", "qwen2", "gpt2", "gpt-neox", "qwen3-moe"], []
    for i in range(n):
        model, one = tiny_model(families[i % 5], seed=100 + i), direction(i)
        kind = list(UNTOUCHED)[i % 4]
        out.append(Case(kind, False, partial(UNTOUCHED[kind], model), model, one))
        kind = list(EDITED)[(i + i // 5) % 5]
        out.append(Case(kind, True, partial(EDITED[kind], model, one), model, one))
    return out


def check(rows):
    found = {(row.test, row.kind, row.edited): row.found for row in rows}
    for (test, kind, was_edited), share in found.items():
        if not was_edited:
            assert share.value == 0.0, (test, kind)
        elif kind == "half strength" and "base" not in test:
            assert share.value == 0.0, (test, kind)  # It leaves what any direction has.
        elif kind != "all":
            assert share.value == 1.0, (test, kind)
    for row in rows:
        assert TypeAdapter(Detection).validate_json(json.dumps(asdict(row))) == row


def test_untouched_are_let_alone_and_edited_are_found():
    rows, said = detection(cases(5))
    check(rows)
    assert len(said) == 10


@pytest.mark.slow
def test_of_twenty_untouched_none_is_called_edited_and_of_twenty_edited_all_that_can_be():
    check(detection(cases(20))[0])


# Across models -----------------------------------------------------------------------------------


def contrast(vector, *, n=24, noise=1.0, seed=0, site=SITE):
    rng = torch.Generator().manual_seed(seed)
    sides = []
    for sign in (0.5, -0.5):
        drawn = noise * torch.randn(n, len(vector), generator=rng, dtype=torch.float64)
        sides.append(sign * vector + drawn)
    return Contrast.of_classes("refusal", *sides, site=site, position=-1)


def test_the_same_readings_are_the_same_direction():
    axis = 4 * torch.eye(16, dtype=torch.float64)[0]
    own = contrast(axis)
    (row,) = across({"base": own, "copy": own}, base="base", draws=200, splits=40)
    assert abs(row.cosine.value - 1) < 1e-12
    assert row.cosine.low > 1 - 1e-9
    assert row.p < 0.01
    assert row.p_holm == row.p
    assert abs(row.corrected - 1) < 0.2
    assert row.length_ratio == 1.0
    assert row.gap_change.value == 0.0
    assert row.positive_moved.value == 0.0
    text = json.dumps(asdict(row), allow_nan=False)
    assert TypeAdapter(Across).validate_json(text) == row


def test_noise_is_corrected_for_and_unrelated_directions_are_not_significant():
    axes = torch.eye(16, dtype=torch.float64)
    own = contrast(3 * axes[0], noise=1.2, n=60)
    same = contrast(3 * axes[0], noise=1.2, n=60, seed=1)
    other = contrast(3 * axes[1], noise=1.2, n=60, seed=2)
    rows = across({"base": own, "same": same, "other": other}, base="base", draws=300)
    by_name = {row.model: row for row in rows}
    assert by_name["same"].cosine.value < 0.97
    assert abs(by_name["same"].corrected - 1) < 0.12
    assert by_name["same"].p_holm < 0.05
    assert abs(by_name["other"].cosine.value) < by_name["other"].null_high + 0.1
    assert by_name["other"].p > 0.05
    assert 0.5 < by_name["same"].base_reliability < 1


def test_how_far_prompts_moved_is_in_units_of_the_gap():
    axis = 4 * torch.eye(16, dtype=torch.float64)[0]
    own = contrast(axis, noise=0.1)
    unit, gap = own.vector() / own.vector().norm(), float(own.vector().norm())
    moved = Contrast.of_classes(
        "refusal", own.rows[0] - 0.5 * gap * unit, own.rows[1] + 0.25 * gap * unit,
        site=SITE, position=-1,
    )  # fmt: skip
    (row,) = across({"base": own, "edited": moved}, base="base", draws=100, splits=20)
    # Not to the last digit: each prompt is read along the direction of the others.
    assert abs(row.positive_moved.value + 0.5) < 2e-3
    assert abs(row.negative_moved.value - 0.25) < 2e-3
    assert abs(row.gap_change.value + 0.75) < 2e-3
    assert abs(row.length_ratio - 0.25) < 1e-9


def test_sites_are_matched_and_other_prompts_are_refused():
    axis = torch.eye(16, dtype=torch.float64)[0]
    deep = Site(2, "resid_pre")
    two = [contrast(axis), contrast(axis, site=deep)]
    rows = across({"base": two, "other": two[1:]}, base="base", draws=50, splits=10)
    assert [row.site for row in rows] == [str(deep)]
    with pytest.raises(ConfigError, match="same prompts"):
        across({"base": two[0], "other": contrast(axis, n=30)}, base="base")
    with pytest.raises(ConfigError, match="different sites"):
        across({"base": two[0], "other": two[1]}, base="base")
    with pytest.raises(ConfigError, match="there is no"):
        across({"other": two[0]}, base="base")
