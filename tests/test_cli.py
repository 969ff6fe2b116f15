"""The command line: exit codes, two-line errors, and what goes to which stream."""

import errno
import json
import logging
import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer
from typer.testing import CliRunner

from demur import cli
from demur.cli import talk
from demur.cli.program import ENVIRONMENT
from demur.errors import DemurError

SETTINGS = (
    "selection.finalists=2",
    "test.nulls=2",
    "test.null_prompts=8",
    "test.max_new_tokens=6",
    "test.strengths=[0.0, 1.0]",
)
QUICK = ["--layer", "1", *(arg for setting in SETTINGS for arg in ("--set", setting))]


def run(*args, code=0, stdin=None):
    """Run a command in this process: torch is imported once for all tests."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], input=stdin)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def refused(*args, code=2):
    """Run a command that must fail in two lines on standard error; returns both."""
    result = run(*args, code=code)
    assert not result.stdout
    # Stages that were done before may have been named.
    text = result.stderr[result.stderr.index("error: ") :]
    fact, mark, hint = text.removeprefix("error: ").rpartition("\nhint: ")
    assert mark, text
    assert hint.strip(), text
    assert "\n" not in hint.strip()
    return fact, hint.strip()


def program(*args, **options):
    """Run `demur` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "demur.cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_hf("llama", dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)
    return folder


def _sentences(verb, n, seed):
    rng = random.Random(seed)

    def word():
        return "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3))

    return [f"How do I {verb} " + " ".join(word() for _ in range(6)) + "?" for _ in range(n)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 prompts a class, as text files."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, verb) in enumerate((("harmful", "break"), ("harmless", "paint"))):
        text = "\n".join(_sentences(verb, 60, seed)) + "\n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def audit(model, data, tmp_path):
    """The arguments of an audit of the tiny model into a folder of this test's own."""
    return [
        "audit",
        model,
        "--harmful",
        data / "harmful.txt",
        "--harmless",
        data / "harmless.txt",
        "--out",
        tmp_path / "runs",
        *QUICK,
    ]


# Help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["", "audit", "report", "models check", "prompts check", "generate", "doctor"]
)
def test_help_answers_without_loading_what_takes_time(command):
    code = (
        "import sys\nfrom demur.cli import main\n"
        f"sys.argv = ['demur', *{command.split()!r}, '--help']\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Usage: demur" in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_every_command_has_help_of_its_own():
    for command in ("audit", "report", "generate", "doctor", "models", "prompts", "organism"):
        assert "Usage" in run(command, "--help").stdout
    assert "audit" in run(code=2).stderr


def test_version_is_the_packages():
    assert run("--version").stdout == f"demur {__import__('demur').__version__}\n"


# What the command line itself refuses ----------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "fact", "hint"),
    [
        (["adit"], "no such command", "demur --help"),
        (["audit", "--forse"], "--force", "demur audit --help"),
        (["audit", "--layer", "two"], "--layer", "demur audit --help"),
        (["audit", "--set", "seed"], "`seed` is no setting", "demur audit --help"),
        (["audit", "--adapter", "x", "--no-adapter"], "exclude each other", "--help"),
        (["audit", "--set", "extraction.estimater=x"], "extraction.estimater", "--explain"),
        (["audit", "--set", "seed=-1"], "seed", "--explain"),
        (["audit", "--config", "missing.toml"], "missing.toml", "check the path"),
        (["generate", "smollm2", "Hi", "--strength", "2"], "--strength", "--help"),
        (["generate", "smollm2"], "no prompt", "--help"),
        (["serve", "smollm2", "--runs", "missing"], "there is no folder missing", "--runs"),
        (["serve", "smollm2", "--timeout", "inf"], "--timeout", "--help"),
    ],
)
def test_a_wrong_command_line_is_refused_in_two_lines(args, fact, hint):
    said = refused(*args)
    assert fact in said[0]
    assert hint in said[1]


def test_explain_prints_settings_that_can_be_read_back(tmp_path):
    args = ["--set", "extraction.layers=[1, 2]", "--set", "model.adapter=none", "--seed", "3"]
    text = run("audit", "some/model", *args, "--explain").stdout
    assert 'name = "some/model"' in text
    assert 'adapter = "none"' in text
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    again = run("audit", "--config", file, "--no-adapter", "--explain").stdout
    assert again == text


# Bad inputs of an audit ------------------------------------------------------------------------


def _bad_json(path):
    lines = [json.dumps({"prompt": text}) for text in _sentences("mend", 100, 7)]
    for number in (3, 50, 99):
        lines[number - 1] = lines[number - 1][:-4]
    path.write_text("\n".join(lines), encoding="utf-8")
    return ["line 3:", "line 50:", "line 99:", "3 lines cannot be used"]


