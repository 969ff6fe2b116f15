"""Geometry of harm and refusal on drawn vectors, where what each position carries is known."""

import math

import numpy as np
import pytest
import torch
from tests.planted import FirstWord, apart, apart_prompts

from demur.activations import collect
from demur.errors import TooFewPromptsError
from demur.evals.judges import Exchange, Outcome
from demur.separation import (
    SPACES,
    Belief,
    Clusters,
    Group,
    angle,
    balanced_difference,
    grouping,
    strength_at,
)
from demur.sites import Site

WIDTH = 24


def drawn(n, *, harm, refusal, seed, common=6.0, noise=1.0):
    """Vectors by group: a common mean, a step along `harm`, a step along `refusal`, noise."""
    rng = torch.Generator().manual_seed(seed)
    mean = common * torch.nn.functional.normalize(
        torch.arange(WIDTH, dtype=torch.float64) - 7, dim=0
    )
    return {
        group: mean
        + (harm if group.harmful else -harm)
        + (refusal if group.refused else -refusal)
        + noise * torch.randn(n, WIDTH, generator=rng, dtype=torch.float64)
        for group in Group
    }


def axis(i, length=1.5):
    return length * torch.eye(WIDTH, dtype=torch.float64)[i]


NONE = torch.zeros(WIDTH, dtype=torch.float64)


def test_groups_know_both_sides():
    assert Group.of(harmful=True, refused=False) is Group.HARMFUL_ACCEPTED
    assert [g.harmful for g in Group] == [True, True, False, False]
    assert [g.refused for g in Group] == [True, False, True, False]


@pytest.mark.parametrize("space", SPACES)
def test_a_position_that_carries_harm_groups_by_harm_and_one_of_refusal_by_refusal(space):
    for harm, refusal, low, high in ((axis(0), NONE, 0.9, 1.0), (NONE, axis(1), 0.0, 0.1)):
        fit = drawn(80, harm=harm, refusal=refusal, seed=1)
        found = grouping(Clusters.fit(fit, space), drawn(60, harm=harm, refusal=refusal, seed=2))
        assert low <= found.by.value <= high
        assert found.by.n == 120
        held, free = (
            (found.harm, found.refusal) if harm is not NONE else (found.refusal, found.harm)
        )
        assert held.low > 0.85
        assert free.low < 0.5 < free.high
        assert found.means[Group.HARMFUL_REFUSED].low > found.means[Group.HARMLESS_ACCEPTED].high


def test_a_position_that_carries_both_equally_groups_by_neither():
    fit = drawn(80, harm=axis(0), refusal=axis(1), seed=1)
    found = grouping(Clusters.fit(fit, "centred"), drawn(60, harm=axis(0), refusal=axis(1), seed=2))
    assert found.by.low < 0.5 < found.by.high
    assert min(found.harm.low, found.refusal.low) > 0.6


def test_labels_that_mean_nothing_group_nothing():
    fit, report = (drawn(80, harm=NONE, refusal=NONE, seed=s) for s in (1, 2))
    found = grouping(Clusters.fit(fit, "centred"), report)
    for area in (found.by, found.harm, found.refusal):
        assert area.low < 0.5 < area.high


def test_centring_sees_what_the_common_mean_hides():
    options = {"harm": axis(0, 0.4), "refusal": NONE, "common": 200.0}
    fit, report = (drawn(80, seed=s, **options) for s in (1, 2))
    raw, centred = (grouping(Clusters.fit(fit, space), report) for space in ("raw", "centred"))
    spread = {g: abs(own.value) for g, own in raw.means.items()}
    assert max(spread.values()) < 0.01  # Cosines differ in the fifth digit.
    assert centred.means[Group.HARMFUL_REFUSED].value > 0.1


def test_whitening_does_not_depend_on_the_scale_of_a_coordinate():
    scale = torch.ones(WIDTH, dtype=torch.float64)
    scale[5] = 1000.0
    fit, report = (drawn(80, harm=axis(0), refusal=NONE, seed=s) for s in (1, 2))
    plain = Clusters.fit(fit, "whitened", ridge=0.0).score(report[Group.HARMFUL_ACCEPTED])
    scaled = Clusters.fit({g: x * scale for g, x in fit.items()}, "whitened", ridge=0.0).score(
        report[Group.HARMFUL_ACCEPTED] * scale
    )
    assert np.corrcoef(plain, scaled)[0, 1] > 0.999


