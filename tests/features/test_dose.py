"""Doses of a planted latent: identities first, then what the planted model must show."""

import dataclasses
import json
import math

import pytest
import torch
from pydantic import TypeAdapter
from tests.planted import PLANTED_LAYER, FirstWord, planted, prompts
from tests.tiny import tiny_model

from demur.causal import NeutralText
from demur.directions import Direction
from demur.errors import ConfigError, PromptFileError, TooFewPromptsError
from demur.features.bank import Bank
from demur.features.clamp import EDITED, clamping
from demur.features.discover import Latent
from demur.features.dose import (
    WORDINGS,
    Choice,
    Dose,
    Edit,
    Latents,
    Tokens,
    Turned,
    Wording,
    beyond_others,
    choice_scores,
    choices_from,
    distinct_pairs,
    dose_response,
    generic_cost,
    latents_of,
    n_arms,
    push,
    repeated_runs,
    strength_for,
    take_out,
    text_losses,
)
from demur.features.read import read_latents
from demur.features.rows.dose import DoseResponse
from demur.interventions import Ablate, Add, applied
from demur.models import Model
from demur.selection import RefusalTokens, batched_logits
from demur.sites import Site, Span
from demur.stats import Estimate

SITE = Site(PLANTED_LAYER, "resid_pre")


def planted_bank(made, n: int = 30, site: Site = SITE) -> Bank:
    """Latent 0 is refusal; the others read and write random directions beside it."""
    rng = torch.Generator().manual_seed(5)
    rows = torch.randn(n, made.model.d_model, generator=rng)
    r = made.direction.float()
    rows = torch.nn.functional.normalize(rows - (rows @ r).unsqueeze(1) * r, dim=1)
    rows[0] = r
    bias = torch.full((n,), -0.05)
    return Bank("planted", site, rows, bias, rows.clone(), torch.zeros(len(r)), torch.arange(n), n)


@pytest.fixture(scope="module")
def made():
    return planted()


@pytest.fixture(scope="module")
def bank(made):
    return planted_bank(made)


@pytest.fixture(scope="module")
def parts(made, bank):
    """The refusal latent, and all others one by one."""
    both = [*prompts(12, harmful=True, seed=11), *prompts(12, harmful=False, seed=12)]
    reads = read_latents(made.model, [bank], both)
    calm = read_latents(made.model, [bank], prompts(12, harmful=False, seed=13))
    each = [latents_of([Latent("planted", i)], reads, calm) for i in range(len(bank))]
    return [one for one in each if float(one[0].high) > 0]


@pytest.fixture(scope="module")
def tokens(made):
    return RefusalTokens((made.refusal_id,), ("Sorry",), (1.0,), (0.0,), 10, learned=True)


def run(made, parts, tokens, doses, *, others, directions, **options):
    dense = Direction.from_vector(made.direction, site=SITE, position=-1, recipe="planted")
    return dose_response(
        made.model,
        parts[0],
        doses,
        harmful=prompts(8, harmful=True, seed=1),
        harmless=prompts(8, harmful=False, seed=2),
        tokens=tokens,
        others=parts[1 : 1 + others],
        dense=dense,
        directions=directions,
        seed=3,
        **options,
    )


@pytest.fixture(scope="module")
def wide(made, parts, tokens):
    """One dose beside enough other arms for a p of 0.05."""
    return run(made, parts, tokens, [Dose("min-clamp", 0.3)], others=19, directions=2, wordings=())


DOSES = [Dose("scale", 1.0), Dose("scale", -1.0), Dose("zero")]


@pytest.fixture(scope="module")
def dosed(made, parts, tokens):
    """Few other arms, and every outcome."""
    return run(
        made,
        parts,
        tokens,
        DOSES,
        others=1,
        directions=1,
        lookalikes=prompts(6, harmful=False, seed=3),
        wordings=[Wording("ask", "bypass", before="word1 word2 ")],
        neutral=["word1 word2 good1 word3 word5", "word4 good2 word7"],
        items=[
            Choice("word1 good2", ("Sure", "Sorry"), 0),
            Choice("word9", ("Yes", "Here"), 1),
            Choice("bad1 bad2", ("Well", "Sorry", "Yes"), 2),
        ],
        judge=FirstWord(),
        generated=2,
        max_new_tokens=2,
    )


def of(dosed, family, dose):
    return [p for p in dosed.row.points if p.family == family and p.dose == dose]


# Identities ----------------------------------------------------------------------------------