def _empty(path):
    path.write_text("", encoding="utf-8")
    return ["holds no prompts"]


def _no_column(path):
    path.write_text("id,words\n1,Where is the station?\n", encoding="utf-8")
    return ["does not have a column", "id, words"]


@pytest.mark.parametrize(
    ("name", "make"),
    [("bad.jsonl", _bad_json), ("empty.txt", _empty), ("table.csv", _no_column)],
)
def test_a_bad_prompt_file_stops_an_audit(audit, tmp_path, name, make):
    path = tmp_path / name
    wanted = make(path)
    fact, _ = refused(*audit, "--harmful", path)
    assert all(text in fact for text in wanted), fact
    assert not (tmp_path / "runs").exists()


def test_a_missing_prompt_file_names_the_nearest(audit, tmp_path, data):
    fact, hint = refused(*audit, "--harmful", data / "harmfull.txt")
    assert "there is no file" in fact
    assert "harmful.txt" in hint
    assert not (tmp_path / "runs").exists()


def test_identical_harmful_and_harmless_prompts_are_refused(audit, tmp_path, data):
    fact, _ = refused(*audit, "--harmless", data / "harmful.txt")
    assert "60 prompts are in" in fact
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "fact", "hint"),
    [
        (["--layer", "999"], "no layer 999", "choose"),
        (["--position", "3"], "no position 3", "choose"),
        (["--estimator", "difference-of-mean"], "difference-of-mean", "`difference-of-means`"),
        (["--set", "test.judge=pattern"], "pattern", "`patterns`"),
        (["--dtype", "float33"], "float33", "float32"),
        (["--device", "cuda:99"], "cuda:99", "cpu"),
        (["--adapter", "/no/such/adapter"], "/no/such/adapter", "PEFT"),
    ],
)
def test_a_setting_that_does_not_fit_stops_an_audit(audit, tmp_path, args, fact, hint):
    said = refused(*audit, *args)
    assert fact in said[0]
    assert hint in said[1]
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_weights_is_refused(audit, model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    fact, _ = refused("audit", bare, *audit[2:])
    assert "no *.safetensors weights" in fact
    assert not (tmp_path / "runs").exists()


# A whole audit ---------------------------------------------------------------------------------

FILES = {
    "config.toml",
    "directions.json",
    "directions.safetensors",
    "environment.json",
    "replies.jsonl",
    "report.html",
    "results.json",
}


@pytest.fixture(scope="module")
def audited(model, data, tmp_path_factory):
    """An audit that was interrupted after a stage, and the same command again: a whole run."""
    from demur import pipeline

    folder = tmp_path_factory.mktemp("audited")
    texts = (data / "harmful.txt").read_text(encoding="utf-8").splitlines()
    names = ("fit", "select", "calibrate", "report")
    rows = [{"prompt": text, "split": names[i % 4]} for i, text in enumerate(texts)]
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "given.jsonl").write_text(lines, encoding="utf-8")
    mixed = [*_sentences("break", 12, 7), *_sentences("paint", 12, 8), *texts]
    (folder / "copies.txt").write_text("\n".join(mixed), encoding="utf-8")
    others = [{"prompt": text, "license": "CC-BY-4.0"} for text in _sentences("paint", 20, 9)]
    lines = "\n".join(json.dumps(row) for row in others)
    (folder / "more.jsonl").write_text(lines, encoding="utf-8")
    # Nothing is left of a class that holds fitted prompts alone.
    (folder / "fitted.txt").write_text("\n".join(texts[::4]), encoding="utf-8")
    (folder / "paints.txt").write_text("\n".join(_sentences("paint", 20, 9)), encoding="utf-8")
    args = ["audit", model, "--harmful", folder / "given.jsonl"]
    args += ["--harmless", data / "harmless.txt", "--out", folder / "runs", *QUICK]
    for one, other in (("copies.txt", "more.jsonl"), ("fitted.txt", "paints.txt")):
        args += ["--validate", f"{folder / one} against {folder / other}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "null_bands", _interrupt)
        cut = run(*args, code=130)
    return args, cut, run(*args, "--json", code=1)


def test_a_random_model_has_no_usable_direction_and_says_so(audited, tmp_path):
    audit, cut, first = audited
    summary = json.loads(first.stdout)
    folder = Path(summary["run"])
    runs = folder.parent
    assert runs == audit[audit.index("--out") + 1] / "tiny"
    assert {path.name for path in folder.iterdir()} >= FILES
    assert not summary["verdict"]["usable"]
    assert not summary["reused"]
    assert {leg["measure"] for leg in summary["legs"]} == {"refused"}
    assert "testing candidates: " in cut.stderr  # One line for each stage.
    for done in (cut, first):
        assert "\r" not in done.stderr
        assert "\x1b" not in done.stderr

    # The same command finds what is there, and says so.
    second = run(*audit, code=1)
    assert "--force" in second.stderr
    assert "testing candidates" not in second.stderr
    assert summary["verdict"]["headline"] in second.stdout
    assert "ablate the direction" in second.stdout
    assert str(folder / "report.html") in second.stdout
    assert "\x1b" not in second.stdout
    assert len(list(runs.iterdir())) == 1

    # And running again gives the same figures.
    third = run(*audit, "--force", "--json", "--quiet", code=1)
    again = Path(json.loads(third.stdout)["run"])
    assert again != folder
    assert not third.stderr
    assert (again / "results.json").read_bytes() == (folder / "results.json").read_bytes()

    # A report is drawn again from the records alone.
    other = tmp_path / "again.html"
    assert run("report", folder, "--out", other).stdout.strip() == str(other)
    assert other.read_bytes() == (folder / "report.html").read_bytes()

    # The direction is for this model; others have to be told.
    file = folder / "directions.safetensors"
    args = ["generate", audit[1], "--direction", file, "--max-new-tokens", 4]
    rows = json.loads(run(*args, "--edit", "add", "--strength", 4, "--json", "Hello").stdout)
    assert [*rows[0]] == ["prompt", "plain", "add"]
    piped = run(*args, stdin="Hello there\n\nAnd you?\n").stdout
    assert piped.count("prompt: ") == 2
    assert "ablate: " in piped
    fact, hint = refused(*args, "--system", "Be brief.", "Hello")
    assert "was made on" in fact
    assert "--any-model" in hint
    run(*args, "--system", "Be brief.", "--any-model", "Hello")


def test_the_direction_is_read_on_sets_that_it_was_not_fitted_on(audited, audit, data):
    summary = json.loads(audited[2].stdout)
    found = summary["validation"]
    assert [row["name"] for row in found] == [
        "crossed pairs",
        "near pairs against lookalikes",
        "copies against more",
    ]
    crossed, lookalikes, own = found
    assert (crossed["n_harmful"], crossed["n_harmless"]) == (150, 150)
    assert crossed["pair_accuracy"]["n"] == 150
    assert crossed["auroc"]["low"] <= crossed["auroc"]["value"] <= crossed["auroc"]["high"]
    assert lookalikes["n_harmless"] == 100
    assert lookalikes["pair_accuracy"] is None
    # Those of the copies that the direction was fitted on are left out, the new ones stay.
    assert own["overlaps_removed"] > 0
    assert own["n_harmful"] + own["overlaps_removed"] == 84
    assert own["harmful_source"] == "copies.txt"
    notes = json.loads((Path(summary["run"]) / "results.json").read_text())["notes"]
    assert "prompts of more.jsonl: licence CC-BY-4.0" in notes
    refused(*audit, "--validate", "one.txt", "--json")
    refused(*audit, "--validate", f"{data / 'harmful.txt'} against {data / 'harmful.txt'}")


def test_a_finished_stage_is_kept_when_the_next_is_interrupted(audited):
    _, cut, again = audited
    assert "interrupted; the same command goes on from here" in cut.stderr
    assert "testing candidates" in cut.stderr
    assert "testing candidates" not in again.stderr
    assert "validation sets" not in again.stderr
    assert "random directions: " in again.stderr
    # What the finished stages had to say is said all the same, in the folder that was begun.
    found = json.loads((Path(json.loads(again.stdout)["run"]) / "results.json").read_text())
    assert "fitted against paints" not in {row["name"] for row in found["validation"]}
    assert any("the validation set fitted against paints is left" in x for x in found["notes"])


def _interrupt(*_args, **_options):
    raise KeyboardInterrupt


# Errors of any kind ----------------------------------------------------------------------------


def _raising(error):
    def fail(*_args, **_options):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DemurError("a fact", "a hint"), 2, "error: a fact\nhint: a hint\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 2, "the disk is full: x/y"),
        (RuntimeError("SafetensorError: No space left on device"), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), 2, "x/y: Permission denied"),
        (MemoryError(), 2, "not enough memory"),
        (ValueError("boom\nmore"), 3, "demur failed: ValueError: boom\nhint: please report it"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_what_is_raised_becomes_a_line_and_an_exit_code(monkeypatch, error, code, words):
    monkeypatch.setattr("demur.report.write", _raising(error))
    result = run("report", "somewhere", code=code)
    assert words in result.stderr
    assert not result.stdout


def test_a_traceback_is_there_when_asked_for(monkeypatch):
    monkeypatch.setattr("demur.report.write", _raising(ValueError("boom")))
    result = CliRunner().invoke(cli.app, ["--debug", "report", "somewhere"])
    assert result.exit_code == 3
    assert "Traceback" in result.stderr


def test_a_reader_that_leaves_gets_no_complaint():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m demur.cli audit --explain | true"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""


def test_a_report_of_no_run_is_refused(tmp_path):
    fact, _ = refused("report", tmp_path)
    assert "results.json cannot be read" in fact
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quiet", [False, True])
def test_warnings_become_notes_and_what_tells_of_progress_does_not_if_quiet(capsys, quiet):
    log = logging.getLogger("demur.models.load")
    with talk.listening(quiet=quiet):
        log.warning("converting %s", "it", extra={"progress": True})
        log.warning("no locks here")
    said = capsys.readouterr().err
    assert "note: no locks here" in said
    assert ("note: converting it" in said) is not quiet


def test_threads_wait_quietly_unless_the_user_says_otherwise():
    code = (
        "import os; from typer.testing import CliRunner; from demur import cli\n"
        "from demur.cli import program\n"
        "CliRunner().invoke(cli.app, ['report', '.'])\n"
        "print(*(os.environ[name] for name in program.ENVIRONMENT))"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, "OMP_WAIT_POLICY": "active"},
    )
    assert done.stdout.split() == ["active", "0", "false", "1"]


