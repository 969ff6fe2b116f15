"""The whole run on a model whose refusal is known, with a bank that holds it."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tests import planted as hand
from tests.features.planted_bank import PROMOTES, prompts, the_bank, the_model
from tests.planted import HARMFUL, HARMLESS, WIDTH

from demur.activations import reading
from demur.compare.objects import read_vectors
from demur.directions import load_direction
from demur.errors import ConfigError, UnknownNameError
from demur.features.formats import load_banks
from demur.features.rows.record import read_features
from demur.models import Model, Template
from demur.pipeline import features
from demur.pipeline.banks import BankSettings, bank_prompts, default_sites, train_banks
from demur.prompts import load
from demur.report import write_features
from demur.sites import Site


def lines(path, texts):
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def write_bank(folder):
    """The planted latents, and pairs of axes that make up for what they leave unexplained."""
    model, bank = the_model().model, the_bank()
    batch = model.encode(prompts(20, HARMFUL, 100) + prompts(20, HARMLESS, 101))
    with reading(model, [bank.site]) as streams:
        model.logits(batch)
    x = streams[bank.site].double().reshape(-1, WIDTH)
    rng = torch.Generator().manual_seed(3)
    drawn = torch.randn(WIDTH, WIDTH - 1, generator=rng, dtype=torch.float64)
    axes = torch.linalg.qr(torch.cat([the_model().direction[:, None], drawn], 1))[0].T[1:]
    more = torch.cat([axes, -axes])
    left = x - bank.encode(x) @ bank.decoder
    seen = torch.relu(x @ more.T)
    gram = seen.T @ seen + 1e-2 * len(seen) * torch.eye(len(more), dtype=torch.float64)
    decoder = torch.cat([bank.decoder, torch.linalg.solve(gram, seen.T @ left)])
    encoder = torch.cat([bank.encoder, more])
    bias = torch.cat([bank.bias, torch.zeros(len(more), dtype=torch.float64)])
    folder.mkdir()
    tensors = {
        "W_enc": encoder.T.contiguous().float(),
        "W_dec": decoder.contiguous().float(),
        "b_enc": bias.float(),
        "b_dec": torch.zeros(WIDTH),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    about = {
        "sae_lens_version": "6.54.12",
        "hook_name": "blocks.2.hook_resid_pre",
        "neuronpedia_id": "planted/2-res",
    }
    config = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": len(encoder),
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": about,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    words = [*hand.FRAME, *hand.REPLIES, *HARMFUL, *HARMLESS, *hand.FILLER, "other"]
    made = hand.planted(dtype=torch.float32).model
    # Packaged texts have other words: these are one word that is no control token.
    model = Model(made.hf, made.family, Template(hand.tokenizer(words)), name="planted")
    settings = features.FeatureSettings(
        harmful=lines(root / "harmful.jsonl", prompts(80, HARMFUL, 1)),
        harmless=lines(root / "harmless.jsonl", prompts(80, HARMLESS, 2)),
        lookalikes=lines(root / "look.jsonl", prompts(12, HARMLESS, 3)),
        discover=24,
        verify=16,
        calibrate=16,
        report=16,
        top=2,
        densest=0.6,
        nulls=119,
        draws=10,
        most=2,
        skip=("dose", "multiturn", "sensor"),
    )
    bank = write_bank(root / "bank")
    record = features.features_run(model, bank, root / "run", settings)
    return SimpleNamespace(
        model=model, bank=bank, record=record, folder=root / "run", settings=settings
    )


def test_the_planted_latent_is_found_verified_chosen_and_held_out(ran):
    record = ran.record
    assert record.discovery is not None
    promoting = [row for row in record.verification.units if row.role == "promotes"]
    assert any(PROMOTES in row.latents for row in promoting)
    assert any(name.endswith(f"/{PROMOTES}") for name in record.minimal.latents)
    assert record.held_out.effect.high < -5
    assert record.held_out.p < 0.05
    assert 0.5 < record.held_out.of_refusal.value <= 1.5
    answers = {one.question: one.answer for one in record.findings}
    assert answers["Do the banks fit the model?"] == "yes"
    assert answers["Does refusal hang on a small set?"] in ("yes", "undetermined")


def test_everything_is_written_and_read_back(ran):
    assert read_features(ran.folder / features.RECORD) == ran.record
    edits = json.loads((ran.folder / "edits.json").read_text())
    assert [f"{one['bank']}/{one['latent']}" for one in edits["latents"]] == list(
        ran.record.minimal.latents
    )
    table = (ran.folder / "features.csv").read_text().splitlines()
    header = table[0].split(",")
    chosen = [row for row in table[1:] if row.split(",")[header.index("in_set")] == "True"]
    assert len(chosen) == len(ran.record.minimal.latents)
    assert "https://www.neuronpedia.org/planted/2-res/0" in "\n".join(table)
    assert (ran.folder / "features.parquet").is_file()


def test_what_the_sets_latents_write_can_be_compared_and_edited(ran):
    files = sorted((ran.folder / "latents").glob("*.safetensors"))
    assert len(files) == len(ran.record.minimal.latents)
    found, _ = load_direction(files[0], ran.model)
    bank = load_banks(ran.bank)[0]
    row = bank.direction(int(files[0].stem.split("-")[1]))
    torch.testing.assert_close(found.unit, row.unit)
    assert next(iter(read_vectors(files[0]))).site == bank.site


def test_a_second_run_computes_nothing_anew_and_says_the_same(ran, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("was computed again")

    for name in ("verify", "discover", "held_out", "check_bank"):
        monkeypatch.setattr(features, name, fail)
    again = features.features_run(ran.model, ran.bank, ran.folder, ran.settings)
    assert again.model_copy(update={"seconds": ran.record.seconds}) == ran.record


def test_its_page_can_be_drawn(ran):
    page = write_features(ran.folder / features.RECORD).read_text()
    assert "planted" in page
    assert "left out as asked: dose, multiturn, sensor" in page


def test_a_bank_that_does_not_fit_is_not_ranked(ran, tmp_path):
    bad = tmp_path / "bad"
    write_bank(bad)
    tensors = {
        "W_enc": torch.randn(WIDTH, 80),
        "W_dec": torch.randn(80, WIDTH),
        "b_enc": torch.zeros(80),
        "b_dec": torch.zeros(WIDTH),
    }
    config = json.loads((bad / "cfg.json").read_text())
    (bad / "cfg.json").write_text(json.dumps(config | {"d_sae": 80}))
    save_file(tensors, bad / "sae_weights.safetensors")
    with pytest.raises(ConfigError, match="may be ranked"):
        features.features_run(ran.model, str(bad), tmp_path / "run", ran.settings)


def test_a_part_that_does_not_exist_is_named(ran, tmp_path):
    from dataclasses import replace

    with pytest.raises(UnknownNameError, match="did you mean `dose`"):
        features.features_run(ran.model, ran.bank, tmp_path, replace(ran.settings, skip=("doses",)))


def test_banks_are_trained_on_no_prompt_that_features_are_reported_with():
    found, told = bank_prompts(BankSettings(each=40))
    kept = {text for name in ("contrast_pairs", "lookalikes", "plain") for text in load(name).texts}
    assert len(found) == sum(row["n"] for row in told.values()) > 100
    assert not kept & set(found.texts)


def test_sites_that_are_not_the_models_are_refused(ran, tmp_path):
    assert [site.layer for site in default_sites(ran.model)] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"blocks 0 to 4, so no site 9\.resid_post"):
        train_banks(ran.model, [Site(9, "resid_post")], tmp_path)