def test_an_empty_group_is_untold_not_guessed():
    fit = drawn(40, harm=axis(0), refusal=axis(1), seed=1)
    report = drawn(40, harm=axis(0), refusal=axis(1), seed=2)
    del report[Group.HARMLESS_REFUSED]
    found = grouping(Clusters.fit(fit, "raw"), report)
    assert found.by is None
    assert found.harm.n == 80  # Among accepted prompts only.
    assert Group.HARMLESS_REFUSED not in found.means
    del fit[Group.HARMFUL_REFUSED]
    with pytest.raises(TooFewPromptsError, match="harmful-refused"):
        Clusters.fit(fit, "raw")


# Directions --------------------------------------------------------------------------------------


def test_balanced_directions_are_the_planted_ones_whatever_the_group_sizes():
    vectors = drawn(400, harm=axis(0), refusal=axis(1), seed=3)
    sizes = {
        Group.HARMFUL_REFUSED: 400,
        Group.HARMFUL_ACCEPTED: 40,
        Group.HARMLESS_REFUSED: 40,
        Group.HARMLESS_ACCEPTED: 400,
    }
    uneven = {g: x[: sizes[g]] for g, x in vectors.items()}
    for what, planted in (("harm", axis(0)), ("refusal", axis(1))):
        found, balanced = balanced_difference(uneven, what)
        assert balanced
        cosine = torch.nn.functional.cosine_similarity(found, planted, dim=0)
        assert cosine > 0.97
        # Unbalanced, both would be the sum of the two.
        plain = uneven[Group.HARMFUL_REFUSED].mean(0) - uneven[Group.HARMLESS_ACCEPTED].mean(0)
        assert torch.nn.functional.cosine_similarity(plain, planted, dim=0) < 0.8


def test_a_direction_says_when_it_could_not_be_balanced():
    vectors = drawn(50, harm=axis(0), refusal=axis(1), seed=3)
    one = {g: x for g, x in vectors.items() if g is not Group.HARMLESS_REFUSED}
    found, balanced = balanced_difference(one, "refusal")
    assert not balanced
    assert torch.nn.functional.cosine_similarity(found, axis(1), dim=0) > 0.9
    two = {g: vectors[g] for g in (Group.HARMFUL_REFUSED, Group.HARMLESS_ACCEPTED)}
    mixed, balanced = balanced_difference(two, "harm")
    assert not balanced
    assert torch.nn.functional.cosine_similarity(mixed, axis(0), dim=0) < 0.8
    with pytest.raises(TooFewPromptsError):
        balanced_difference({Group.HARMFUL_REFUSED: vectors[Group.HARMFUL_REFUSED]}, "harm")


def test_the_angle_tells_separate_directions_from_merged_ones():
    inst = drawn(60, harm=axis(0), refusal=NONE, seed=4)
    for refusal, low, high in ((axis(1), -0.3, 0.3), (axis(0), 0.9, 1.0)):
        post = drawn(60, harm=NONE, refusal=refusal, seed=5)
        found = angle(inst, post, seed=0)
        assert low < found.cosine.value < high
        assert found.cosine.low < found.cosine.value
        assert found.harm_balanced
        assert found.refusal_balanced
        merged = high == 1.0
        assert (found.p_shuffled < 0.02) is merged
        assert found.shuffled[0] < 0 < found.shuffled[1]


def test_beliefs_put_the_groups_into_their_quadrants():
    def stacked(vectors, groups):
        return torch.stack([torch.cat([vectors[g] for g in groups])] * 3)

    fit, report = (drawn(80, harm=axis(0), refusal=axis(1), seed=s) for s in (6, 7))
    harmful, harmless = ([g for g in Group if g.harmful is side] for side in (True, False))
    refused, accepted = ([g for g in Group if g.refused is side] for side in (True, False))
    harm = Belief.fit(stacked(fit, harmful), stacked(fit, harmless), centred=True)
    refusal = Belief.fit(stacked(fit, refused), stacked(fit, accepted), centred=True)
    for group in Group:
        rows = torch.stack([report[group]] * 3)
        assert (float(harm(rows).mean()) > 0) is group.harmful
        assert (float(refusal(rows).mean()) > 0) is group.refused