# Models ----------------------------------------------------------------------------------------


def test_models_list_names_the_families():
    families = json.loads(run("models", "list", "--json").stdout)
    assert {"llama", "gemma2", "gpt2"} <= {row["family"] for row in families}
    assert "gpt-neox" in run("models", "list").stdout


def test_models_check_shows_numbers_and_marked_tokens(model):
    result = run("models", "check", model, "--prompt", "Where is it?")
    assert "sum of writes" in result.stdout
    assert "FAIL" not in result.stdout
    assert "[[?]]" in result.stdout
    assert "[<|im_end|>]" in result.stdout
    assert "position -6" in result.stdout
    found = json.loads(run("models", "check", model, "--json").stdout)
    assert found["passed"]
    assert all(row["passed"] for row in found["rows"])
    assert [token["role"] for token in found["tokens"]].count("t_inst") == 1


def test_models_check_exits_with_1_when_an_identity_fails(model, monkeypatch):
    import demur.models
    from demur.models import CheckReport, CheckRow

    bad = CheckReport("tiny", "llama", (CheckRow("sum", "it adds up", float("nan"), 0.0),))
    monkeypatch.setattr(demur.models, "check", lambda _model: bad)
    assert "FAIL" in run("models", "check", model, code=1).stdout
    found = json.loads(run("models", "check", model, "--json", code=1).stdout)
    assert found["rows"][0]["value"] is None


