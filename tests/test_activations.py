import pytest
import torch
from tests.planted import planted, prompts

from demur.activations import collect, moments, projections, reading
from demur.directions import Direction
from demur.errors import NonFiniteError, TooFewPromptsError
from demur.estimators import DifferenceOfMeans, WhitenedDifference
from demur.interventions import Ablate, applied
from demur.sites import Site


@pytest.fixture(scope="module")
def toy():
    return planted()


@pytest.fixture(scope="module")
def texts():
    # Of unlike lengths, so that batches are sorted and padded.
    return [" ".join(["word1"] * n + ["bad2", "word3"]) for n in (1, 5, 2, 9, 1, 3, 7)]


def test_rows_are_those_of_prompt_by_prompt_passes(toy, texts):
    sites, positions = toy.model.stream_sites, (-3, -2, -1)
    found = collect(toy.model, texts, sites=sites, positions=positions, batch_size=3)
    for i, text in enumerate(texts):
        batch = toy.model.encode([text])
        with reading(toy.model, sites) as streams:
            toy.model.logits(batch)
        for site in sites:
            for position in positions:
                torch.testing.assert_close(found.at(site, position)[i], streams[site][0, position])


def test_batch_size_does_not_matter(toy, texts):
    sites = toy.model.stream_sites
    one = collect(toy.model, texts, sites=sites, positions=[-1], batch_size=1).values
    all_ = collect(toy.model, texts, sites=sites, positions=[-1], batch_size=50).values
    torch.testing.assert_close(one, all_)


def test_moments_are_those_of_the_rows(toy, texts):
    sites = toy.model.stream_sites
    rows = collect(toy.model, texts, sites=sites, positions=[-2, -1])
    running = moments(toy.model, texts, sites=sites, positions=[-2, -1], batch_size=2)
    torch.testing.assert_close(running.mean, rows.values.mean(2))


def test_projections_are_dot_products(toy, texts):
    sites = toy.model.stream_sites[:3]
    rows = collect(toy.model, texts, sites=sites, positions=[-2, -1])
    units = torch.randn(3, 2, toy.model.d_model, dtype=torch.float64)
    found = projections(toy.model, texts, sites=sites, positions=[-2, -1], units=units)
    torch.testing.assert_close(found, torch.einsum("spnd,spd->spn", rows.values, units))


def test_what_is_read_is_what_edits_left(toy, texts):
    direction = Direction.from_vector(
        toy.direction, site=Site(2, "resid_pre"), position=-1, recipe=""
    )
    with applied(toy.model, Ablate(direction)):
        rows = collect(toy.model, texts, sites=toy.model.stream_sites, positions=[-1])
    # The unit vector is kept in float32; both sides of the product are that vector.
    assert (rows.values @ direction.unit.double()).abs().max() < 1e-6


def test_a_prompt_with_nan_is_named(toy, texts):
    model = planted().model
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[
            model.template.tokenizer.convert_tokens_to_ids("bad7")
        ] = float("nan")
    broken = [*texts, "word1 bad7 word2"]
    with pytest.raises(NonFiniteError, match="prompt 8"):
        collect(model, broken, sites=model.stream_sites, positions=[-1])
    with pytest.raises(NonFiniteError):
        model.logits(model.encode(broken))
    # And the hooks are gone.
    assert torch.isfinite(model.logits(model.encode(texts))).all()


def test_progress_counts_every_prompt_once(toy):
    seen = []
    texts = prompts(11, harmful=True, seed=0)
    collect(
        toy.model,
        texts,
        sites=[Site(0, "resid_pre")],
        positions=[-1],
        batch_size=4,
        progress=seen.append,
    )
    assert sum(seen) == 11


def test_positions_may_reach_into_the_shared_template(toy, texts):
    site = Site(3, "resid_pre")
    found = collect(toy.model, texts, sites=[site], positions=[-5]).at(site, -5)
    with reading(toy.model, [site]) as streams:
        toy.model.logits(toy.model.encode(texts[:1]))
    torch.testing.assert_close(found[0], streams[site][0, -5])
    with pytest.raises(TooFewPromptsError, match="shorter"):
        collect(toy.model, texts, sites=[site], positions=[-50])


def test_means_alone_are_the_means_of_the_moments(toy, texts):
    points = {"sites": toy.model.stream_sites[:3], "positions": (-1, -3)}
    whole = moments(toy.model, texts, **points)
    means = moments(toy.model, texts, rank=0, batch_size=4, **points)
    torch.testing.assert_close(means.mean, whole.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(means.total, whole.total, rtol=1e-5, atol=1e-5)
    here, there = (one.at(Site(1, "resid_pre"), -3) for one in (means, whole))
    assert len(here.spread) == 0
    assert DifferenceOfMeans().from_moments(here, there).norm() < 1e-5
    with pytest.raises(TooFewPromptsError, match="means without covariance"):
        WhitenedDifference().from_moments(here, there)