def test_a_dose_of_nothing_changes_nothing(made, parts, dosed):
    dose = "scale 1"
    for family in ("set", "matched latents", "other latents", "random direction"):
        for point in of(dosed, family, dose):
            assert point.kl.value == 0 == point.kl.high
            assert all(one.value == 0 for one in point.refusal.values())
            assert all(one.value == 0 for one in point.norm_share.values())
            if point.perplexity_ratio is not None:
                assert point.perplexity_ratio.value == 1
                assert point.margin_change.value == 0
    batch = made.model.encode(["bad1 word1", "good1 word2"])
    with Edit((parts[0][0].clamp("min-clamp", 0.0),)).holding(made.model):
        same = made.model.logits(batch)
    assert torch.equal(same, made.model.logits(batch))


def test_other_arms_move_tokens_as_far(dosed, wide):
    for some, dose, on in (
        (dosed, "zero", "harmful"),
        (dosed, "scale -1", "harmful"),
        (wide, "min-clamp 0.3", "harmless"),
    ):
        (own,) = of(some, "set", dose)
        assert own.norm_share[on].value > 0.005
        for family in ("other latents", "random direction", "dense direction"):
            found = of(some, family, dose)
            assert len(found) >= 1
            for point in found:
                assert point.reached, point.arm
                assert point.norm_share[on].value == pytest.approx(
                    own.norm_share[on].value, rel=1e-3
                )
        for point in of(some, "random direction", dose):  # At every token, so for all classes.
            for key, share in own.norm_share.items():
                assert point.norm_share[key].value == pytest.approx(share.value, rel=1e-4)
                assert point.moved[key] == own.moved[key]


def test_norm_shares_are_those_of_the_running_edit(made, parts):
    model, asked = made.model, prompts(5, harmful=True, seed=4)
    batch = model.encode(asked)
    clamp = parts[0][0].clamp("min-clamp", 1.5)
    found = Tokens(model, batch, clamp.bank)
    shares = found.shares(clamp.bank, clamp.rule)
    with clamping(model, clamp) as sizes:
        model.logits(batch)
    assert len(shares) == int(
        sum(batch.spans[s].sum() for s in (Span.INSTRUCTION, Span.POST_INSTRUCTION))
    )
    assert float(shares[shares > 0].mean()) == pytest.approx(sizes.mean(SITE), rel=1e-5)
    assert found.by_prompt(shares).mean() == pytest.approx(float(shares.mean()))  # Equal lengths.


def test_a_push_is_an_addition_and_taking_all_out_is_an_ablation_at_one_site(made, bank):
    model, asked = made.model, prompts(4, harmful=True, seed=6)
    batch = model.encode(asked)
    direction = Direction.from_vector(2.5 * made.direction, site=SITE, position=-1, recipe="r")
    with Edit((push(direction, -0.7 * 2.5, bank),)).holding(model):
        pushed = batched_logits(model, batch)
    with applied(model, Add(direction, -0.7), where=EDITED):
        added = batched_logits(model, batch)
    torch.testing.assert_close(pushed, added, rtol=1e-5, atol=1e-5)

    @dataclasses.dataclass(frozen=True)
    class Here(Ablate):
        def sites(self, model):
            del model
            return (SITE,)

    with Edit((take_out(direction, 1.0, bank),)).holding(model):
        taken = batched_logits(model, batch)
    with applied(model, Here(direction), where=EDITED):
        ablated = batched_logits(model, batch)
    torch.testing.assert_close(taken, ablated, rtol=1e-5, atol=1e-5)
    assert (taken - batched_logits(model, batch)).abs().max() > 1