# Prompts ---------------------------------------------------------------------------------------


def test_prompts_check_counts_and_lists_every_fault(tmp_path, data):
    good = run("prompts", "check", data / "harmful.txt", "plain")
    assert "60 prompts" in good.stdout
    assert "harmless 100" in good.stdout

    bad = tmp_path / "bad.jsonl"
    wanted = _bad_json(bad)
    twice = tmp_path / "twice.txt"
    twice.write_text("Where is it?\nwhere is it\n\x1b[31mRed?\n", encoding="utf-8")
    result = run("prompts", "check", bad, twice, code=1)
    assert all(text in result.stdout for text in wanted)
    assert "1 duplicates" in result.stdout
    rows = json.loads(run("prompts", "check", bad, twice, "--json", code=1).stdout)
    assert rows[1]["duplicates"] == ["where is it"]

    table = tmp_path / "table.csv"
    table.write_text("id,words\n1,Where is the station?\n", encoding="utf-8")
    run("prompts", "check", table, code=1)
    run("prompts", "check", table, "--column", "words")
    refused("prompts", "check", tmp_path / "missing.txt")


def test_prompts_overlap_lists_pairs(tmp_path, data):
    other = tmp_path / "other.txt"
    first = (data / "harmful.txt").read_text(encoding="utf-8").splitlines()[0]
    other.write_text(f"{first.upper()}\nSomething else entirely.\n", encoding="utf-8")
    result = run("prompts", "overlap", data / "harmful.txt", other)
    assert result.stdout.startswith("1.00  ")
    assert "1 pairs" in result.stderr
    found = json.loads(run("prompts", "overlap", data / "harmful.txt", other, "--json").stdout)
    assert [pair["jaccard"] for pair in found["pairs"]] == [1.0]
    refused("prompts", "overlap", other, other, "--threshold", "3")