# Equal cost --------------------------------------------------------------------------------------


def counted(cost):
    calls = []
    return calls, lambda strength: calls.append(strength) or cost(strength)


@pytest.mark.parametrize("target", [0.02, 0.5, 3.0])
@pytest.mark.parametrize(
    "cost",
    [
        lambda s: 0.1 * s**2,
        lambda s: 4.0 * s**2,
        lambda s: 0.5 * s**1.2,
        lambda s: 0.6 * s**3,
        lambda s: 6 * s**2 / (s**2 + 3),  # Levels off.
        lambda s: 0.1 * s**2 + 2 * max(s - 1.5, 0.0),  # A kink.
        lambda s: 5.0 * s**2 if s < 0.9 else math.inf,
    ],
)
def test_strengths_of_equal_cost_are_found_in_few_passes(cost, target):
    calls, counting = counted(cost)
    found = strength_at(counting, target)
    assert found in calls
    assert len(calls) <= 6
    assert cost(found) == pytest.approx(target, rel=0.1)


def test_what_is_too_weak_at_any_strength_is_brought_to_the_highest():
    calls, counting = counted(lambda s: 0.01 * s)
    assert strength_at(counting, 3.0) == 8.0
    assert calls == [1.0, 8.0]
    assert strength_at(lambda _: 0.0, 3.0) == 8.0
    assert strength_at(counting, 3.0, most=0.5) == 0.5


def test_nothing_costs_as_much_as_nothing():
    calls, counting = counted(lambda s: s**2)
    assert strength_at(counting, 0.0) == 0.0
    assert not calls


# A model -----------------------------------------------------------------------------------------


def read_by_group(made, seed):
    """Vectors of all four groups at both ends of the template, grouped by what the model does."""
    asked = [
        (prompt, harmful)
        for harmful in (True, False)
        for scary in (True, False)
        for prompt in apart_prompts(
            40, harmful=harmful, scary=scary, seed=seed + 2 * harmful + scary
        )
    ]
    texts = [prompt for prompt, _ in asked]
    said = made.model.generate(texts, max_new_tokens=1, batch_size=80)
    verdicts = FirstWord()([Exchange(p, reply.text) for p, reply in zip(texts, said, strict=True)])
    groups = [
        Group.of(harmful=harmful, refused=verdict.outcome is Outcome.REFUSED)
        for (_, harmful), verdict in zip(asked, verdicts, strict=True)
    ]
    ends = [made.model.template.positions[0].index, -1]
    read = collect(made.model, texts, sites=made.model.stream_sites, positions=ends)
    return [
        {
            group: read.at(Site(3, "resid_pre"), end)[
                [i for i, g in enumerate(groups) if g is group]
            ]
            for group in Group
        }
        for end in ends
    ]


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_that_keeps_harm_and_refusal_apart_is_told_from_one_that_merges_them(merged):
    made = apart(merged=merged)
    (fit_inst, fit_post), (inst, post) = (read_by_group(made, seed) for seed in (10, 20))
    assert min(map(len, fit_inst.values())) == 40
    by = [
        grouping(Clusters.fit(fit, "centred"), report).by
        for fit, report in ((fit_inst, inst), (fit_post, post))
    ]
    found = angle(fit_inst, fit_post, seed=0)
    harm, _ = balanced_difference(fit_inst, "harm")
    refusal, _ = balanced_difference(fit_post, "refusal")
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(refusal, made.refusal, dim=0) > 0.95
    assert by[1].high < 0.1  # The last token groups by refusal in both.
    if merged:
        assert by[0].high < 0.1
        assert found.cosine.low > 0.9
    else:
        assert cosine(harm, made.harm, dim=0) > 0.95
        assert by[0].low > 0.9
        assert found.cosine.high < 0.2
