"""`demur hydra` from prompts to page, on a planted model."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from demur.errors import ConfigError, UnknownNameError
from demur.hydra.planted import planted_hydra, planted_prompts
from demur.hydra.record import read_hydra
from demur.hydra.stages import Settings
from demur.pipeline import hydra as pipeline
from demur.report import write_hydra
from demur.selection import RefusalTokens


def lines(path, texts):
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("hydra")
    made = planted_hydra("gate", seed=2)
    settings = pipeline.HydraSettings(
        units=("components",),
        harmful=lines(root / "harmful.jsonl", planted_prompts(80, harmful=True, seed=1)),
        harmless=lines(root / "harmless.jsonl", planted_prompts(80, harmful=False, seed=2)),
        discover=20,
        detect=20,
        test=20,
        experiment=Settings(draws=19, control_draws=2, most=2),
        controls=False,
    )
    patch = pytest.MonkeyPatch()
    known = RefusalTokens(made.openers, ("Sorry",), (1.0,), (0.0,), 20, True)
    patch.setattr(pipeline, "kept_openers", lambda *_, **__: known)
    heard = []
    record = pipeline.hydra_run(made.model, root / "run", settings, listener=Heard(heard))
    yield SimpleNamespace(
        made=made, record=record, folder=root / "run", settings=settings, heard=heard
    )
    patch.undo()


class Heard:
    def __init__(self, heard):
        self.heard = heard

    def stage(self, name, total):
        from contextlib import nullcontext

        done = []
        self.heard.append((name, total, done))
        return nullcontext(done.append)

    def note(self, text):
        self.heard.append((text, 0, []))


def test_the_planted_gate_is_found_from_prompt_files(ran):
    (found,) = ran.record.experiments
    assert found.verdict == "conditional gate", found.why
    assert set(found.backup_set) == set(ran.made.backups)
    assert read_hydra(ran.folder / pipeline.RECORD) == ran.record


def test_the_bar_reaches_its_end(ran):
    (stage,) = [one for one in ran.heard if one[1]]
    assert sum(stage[2]) == stage[1]


def test_a_second_run_computes_nothing_anew(ran, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("was computed again")

    monkeypatch.setattr(pipeline, "hydra", fail)
    assert pipeline.hydra_run(ran.made.model, ran.folder, ran.settings) == ran.record


def test_its_page_can_be_drawn(ran):
    assert "conditional gate" in write_hydra(ran.folder / pipeline.RECORD).read_text().lower()


def test_latents_need_a_bank_and_kinds_exist(ran, tmp_path):
    with pytest.raises(ConfigError, match="none was named"):
        pipeline.hydra_run(ran.made.model, tmp_path, replace(ran.settings, units=("latents",)))
    with pytest.raises(UnknownNameError, match="did you mean `latents`"):
        pipeline.hydra_run(ran.made.model, tmp_path, replace(ran.settings, units=("latent",)))