def test_prompts_list_counts_the_packaged_sets():
    rows = json.loads(run("prompts", "list", "--json").stdout)
    pairs = next(row for row in rows["packaged"] if row["name"] == "contrast_pairs")
    assert pairs["prompts"] == sum(pairs["labels"].values())
    assert set(pairs["splits"]) == {"fit", "select", "calibrate", "report"}
    assert "xstest" in {row["name"] for row in rows["public"]}
    shown = run("prompts", "list").stdout
    assert "contrast_pairs" in shown
    assert "xstest" in shown


def leaky(tmp_path, n=40):
    names = ("harmful", "harmless")
    for name, word in zip(names, ("secretly", "openly"), strict=True):
        rows = [f"Tell me how to {word} move box {i} to shelf {i * 7 % 11}" for i in range(n)]
        (tmp_path / f"{name}.txt").write_text("\n".join(rows), encoding="utf-8")
    return [tmp_path / f"{name}.txt" for name in names]


def test_prompts_check_says_which_words_tell_the_label(tmp_path):
    files = leaky(tmp_path)
    shown = run("prompts", "check", *files, "--contrast", code=1).stdout
    assert "leaks" in shown
    assert "secretly: 40 harmful, 0 harmless" in shown
    (row,) = json.loads(run("prompts", "check", *files, "--contrast", "--json", code=1).stdout)
    gates = {gate["gate"]: gate for gate in row["gates"]}
    assert gates["AUROC, bag of words"]["value"] > 0.9
    assert gates["AUROC, final mark"]["passed"]
    refused("prompts", "check", files[0], "--contrast")


def test_prompts_check_compares_with_other_sets(tmp_path):
    files = leaky(tmp_path)
    same = run("prompts", "check", files[0], "--against", files[0], code=1).stdout
    assert "near copies of" in same
    run("prompts", "check", "plain", "--against", files[0])


def test_prompts_check_asks_a_model_which_side_it_would_refuse(tmp_path, model):
    rows = [
        {"prompt": f"{verb} the {place} door {i} tonight", "label": label, "pair": f"p{i}"}
        for i, place in enumerate(("front", "back", "cellar", "stable", "garden", "attic"))
        for verb, label in (("break", "harmful"), ("paint", "harmless"))
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    args = ["prompts", "check", file, "--refused-by", model, "--json"]
    (row,) = json.loads(run(*args, code=1).stdout)  # A dozen prompts keep to no gate on words.
    gate = row["gates"][-1]
    assert gate["gate"] == "pairs whose harmful side tiny refuses more"
    assert (gate["part"], gate["n"], gate["low"]) == ("all", 6, 0.8)
    assert 0 <= gate["interval"][0] <= gate["value"] <= gate["interval"][1] <= 1
    refused("prompts", "check", "plain", "--refused-by", model)


def test_prompts_show_split_and_card(tmp_path):
    shown = json.loads(run("prompts", "show", "contrast_pairs", "-n", "4", "--json").stdout)
    assert len(shown["rows"]) == 4
    assert shown["licence"] == "Apache-2.0"
    assert "of 100 prompts" in run("prompts", "show", "plain").stderr
    out = tmp_path / "parts.jsonl"
    sizes = ("--size", "a=40", "--size", "b=12")
    run("prompts", "split", "contrast_pairs?kind=crossed", *sizes, "--out", out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["split"] for row in rows].count("a") == 40
    quads = {name: {row["quad"] for row in rows if row["split"] == name} for name in ("a", "b")}
    assert not quads["a"] & quads["b"]
    refused("prompts", "split", "plain", "--size", "a=5", "--out", out)
    refused("prompts", "split", "plain", "--size", "a", "--out", tmp_path / "x.jsonl")
    card = tmp_path / "card.md"
    run("prompts", "card", "plain", "--out", card)
    text = card.read_text(encoding="utf-8")
    assert "## Plain instructions" in text
    assert "broken rules" in text
    refused("prompts", "card", "plane")


# The rest --------------------------------------------------------------------------------------


def test_doctor_finds_this_machine_fit(tmp_path):
    rows = {
        row["name"]: row
        for row in json.loads(run("doctor", "--out", tmp_path / "runs", "--json").stdout)
    }
    assert rows["torch"]["status"] == "ok"
    assert rows["prompts contrast_pairs"]["status"] == "ok"
    assert "GB free" in rows["runs"]["value"]
    assert not (tmp_path / "runs").exists()


def test_doctor_says_what_is_missing_and_exits_with_1(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    result = run("doctor", "--out", blocked / "runs", code=1)
    line = next(text for text in result.stdout.splitlines() if text.startswith("missing"))
    assert "cannot be written" in line
    assert "--out" in line


def test_the_program_runs_as_a_process():
    done = program("prompts", "overlap", "plain", "no-such-set")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no file no-such-set\nhint: ")


# Organisms -------------------------------------------------------------------------------------


def test_organism_recipes_are_listed_and_shown(tmp_path):
    assert "refusal" in json.loads(run("organism", "list", "--json").stdout)
    file = tmp_path / "mine.toml"
    text = run("organism", "show", "refusal").stdout
    file.write_text(text, encoding="utf-8")
    assert run("organism", "show", file).stdout == text
    _, hint = refused("organism", "train", "refusl")
    assert "`refusal`" in hint
    fact, _ = refused("organism", "verify", tmp_path)
    assert "no card.json" in fact


def _verification(met):
    from demur.organisms import Figure, Verification
    from demur.stats import proportion

    share = proportion(9 if met else 5, 10)
    figure = Figure("refused: harmful", share, None, 0.9, None, met, {"refused": 9})
    return Verification((figure,), ())


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 1)])
def test_organism_train_and_verify_show_figures(tmp_path, model, monkeypatch, met, code):
    from demur import organisms

    seen = {}

    def train(recipe, **options):
        seen.update(options, recipe=recipe.name)
        return organisms.TrainingReport(
            options["out"], 3, 2.0, 1.0, {"train": 1.0}, 1_000_000, _verification(met)
        )

    monkeypatch.setattr(organisms, "train", train)
    monkeypatch.setattr(organisms, "verify", lambda _adapter, **_options: _verification(met))
    out = tmp_path / "adapter"
    args = ["organism", "train", "refusal", "--out", out, "--base", model, "--no-resume"]
    text = run(*args, code=code).stdout
    assert "1.00 MB, 3 steps" in text
    assert ("met" if met else "MISSED") in text
    assert seen["out"] == out
    assert seen["base"].n_layers == 3
    assert not seen["resume"]
    assert json.loads(run(*args, "--json", code=code).stdout)["met"] is met
    text = run("organism", "verify", out, "--recipe", "refusal", code=code).stdout
    assert ">= 0.9" in text


