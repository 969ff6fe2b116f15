"""Caches of activations, thresholds and the training of banks, on tiny models."""

import json
from dataclasses import asdict, replace
from importlib.resources import files
from warnings import catch_warnings, simplefilter

import pytest
import torch
from pydantic import TypeAdapter
from tests.tiny import tiny_model

from demur import prompts
from demur.activations import reading
from demur.errors import (
    ConfigError,
    MissingExtraError,
    NonFiniteError,
    StoreError,
    TooFewPromptsError,
)
from demur.features import training
from demur.features.bank import Bank
from demur.features.rows.training import TrainedBank
from demur.features.training import (
    ActivationCache,
    Settings,
    Weights,
    active,
    cache_activations,
    calibrated,
    figures,
    folded,
    parts_of,
    steps_of,
    train,
)
from demur.sites import Site, Span

SITES = (Site(0, "resid_post"), Site(1, "resid_post"))
PROMPTS = [
    f"{verb} a {noun}{tail}"
    for verb in ("Draw", "Name", "Paint")
    for noun in ("tree", "small house", "boat")
    for tail in ("", " on a hill", " for me, please", ", not two of them")
]
REPLIES = [("yes", "no, I will not", "")[i % 3] for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


def collected(model, folder, prompts=PROMPTS, replies=REPLIES, **options):
    options = {"tokens": 10**6, "shard_prompts": 8, "dtype": "float32", "held_out": 0.3} | options
    return cache_activations(model, prompts, replies, sites=SITES, folder=folder, **options)


@pytest.fixture(scope="module")
def cache(model, tmp_path_factory):
    return collected(model, tmp_path_factory.mktemp("cache"))


def rows_of(cache, site):
    """All tokens of a site, by prompt."""
    found = {}
    for part in ("train", "calibrate", "test"):
        for x, numbers in cache.shards(site, part):
            for number in numbers.unique().tolist():
                assert cache.parts[number] == part
                found.setdefault(number, []).append(x[numbers == number])
    return {number: torch.cat(rows) for number, rows in found.items()}


def test_the_cache_holds_every_token_of_instruction_template_and_reply(model, cache):
    spans = (Span.INSTRUCTION, Span.POST_INSTRUCTION, Span.RESPONSE)
    for site in SITES:
        found = rows_of(cache, site)
        assert sorted(found) == list(range(len(PROMPTS)))
        for number, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
            batch = model.encode([prompt], [reply])
            with reading(model, SITES) as streams:
                model.final_states(batch)
            wanted = torch.zeros_like(batch.mask[0])
            for span in spans:
                wanted |= batch.spans[span][0]
            torch.testing.assert_close(
                found[number], streams[site][0, wanted], rtol=1e-4, atol=1e-5
            )


def test_position_zero_is_left_out_where_no_template_stands_before_it(model, tmp_path, monkeypatch):
    """As in a layout that begins with the user's words."""
    encode = type(model).encode

    def bare(self, prompts, replies=None):
        batch = encode(self, prompts, replies)
        span = batch.spans[Span.INSTRUCTION].clone()
        span[:, 0] = True
        return replace(batch, spans={**batch.spans, Span.INSTRUCTION: span}, shared=0)

    with_template = collected(model, tmp_path / "a")
    monkeypatch.setattr(type(model), "encode", bare)
    assert collected(model, tmp_path / "b").tokens == with_template.tokens


def test_the_model_writes_its_own_replies(model, tmp_path):
    short = collected(model, tmp_path / "a", replies=None, max_new_tokens=1)
    longer = collected(model, tmp_path / "b", replies=None, max_new_tokens=4)
    assert all(longer.tokens[site] > short.tokens[site] for site in SITES)


def test_only_as_many_shards_as_needed_are_read_and_more_can_follow(model, tmp_path, cache):
    few = collected(model, tmp_path, tokens=50)
    n = len(few.counts[SITES[0]])
    assert n < len(cache.counts[SITES[0]])
    assert few.tokens[SITES[0]] >= 50 > sum(few.counts[SITES[0]][:-1])
    assert few.parts.count(None) == len(PROMPTS) - 8 * n
    all_of_them = collected(model, tmp_path)
    assert all_of_them.digests == cache.digests
    assert all_of_them.parts == cache.parts


def test_a_run_that_was_stopped_goes_on_and_computes_nothing_twice(
    model, tmp_path, cache, monkeypatch
):
    class Killed(Exception):
        pass

    def kill(_done):
        raise Killed

    with pytest.raises(Killed):
        collected(model, tmp_path, progress=kill)
    with pytest.raises(StoreError, match="no finished cache"):
        ActivationCache.load(tmp_path)
    read, read_one = [], training._Reader.read

    def counted(self, prompts, replies, numbers):
        read.append(tuple(numbers))
        return read_one(self, prompts, replies, numbers)

    monkeypatch.setattr(training._Reader, "read", counted)
    again = collected(model, tmp_path)
    assert len(read) == len(again.counts[SITES[0]]) - 1
    assert again.digests == cache.digests
    read.clear()
    collected(model, tmp_path)
    assert not read
    assert ActivationCache.load(tmp_path).counts == cache.counts


@pytest.mark.parametrize(
    "change",
    [{"prompts": [*PROMPTS[:-1], "Draw a fish"]}, {"replies": None}, {"seed": 1}, {"sinks": 5.0}],
    ids=lambda change: next(iter(change)),
)
def test_a_cache_of_something_else_is_not_taken_up(model, tmp_path, change):
    collected(model, tmp_path, tokens=1)
    with pytest.raises(StoreError, match=f"otherwise: .*{next(iter(change))}"):
        collected(model, tmp_path, **({"tokens": 1} | change))


def test_a_cache_of_another_model_is_not_taken_up(model, tmp_path):
    collected(model, tmp_path, tokens=1)
    with pytest.raises(StoreError, match="fingerprint differ"):
        collected(tiny_model(dtype=torch.float32, seed=1), tmp_path, tokens=1)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_an_error_that_names_it(model, tmp_path, damage):
    held = collected(model, tmp_path)
    file = tmp_path / str(SITES[1]) / "00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.unlink()
    if damage != "gone":
        file.write_bytes(bytes(data) if damage == "flipped" else bytes(data[:-40]))
    with pytest.raises(StoreError, match="00002"):
        rows_of(held, SITES[1])
    assert rows_of(held, SITES[0])
    if damage != "gone":
        with pytest.raises(StoreError, match="00002"):
            collected(model, tmp_path)
        file.unlink()
    assert rows_of(collected(model, tmp_path), SITES[1])


def test_a_shard_that_was_cut_before_the_first_run_ended_is_an_error(model, tmp_path):
    with pytest.raises(ZeroDivisionError):
        collected(model, tmp_path, progress=lambda _done: 1 // 0)
    file = tmp_path / str(SITES[0]) / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(StoreError, match=r"00000.*damaged"):
        collected(model, tmp_path)


def test_a_damaged_manifest_is_an_error(model, tmp_path):
    collected(model, tmp_path, tokens=1)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        ActivationCache.load(tmp_path)


def test_sinks_are_left_out_and_the_limit_is_recorded(tmp_path):
    model = tiny_model(dtype=torch.float32)
    token = model.template.tokenizer("boat")["input_ids"][-1]
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[token] *= 1000
    held = collected(model, tmp_path)
    for site in SITES:
        norms = {n: rows.norm(dim=1) for n, rows in rows_of(held, site).items()}
        everything = torch.cat(list(norms.values()))
        limit = held.largest_norm[site]
        assert everything.max() <= limit
        assert limit == pytest.approx(10 * float(everything.median()), rel=0.3)
        with_boat = sum("boat" in prompt for prompt in PROMPTS)
        assert held.sinks[site] >= with_boat
        batch = model.encode(PROMPTS, REPLIES)
        real = sum(span.sum() for span in batch.spans.values())
        assert held.tokens[site] + held.sinks[site] == real


def test_what_is_too_large_for_the_files_is_an_error(tmp_path):
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.hf.get_input_embeddings().weight *= 1e6
    with pytest.raises(NonFiniteError, match="bfloat16"):
        collected(model, tmp_path, dtype="float16")
    assert collected(model, tmp_path / "b", dtype="bfloat16").tokens


def test_groups_stay_together_and_every_part_has_its_share():
    prompts = [f"prompt {i}" for i in range(200)]
    groups = [i // 4 for i in range(200)]
    parts = parts_of(prompts, groups, held_out=0.2, seed=3)
    assert all(len({parts[4 * i + j] for j in range(4)}) == 1 for i in range(50))
    assert parts.count("calibrate") == parts.count("test") == 20
    assert parts != parts_of(prompts, groups, held_out=0.2, seed=4)
    # The same text in other letters is the same prompt.
    doubled = parts_of([*prompts, *(p.upper() for p in prompts)], held_out=0.2, seed=3)
    assert doubled[:200] == doubled[200:]


def test_a_split_that_leaves_a_part_empty_is_an_error():
    with pytest.raises(TooFewPromptsError, match="leave none to"):
        parts_of(["one", "two"], held_out=0.5, seed=0)
    with pytest.raises(ConfigError, match="share of held-out"):
        parts_of(PROMPTS, held_out=1.0, seed=0)


# Thresholds and figures --------------------------------------------------------------------------


def test_a_calibrated_threshold_leaves_as_many_latents_active_as_wanted():
    before = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    for l0 in (1.0, 5.0, 7.3):
        threshold = calibrated(iter(before.split(64)), l0, 300)
        assert int((active(before, threshold=threshold) > 0).sum()) == round(300 * l0)
        assert threshold == calibrated([before], l0, 300)


def test_a_calibrated_threshold_is_never_negative():
    before = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    assert calibrated([before], 9.0, 50) == 0.0


def test_a_threshold_needs_tokens_and_a_count_below_the_width():
    with pytest.raises(TooFewPromptsError):
        calibrated([], 3, 0)
    with pytest.raises(ConfigError, match="cannot be active"):
        calibrated([torch.ones(4, 3)], 3, 4)


@pytest.fixture
def drawn():
    """Weights and tokens that are sums of few of their latents."""
    rng = torch.Generator().manual_seed(0)
    decoder = torch.linalg.qr(torch.randn(24, 24, generator=rng)).Q[:16]
    offset = torch.randn(24, generator=rng)
    acts = torch.zeros(400, 16)
    for row in acts:
        row[torch.randperm(14, generator=rng)[:3]] = 1 + torch.rand(3, generator=rng)
    weights = Weights(decoder.T.contiguous(), torch.zeros(16), decoder, offset)
    return weights, acts @ decoder + offset, torch.arange(400) // 10


@pytest.mark.parametrize("how", [{"k": 3}, {"threshold": 0.5}], ids=["topk", "jumprelu"])
def test_figures_of_a_planted_dictionary(drawn, how):
    weights, x, numbers = drawn
    mean = x.mean(0)
    blocks = list(zip(x.split(150), numbers.split(150), strict=True))
    found = figures(weights, blocks, part="test", mean=mean, **how)
    assert found.fvu.value == pytest.approx(0.0, abs=1e-9)
    assert found.l0 == pytest.approx(3.0)
    assert found.dead_share == pytest.approx(2 / 16)
    assert (found.n_prompts, found.n_tokens, found.fvu.n) == (40, 400, 40)
    assert (
        figures(weights, blocks, part="test", mean=mean, dense=0.01, **how).dense_share == 14 / 16
    )
    silent = replace(weights, encoder=torch.zeros(24, 16), offset=mean)
    assert figures(silent, blocks, part="test", mean=mean, **how).fvu.value == pytest.approx(1.0)


def test_figures_need_prompts(drawn):
    weights, x, _ = drawn
    blocks = [(x, torch.zeros(400, dtype=torch.long))]
    with pytest.raises(TooFewPromptsError, match="1 prompts"):
        figures(weights, blocks, part="test", mean=x.mean(0), k=3)


def test_folded_weights_do_on_the_stream_what_was_trained_on_the_scaled_one():
    rng = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(12, 30, generator=rng), torch.randn(30, 12, generator=rng)
    bias, offset = torch.randn(30, generator=rng), torch.randn(12, generator=rng)
    x, scale = 7 * torch.randn(100, 12, generator=rng), 0.13
    norms = decoder.norm(dim=1)
    raw = ((scale * x - offset) @ encoder + bias) * norms
    wanted = (active(raw, k=5) / norms @ decoder + offset) / scale
    weights = folded(encoder, bias, decoder, offset, scale=scale)
    acts = active(weights.before(x), k=5)
    torch.testing.assert_close(
        acts @ weights.decoder + weights.offset, wanted, rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(weights.decoder.norm(dim=1), torch.ones(30))
    assert torch.equal(acts > 0, active(raw, k=5) > 0)


@pytest.mark.parametrize("form", ["topk", "jumprelu"])
def test_activations_are_those_of_a_bank(drawn, form):
    weights, x, _ = drawn
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    how = {"k": 4} if form == "topk" else {"threshold": 0.7}
    bank = Bank(
        name="drawn",
        site=SITES[0],
        encoder=weights.encoder.T,
        bias=weights.bias,
        decoder=weights.decoder,
        offset=weights.offset,
        ids=torch.arange(16),
        width=16,
        activation=form,
        centred=True,
        threshold=torch.full((16,), 0.7) if form == "jumprelu" else None,
        k=how.get("k"),
    )
    torch.testing.assert_close(active(weights.before(x), **how), bank.encode(x))


def test_weights_that_half_precision_cannot_hold_are_an_error(drawn):
    weights, _, _ = drawn
    with pytest.raises(NonFiniteError, match="float16"):
        replace(weights, offset=weights.offset + 1e5).rounded("float16")


@pytest.mark.parametrize(
    "wrong",
    [{"k": 64, "width": 64}, {"epochs": 0.0}, {"warm_up": 0.6, "decay": 0.4}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_that_make_no_sense_are_errors(wrong):
    with pytest.raises(ConfigError):
        Settings(**wrong)


def test_a_cache_that_fills_no_batch_is_an_error(cache):
    with pytest.raises(TooFewPromptsError, match="do not fill a batch"):
        steps_of(cache, SITES[0], Settings(batch_size=100_000))
    with pytest.raises(ConfigError, match=r"2\.resid_post is not in the cache"):
        steps_of(cache, Site(2, "resid_post"), Settings())


def test_without_sae_lens_the_extra_is_named(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sae_lens", None)
    with pytest.raises(MissingExtraError, match=r"demur\[sae\]"):
        train(cache, SITES[0], Settings(width=64, k=4, batch_size=64), out=tmp_path)


# With SAELens ------------------------------------------------------------------------------------

SMALL = Settings(width=64, k=4, batch_size=64, epochs=15, dead_window=10, checkpoint_every=20)


@pytest.fixture(scope="module")
def bank(cache, tmp_path_factory):
    with catch_warnings():
        simplefilter("ignore")  # Its import warns of what others will deprecate.
        pytest.importorskip("sae_lens", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("bank")
    steps = []
    row = train(cache, SITES[0], SMALL, out=folder, progress=steps.append)
    assert sum(steps) == row.n_steps == steps_of(cache, SITES[0], SMALL) >= 60
    return row, folder


def test_training_explains_variance_and_says_so_in_a_row(cache, bank):
    row, _ = bank
    assert row.topk.test.fvu.value < 0.6 > row.topk.train.fvu.value
    assert row.topk.train.l0 <= 4
    assert row.n_train_tokens == row.topk.train.n_tokens == row.jumprelu.train.n_tokens
    assert row.topk.test.n_prompts == cache.n_prompts("test")
    assert row.jumprelu.threshold is not None
    text = json.dumps(asdict(row), allow_nan=False)
    assert TypeAdapter(TrainedBank).validate_json(text) == row


@pytest.mark.parametrize("form", ["topk", "jumprelu"])
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_sae_lens_reads_the_bank_back_and_measures_the_same(bank, cache, tmp_path, form, storage):
    del bank  # It skips where SAELens is missing.
    from sae_lens import SAE

    settings = replace(SMALL, form=form, storage=storage, epochs=2)
    row = train(cache, SITES[1], settings, out=tmp_path)
    assert row.written == form
    sae = SAE.load_from_disk(str(tmp_path))
    assert sae.cfg.architecture() == form
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.metadata.site == str(SITES[1])
    assert sae.cfg.metadata.largest_norm == cache.largest_norm[SITES[1]]
    assert sae.W_dec.dtype == torch.float32
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=2e-3, atol=0)
    x = torch.cat([rows for rows, _ in cache.shards(SITES[1], "test")])
    mean = torch.cat([rows for rows, _ in cache.shards(SITES[1], "train")]).mean(0)
    with torch.no_grad():
        acts = sae.encode(x)
        miss = (sae.decode(acts) - x).pow(2).sum() / (x - mean).pow(2).sum()
    told = getattr(row, form).test
    assert float(miss) == pytest.approx(told.fvu.value, rel=1e-4)
    assert float((acts > 0).sum(1).float().mean()) == pytest.approx(told.l0, rel=1e-6)


def test_training_that_was_stopped_ends_where_it_would_have_ended(bank, cache, tmp_path):
    row, folder = bank
    done = 0

    class Killed(Exception):
        pass

    def kill(n):
        nonlocal done
        done += n
        if done == 45:
            raise Killed

    with pytest.raises(Killed):
        train(cache, SITES[0], SMALL, out=tmp_path, progress=kill)
    with pytest.raises(StoreError, match="other settings"):
        train(cache, SITES[0], replace(SMALL, seed=1), out=tmp_path)
    steps = []
    again = train(cache, SITES[0], SMALL, out=tmp_path, progress=steps.append)
    assert steps[0] == 40
    weights = "sae_weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (folder / weights).read_bytes()
    spent = {"train_seconds": 0.0, "cpu_seconds": 0.0}
    assert replace(again, **spent) == replace(row, **spent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", weights]


def test_a_finished_bank_is_read_back_and_another_one_is_not_overwritten(bank, cache):
    row, folder = bank
    assert train(cache, SITES[0], SMALL, out=folder) == row
    with pytest.raises(StoreError, match="trained otherwise"):
        train(cache, SITES[0], replace(SMALL, epochs=16), out=folder)


def test_a_damaged_checkpoint_is_an_error(bank, cache, tmp_path):
    del bank

    def kill(n, done=[0]):  # noqa: B006
        done[0] += n
        if done[0] == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cache, SITES[0], SMALL, out=tmp_path, progress=kill)
    state = next((tmp_path / "checkpoint").glob("*.pt"))
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(StoreError, match="damaged"):
        train(cache, SITES[0], SMALL, out=tmp_path)


# The packaged banks ------------------------------------------------------------------------------

PACKAGED = files("demur") / "data" / "banks" / "smollm2-refusal"


def test_the_packaged_banks_are_small_and_their_card_says_what_they_say():
    card = json.loads((PACKAGED / "card.json").read_text())
    size = 0
    for site, told in card["banks"].items():
        config = json.loads((PACKAGED / site / "cfg.json").read_text())
        row = TypeAdapter(TrainedBank).validate_python(config["metadata"]["figures"])
        assert (row.site, row.written, row.fingerprint) == (
            site,
            config["architecture"],
            card["model"]["fingerprint"],
        )
        assert asdict(getattr(row, row.written).test) == told["test"]
        assert row.jumprelu.test.fvu.value < 0.25
        size += len((PACKAGED / site / "sae_weights.safetensors").read_bytes())
    assert len(card["banks"]) == 3
    assert size < 6e6


def test_no_prompt_of_the_packaged_banks_is_like_one_that_is_reported_on():
    card = json.loads((PACKAGED / "card.json").read_text())
    known = {p.id: p for spec in card["prompts"]["sets"] for p in prompts.load(spec)}
    used = [known[one] for ids in card["prompts"]["ids"].values() for one in ids]
    assert len(used) == sum(card["how"]["n_prompts"].values()) > 1000
    whole = prompts.PromptSet.of(p.text for p in used)
    for spec in card["prompts"]["not_used"]:
        assert not prompts.overlap(whole, prompts.load(spec))