def test_turned_moves_each_token_as_far(made, parts):
    clamp = parts[0][0].clamp("clamp", 2.0)
    direction = Direction.from_vector(torch.ones(64), site=SITE, position=-1, recipe="")
    x = torch.randn(3, 5, 64, dtype=torch.float64)
    far = (clamp(x) - x).norm(dim=2)
    moved = Turned(clamp, direction)(x) - x
    torch.testing.assert_close(moved.norm(dim=2), far, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        moved, far.unsqueeze(2) * direction.unit.double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_edits_survive_the_cache(family):
    """Greedy replies from cached keys are those of whole rows computed anew at every token."""
    model = tiny_model(family, template="plain" if family == "gpt2" else "chatml")
    rng = torch.Generator().manual_seed(1)
    site = Site(1, "resid_post")
    rows = torch.randn(4, model.d_model, generator=rng)
    cut = Bank(
        "b", site, rows, torch.zeros(4), rows, torch.zeros(model.d_model), torch.arange(4), 4
    )
    own = Latents(cut, torch.full((4,), 3.0), torch.ones(4))
    edit = Edit((own.clamp("clamp", 1.0),))
    asked = ["Name a tree", "Where is the station, and is it far from here?"]
    with edit.holding(model):
        cached = [one.ids for one in model.generate(asked, max_new_tokens=6)]
        anew = [[], []]
        for _ in range(6):
            logits = model.logits(model.encode(asked, anew))
            for row, token in zip(anew, logits.argmax(1).tolist(), strict=True):
                row.append(token)
    for one, other in zip(cached, anew, strict=True):
        assert list(one) == other[: len(one)]
    assert cached != [one.ids for one in model.generate(asked, max_new_tokens=6)]


def test_text_losses_without_an_edit_are_those_of_neutral_text(made, parts):
    text = NeutralText(made.model, ["word1 word2 good3 word4", "good1 bad2"])
    plain = text_losses(made.model, text)
    assert plain == pytest.approx(text.plain.numpy())
    with Edit((parts[0][0].clamp("clamp", 3.0),)).holding(made.model):
        assert abs(text_losses(made.model, text) - plain).max() > 1e-3


def test_choices_are_scored_by_the_model(made):
    items = [Choice("bad1 bad2 word1", ("Sorry", "Sure"), 0), Choice("good1", ("Sorry", "Sure"), 1)]
    scores = choice_scores(made.model, items)
    logits = made.model.logits(made.model.encode([one.question for one in items])).log_softmax(1)
    tok = made.model.template.tokenizer
    for item, own, row in zip(items, scores, logits, strict=True):
        for choice, score in zip(item.choices, own, strict=True):
            assert score == pytest.approx(float(row[tok.convert_tokens_to_ids(choice)]))
        assert own.argmax() == item.answer


# What it says of the planted model -----------------------------------------------------------


def test_the_planted_latent_does_more_than_others_of_its_size(wide, dosed):
    for some, dose, on, sign in (
        (dosed, "zero", "harmful", -1),
        (wide, "min-clamp 0.3", "harmless", 1),
    ):
        (own,) = of(some, "set", dose)
        assert sign * own.refusal[on].value > 1
        rows = [c for c in some.row.comparisons if c.main and c.dose == dose]
        assert {row.family for row in rows} == {
            "matched latents", "other latents", "random direction",
        }  # fmt: skip
        for row in rows:
            nearest = row.difference.low if sign > 0 else -row.difference.high
            assert nearest > 0.5, row
            many = some is wide and row.family != "random direction"
            assert row.n_arms == (19 if many else 2 if some is wide else 1)
            assert row.beyond is (True if many else None)
        (said,) = [text for text in some.row.text if text.startswith(f"{dose} changes")]
        assert ("more than 19 other latents" if some is wide else "too few to tell") in said
    assert dosed.row.points[0].generated["harmful"].refused.value == 1
    (zero,) = of(dosed, "set", "zero")
    assert zero.generated["harmful"].refused.value == 0
    assert zero.generated["harmful"].change.value == -1


def test_kl_alone_tells_no_cost(wide):
    dose = "min-clamp 0.3"
    assert "does not tell a cost" in generic_cost(wide.row.comparisons, dose)
    kl = next(c for c in wide.row.comparisons if (c.outcome, c.family) == ("kl", "other latents"))
    more, less = (
        dataclasses.replace(
            kl, outcome="perplexity", difference=Estimate(sign, sign - 0.1, sign + 0.1, 4, "given")
        )
        for sign in (1.0, -1.0)
    )
    assert generic_cost([kl, more], dose).endswith("It costs more.")
    assert "not shown to cost more" in generic_cost([kl, less], dose)


def test_the_dense_direction_is_a_rival_as_strong(wide):
    (own,) = of(wide, "set", "min-clamp 0.3")
    (dense,) = [p for p in of(wide, "dense direction", "min-clamp 0.3") if p.kind == "add"]
    assert dense.refusal["harmless"].value > 0.5 * own.refusal["harmless"].value


def test_an_idle_latent_does_no_more_than_others(made, parts, tokens):
    found = dose_response(
        made.model,
        parts[-1],
        [Dose("min-clamp", 1.0)],
        harmful=prompts(6, harmful=True, seed=1),
        harmless=prompts(8, harmful=False, seed=2),
        tokens=tokens,
        others=parts[1:4],
        directions=0,
        wordings=(),
    )
    (row,) = [c for c in found.row.comparisons if c.main and c.family == "other latents"]
    assert row.beyond is None
    assert "3 are too few to tell" in found.row.text[0]
    known = [dataclasses.replace(row, beyond=False)]
    assert "not shown to be more than 3 other latents" in beyond_others(known, "min-clamp 1")
    assert {text.split(":")[0] for text in found.row.not_measured} >= {
        "perplexity", "capability", "generated replies and their coherence", "the dense direction",
    }  # fmt: skip


def test_flags_and_arms(dosed):
    assert all(p.off_manifold == (p.dose == "scale -1" and p.kind == "scale")
               for p in dosed.row.points)  # fmt: skip
    assert len(dosed.row.points) == n_arms(DOSES, others=1, directions=1, dense=True, wordings=1)
    assert dosed.row.points[0].family == "none"
    assert dosed.row.points[-1].norm_share == {}
    assert {one.arm for one in dosed.replies} > {"none", "ask", "set, zero"}
    large = [p for p in dosed.row.points if p.large]
    assert all(max(s.value for s in p.norm_share.values()) > 0 for p in large)


def test_rows_survive_json(dosed):
    text = json.dumps(dataclasses.asdict(dosed.row), allow_nan=False)
    assert TypeAdapter(DoseResponse).validate_json(text) == dosed.row


def test_several_sites_are_matched_one_after_the_other(made, parts, tokens):
    later = planted_bank(made, site=Site(PLANTED_LAYER - 1, "resid_pre"))

    def both(i):
        early = Latents(later.sliced([i]), torch.ones(1), torch.zeros(1))
        return [*parts[i], early]  # Given in the wrong order.

    found = dose_response(
        made.model, both(0), [Dose("min-clamp", 1.0)],
        harmful=prompts(4, harmful=True, seed=1), harmless=prompts(4, harmful=False, seed=2),
        tokens=tokens, others=[both(3)], directions=1, wordings=(),
    )  # fmt: skip
    own, *rest = [p for p in found.row.points if p.dose]
    # The later site is read with the earlier one's clamp in force.
    batch = made.model.encode(prompts(4, harmful=False, seed=2))
    late, early = (one.clamp("min-clamp", 1.0) for one in both(0))
    first = Tokens(made.model, batch, early.bank)
    with clamping(made.model, early):
        second = Tokens(made.model, batch, late.bank)
    total = first.share(early.bank, early.rule) + second.share(late.bank, late.rule)
    assert own.norm_share["harmless"].value == pytest.approx(total, rel=1e-9)
    for point in rest:
        if point.family in ("other latents", "random direction"):
            assert point.norm_share["harmless"].value == pytest.approx(
                own.norm_share["harmless"].value, rel=1e-3
            )


# Small parts ---------------------------------------------------------------------------------


def test_strengths_are_found_or_not():
    assert strength_for(lambda s: 0.3 * s, 0.6) == pytest.approx(2.0)
    assert strength_for(lambda s: s**2, 1e-8) == pytest.approx(1e-4)
    assert strength_for(lambda s: min(s, 0.1), 0.2) is None
    assert strength_for(lambda s: s, 0.0) == 0


def test_repetition():
    assert distinct_pairs("a b a b a b") == pytest.approx(2 / 5)
    assert repeated_runs("a b c d a b c d") == pytest.approx(1 / 5)
    assert distinct_pairs("a b") is None
    assert repeated_runs("a b c d") is None


def test_doses_say_what_they_are():
    assert str(Dose("clamp", 2.0)) == "clamp 2"
    down = [Dose("zero"), Dose("mean"), Dose("scale", 0.5), Dose("clamp", -1)]
    up = [Dose("scale", 2), Dose("clamp", 1), Dose("min-clamp", 1)]
    assert {one.aim for one in down} == {"bypass"}
    assert {one.aim for one in up} == {"induce"}
    for wrong in (("zero", 1.0), ("clamp", None)):
        with pytest.raises(ConfigError):
            Dose(*wrong)


def test_bad_input_is_named(made, parts, tokens, tmp_path):
    asked = {"harmful": ["bad1", "bad2"], "harmless": ["good1", "good2"], "tokens": tokens}
    with pytest.raises(ConfigError, match="twice"):
        dose_response(made.model, parts[0], [Dose("zero"), Dose("zero")], **asked)
    with pytest.raises(ConfigError, match="one site"):
        dose_response(made.model, [*parts[0], *parts[1]], [Dose("zero")], **asked)
    with pytest.raises(TooFewPromptsError):
        dose_response(made.model, parts[0], [Dose("zero")], **(asked | {"harmful": ["bad1"]}))
    path = tmp_path / "q.jsonl"
    good = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(good | {"answer": "B"}) + "\n")
    assert [one.answer for one in choices_from(path)] == [1, 1]
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"answer": 2}) + "\n")
    with pytest.raises(PromptFileError, match="line 2"):
        choices_from(path)


def test_wordings_reach_the_model():
    model = tiny_model(system="You are a small model.")
    for one in WORDINGS:
        own = one.on(model)
        assert isinstance(own, Model)
        if one.system is not None:
            assert own.template.hash != model.template.hash
        else:
            assert one("x") != "x"
    assert math.isfinite(float(own.logits(own.encode(["x"])).max()))