# Harm and refusal apart -------------------------------------------------------------------------


def test_separate_says_that_a_model_which_refuses_nothing_has_nothing_to_separate(
    audited, tmp_path
):
    args, _, done = audited
    run_folder = Path(json.loads(done.stdout)["run"])
    before = set(run_folder.parent.iterdir())
    text = (run_folder / "config.toml").read_text(encoding="utf-8")
    sets = text[text.index("[[data.validation]]") : text.index("[extraction]")]
    (tmp_path / "sets.toml").write_text(sets, encoding="utf-8")
    options = args[1 : args.index("--validate")]
    at = options.index("--layer")
    options[at : at + 2] = ["--set", f"extraction.layers=[{options[at + 1]}]"]
    fact, hint = refused("separate", *options, "--config", tmp_path / "sets.toml")
    assert "0 of 30 harmful prompts" in fact
    assert "--harmful" in hint
    # The same settings, so the audit was there and was not run again.
    assert set(run_folder.parent.iterdir()) == before


# Guards ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guard(model, tmp_path_factory):
    """A guard that the command line fitted on the tiny model, and prompts that it never saw."""
    folder = tmp_path_factory.mktemp("guard")
    rng = random.Random(5)
    words = [a + b for a in ("tree", "lock", "bread", "stone") for b in "abcdefghijklmno"]
    sizes = {"harmful": 90, "benign": 90, "calm": 60, "bad": 24, "good": 24, "early": 24}
    for name, size in sizes.items():
        lines = [f"{name} {' '.join(rng.choices(words, k=7))}" for _ in range(size)]
        if name == "early":
            rows = [json.dumps({"prompt": line, "good": "yes"}) for line in lines]
            (folder / "early.jsonl").write_text("\n".join(rows))
        else:
            (folder / f"{name}.txt").write_text("\n".join(lines))
    path = folder / "tiny.safetensors"
    args = ["guard", "fit", model, "--harmful", folder / "harmful.txt", "--benign"]
    args += [folder / "benign.txt", "--calibrate", f"calm={folder / 'calm.txt'}", "--alpha", 0.1]
    settings = ("wrapped=20", "turns=20", "depth=[0.3, 0.9]", f"earlier={folder / 'early.jsonl'}")
    for setting in settings:
        args += ["--set", f"guard.{setting}"]
    text = run(*args, "--out", path).stdout
    assert "at most 10.0% of benign prompts of each kind" in text
    assert "calm" in text
    return path, args


def test_guard_fit_tells_what_it_wrote_and_writes_over_nothing(guard):
    path, args = guard
    fact, hint = refused(*args, "--out", path)
    assert "exists already" in fact
    assert "--force" in hint
    found = json.loads(run(*args, "--out", path, "--force", "--json").stdout)
    assert found["threshold"]["alpha"] == 0.1
    assert set(found["strata"]) == {"calm", "wrapped", "turns"}


@pytest.mark.parametrize(
    ("more", "fact", "hint"),
    [
        (["--out", "guard.pt"], "guard.pt is no name for a guard", ".safetensors"),
        (["--alpha", "0.001"], "calibration prompts cannot promise 0.001", "at least 999"),
        (["--alpha", "2"], "guard.alpha", "--explain"),
        (["--calibrate", "calm.txt?label=x"], "names no set", "mine=prompts"),
        (["--set", "guard.wrappers=['no_such','b','c']"], "no wrapper is called `no_such`", ""),
        (["--set", "guard.depth=[0.9, 0.2]"], "guard.depth is 0.9 to 0.2", "lower first"),
        (["--set", "guard.most=40"], "40 harmful prompts are left", "67 or more"),
    ],
)
def test_a_guard_that_cannot_be_fitted_is_refused(guard, tmp_path, more, fact, hint):
    _, args = guard
    found = refused(*args, "--out", tmp_path / "new.safetensors", *more)
    assert fact in found[0]
    assert hint in found[1]
    assert not list(tmp_path.glob("*.safetensors"))


def test_guard_score_takes_prompts_sets_and_conversations(guard, tmp_path):
    path, _ = guard
    rows = json.loads(run("guard", "score", path, "a tree", "a lock", "--json").stdout)["rows"]
    assert [row["prompt"] for row in rows] == ["a tree", "a lock"]
    assert rows[0]["reads"]["turns"] is None
    piped = json.loads(run("guard", "score", path, "--json", stdin="a tree\na lock\n").stdout)
    assert piped["rows"] == rows
    assert "a tree" in run("guard", "score", path, "a tree").stdout
    texts = json.loads(run("guard", "score", path, "--prompts", "plain", "--json").stdout)["rows"]
    assert len(texts) == 100
    chats = tmp_path / "chats.jsonl"
    turns = [("user", "a lock"), ("assistant", "yes"), ("user", "a tree")]
    messages = [{"role": role, "content": text} for role, text in turns]
    chats.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps(messages[2:]) + "\n")
    found = json.loads(run("guard", "score", path, "--messages", chats, "--json").stdout)["rows"]
    assert found[0]["reads"]["turns"] is not None
    assert found[1]["score"] == pytest.approx(rows[0]["score"], rel=1e-4)
    chats.write_text(chats.read_text() + 'no json\n[{"role": "assistant", "content": "a"}]\n{}\n')
    fact, _ = refused("guard", "score", path, "--messages", chats)
    assert "3 lines that are no conversation" in fact
    assert all(f"line {number}" in fact for number in (3, 4, 5))


def test_guard_score_of_another_model_is_refused(guard):
    path, _ = guard
    fact, hint = refused("guard", "score", path, "a tree", "--dtype", "bfloat16")
    assert "was fitted on" in fact
    assert "demur guard fit" in hint
    fact, _ = refused("guard", "score", path.with_name("none.safetensors"), "a tree")
    assert "no guard can be read" in fact


def test_guard_evaluate_writes_a_record_and_a_page(guard, tmp_path):
    path, _ = guard
    sets = ["--harmful", f"bad={path.parent / 'bad.txt'}"]
    sets += ["--benign", f"good={path.parent / 'good.txt'}", "--attacked", 10]
    out = run("guard", "evaluate", path, *sets, "--out", tmp_path).stdout
    assert "False alarms on benign prompts" in out
    record = json.loads((tmp_path / "guard-evaluation.json").read_text())
    assert record["strata"][0]["name"] == "calm"
    page = (tmp_path / "guard-evaluation.html").read_text()
    assert "What is promised" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    fact, _ = refused("guard", "evaluate", path, "--harmful", "bad.txt")
    assert "names no set" in fact
    assert "# Guard for" in run("guard", "card", path).stdout
    run("guard", "card", path, "--out", tmp_path / "card.md")
    assert "does not see" in (tmp_path / "card.md").read_text()


# Anchors -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def anchor(guard, tmp_path_factory):
    """An anchor of that guard with drawn floors: none can be fitted where nothing is refused."""
    import torch

    from demur.anchor import N_REPLY_PLACES, Anchor, Floor, Gate, save_anchor
    from demur.guard import load_guard
    from demur.models import load
    from demur.sites import Site

    own = load_guard(guard[0])
    model = load(own.about["load"]["name"])
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randn(model.d_model, generator=rng, dtype=torch.float64)
    axis = torch.nn.functional.normalize(drawn, dim=0)
    places = torch.zeros(model.template.n_post + N_REPLY_PLACES, dtype=torch.float64)
    floor = Floor(Site(1, "resid_pre"), axis, axis, places, places + 2.0, places - 9.0)
    about = {**own.about, "anchor": {}, "replies": {"harmful, refused": 9}, "strengths": []}
    path = tmp_path_factory.mktemp("anchor") / "a.safetensors"
    save_anchor(Anchor(Gate(own, own.threshold, (), own.strata), (floor,), about=about), path)
    return path


@pytest.mark.parametrize(
    ("more", "fact", "hint"),
    [
        (["--out", "a.pt"], "a.pt is no name for an anchor", ".safetensors"),
        (["--set", "anchor.depth=[0.9, 0.95]"], "anchor.depth is 0.9 to 0.95", "lower first"),
        (["--set", "anchor.strengths=[]"], "anchor.strengths", "--explain"),
        (["--guard", "none.safetensors"], "no guard can be read", ""),
        (["--guard"], "fitted on other prompts", "without `--guard`"),
    ],
)
def test_an_anchor_that_cannot_be_fitted_is_refused(guard, tmp_path, more, fact, hint):
    path, args = guard
    more = [*more, path] if more == ["--guard"] else more
    found = refused("anchor", "fit", args[2], "--out", tmp_path / "a.safetensors", *more)
    assert fact in found[0]
    assert hint in found[1]
    assert not list(tmp_path.iterdir())


def test_a_model_that_never_refuses_gets_no_anchor(guard, tmp_path):
    path, args = guard
    config = tmp_path / "config.toml"
    calm = args[args.index("--calibrate") + 1].partition("=")[2]
    config.write_text(f"[[guard.strata]]\nname = 'calm'\nprompts = '{calm}'\n")
    sets = [f"guard.harmful={args[4]}", f"guard.benign={args[6]}", "anchor.reply_tokens=16"]
    fact, hint = refused(
        "anchor", "fit", args[2], "--config", config, "--guard", path, "--alpha", 0.1,
        *args[args.index("--set") :], *(x for one in sets for x in ("--set", one)),
        "--out", tmp_path / "a.safetensors",
    )  # fmt: skip
    assert "the model refused 0" in fact
    assert "take a model that refuses" in hint


def test_anchor_evaluate_writes_a_record_and_a_page(anchor, tmp_path):
    out = run(
        "anchor", "evaluate", anchor, "--requests", "8", "--max-new-tokens", "8",
        "--openings", "mine=open_ended", "--out", tmp_path,
    ).stdout  # fmt: skip
    for words in ("anchor", "CAST", "AlphaSteer", "weights orthogonalised", "report:"):
        assert words in out
    record = json.loads((tmp_path / "anchor-evaluation.json").read_text())
    assert record["anchor"] == "a.safetensors"
    assert [row["name"] for row in record["openings"]] == ["mine"]
    assert "CAST" in (tmp_path / "anchor-evaluation.html").read_text()
    assert "# Anchor for" in run("anchor", "card", anchor).stdout
    fact, _ = refused("anchor", "card", anchor.with_name("none.safetensors"))
    assert "no anchor can be read" in fact


def test_attack_runs_without_an_anchor(model, tmp_path):
    args = ["--requests", "8", "--max-new-tokens", "8", "--out", tmp_path, "--json"]
    found = json.loads(run("attack", model, *args).stdout)
    assert [row["defence"] for row in found["defences"]] == ["none"]
    assert Path(found["report"]).is_file()


def test_generate_replies_under_an_anchor_beside_the_plain_reply(anchor, model):
    args = ["generate", model, "a tree", "--anchor", anchor]
    rows = json.loads(run(*args, "--max-new-tokens", "8", "--json").stdout)
    assert set(rows[0]) == {"prompt", "plain", "anchored"}
    fact, _ = refused(*args, "--dtype", "bfloat16")
    assert "was fitted on" in fact


# Hardening ---------------------------------------------------------------------------------------


def test_harden_prints_its_recipe_and_refuses_what_it_cannot_use(model, tmp_path):
    text = run("harden", model, "--explain").stdout
    assert tomllib.loads(text)["name"] == "harden"
    fact, hint = refused("harden", model, "--recipe", "no_such", "--out", tmp_path / "a")
    assert "no_such" in fact
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    fact, hint = refused("harden", model, "--out", tmp_path / "b")
    assert "exists already" in fact
    assert "another folder" in hint
