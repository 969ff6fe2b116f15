"""Sweeps: settings, exact statistics whoever reads them, and workers that are really killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from bench.faults.commands import SMALL_AUDIT
from tests.pages import assert_inert
from tiny import tiny_hf, tiny_tokenizer
from typer.testing import CliRunner

from demur import cli
from demur.activations import Moments, PointMoments, collect, moments
from demur.errors import ConfigError, StoreError, UnknownNameError
from demur.sites import Site
from demur.store import Ref
from demur.sweep import Plan, SweepConfig, read_sweep, sweep
from demur.sweep.config import sweep_config
from demur.sweep.run import locked
from demur.sweep.table import spread
from demur.sweep.tasks import Bench

# Merging moments ------------------------------------------------------------------------------

SITES = (Site(0, "resid_post"), Site(1, "resid_post"))


def drawn(n, seed):
    rng = torch.Generator().manual_seed(seed)
    # A mean far above the spread, where sums of squares lose their digits.
    return 1000 + torch.randn(2, 2, n, 6, generator=rng)


def running(values, rank=8):
    one = Moments(SITES, (-2, -1), rank)
    one.update(values)
    return one


def merged(parts, rank=8):
    whole = Moments(SITES, (-2, -1), rank)
    for part in parts:
        whole.merge(running(part, rank))
    return whole


@pytest.mark.parametrize("sizes", [(5, 4, 3), (1, 1, 1, 9), (12,)])
def test_merged_moments_are_those_of_all_rows(sizes):
    rows = drawn(sum(sizes), 0)
    whole = merged(rows.split(sizes, 2))
    assert (whole.n, whole.exact) == (sum(sizes), True)
    for i, site in enumerate(SITES):
        for j, position in enumerate((-2, -1)):
            found, truth = whole.at(site, position), PointMoments.of(rows[i, j])
            torch.testing.assert_close(found.mean, truth.mean, rtol=1e-14, atol=0)
            assert found.total == pytest.approx(truth.total, rel=1e-12)
            scatter = found.spread.T @ found.spread
            torch.testing.assert_close(scatter, truth.spread.T @ truth.spread, rtol=1e-5, atol=1e-5)


def test_the_order_of_a_merge_decides_bits_and_no_more():
    parts = drawn(60, 1).split(7, 2)
    one, again, other = merged(parts), merged(parts), merged(parts[::-1])
    assert torch.equal(one.mean, again.mean)
    assert torch.equal(one.spread, again.spread)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(one.total, other.total, rtol=1e-12, atol=0)


def test_a_merge_leaves_the_later_one_alone_and_takes_nothing_from_an_empty_one():
    later = running(drawn(4, 0))
    before = later.mean.clone()
    whole = Moments(SITES, (-2, -1), 8)
    whole.merge(later)
    whole.merge(Moments(SITES, (-2, -1), 8))
    whole.update(drawn(5, 1))
    assert (whole.n, later.n) == (9, 4)
    assert torch.equal(later.mean, before)


@pytest.mark.parametrize(
    "other", [((SITES[0],), (-2, -1), 8), (SITES, (-1,), 8), (SITES, (-2, -1), 0)]
)
def test_moments_of_other_places_do_not_merge(other):
    with pytest.raises(ConfigError, match="do not merge"):
        Moments(SITES, (-2, -1), 8).merge(Moments(*other))


# Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"models": []}, "models"),
        ({"models": ["a"], "estimator": ["x"]}, "did you mean `estimators`"),
        ({"models": [{"name": "a", "adaptor": "none"}]}, "models.0.adaptor.*`adapter`"),
        ({"models": ["a"], "prompts": {"harmfull": "x"}}, "prompts.harmfull.*`harmful`"),
        ({"models": ["a"], "audit": {"data": {"fitt": 9}}}, "data.fitt.*`fit`"),
        ({"models": ["a"], "audit": {"seed": 1}}, "`audit.seed`"),
        ({"models": ["a"], "audit": {"extraction": {"estimator": "x"}}}, "extraction.estimator"),
        ({"models": ["a", "a"]}, "twice"),
        ({"models": ["a"], "seeds": [1, 1]}, "twice"),
        ({"models": ["a"], "seeds": [-1]}, "seed"),
        ({"models": [{"name": "a", "label": "x/y"}]}, "label"),
        ({"models": ["a"], "shard": 0}, "shard"),
    ],
)
def test_settings_that_do_not_fit_are_told(tree, said):
    with pytest.raises(ConfigError, match=said):
        sweep_config(tree)


def test_a_file_is_read_and_models_of_one_name_are_told_apart(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(
        'models = ["smollm2", {name = "smollm2", adapter = "none"}, {name = "org/b.c", '
        'label = "mine"}]\nseeds = [3, 4]\n[prompts]\nharmful = "h.txt"\n[audit.data]\nfit = 9\n'
    )
    config = read_sweep(file)
    assert list(config.labels) == ["smollm2", "smollm2+adapter=none", "mine"]
    run = config.run_config(config.labels["mine"], "logistic-probe", 4)
    assert (run.model.name, run.extraction.estimator, run.seed) == ("org/b.c", "logistic-probe", 4)
    assert (run.data.harmful, run.data.fit) == ("h.txt", 9)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_sweep(tmp_path / "none.toml")


def test_a_misspelt_estimator_fails_before_anything_is_done(tmp_path):
    with pytest.raises(UnknownNameError, match="difference-of-means"):
        sweep(sweep_config({"models": ["x"], "estimators": ["difference-of-mean"]}), tmp_path)


def test_the_interval_of_a_cosine_is_over_seeds():
    few = spread([(0, 1, 0.5), (0, 1, 0.7)])
    assert (few.value, few.low, few.high, few.n) == (pytest.approx(0.6), 0.5, 0.7, 2)
    # Pairs within seeds: the jackknife is the interval of their means.
    within = spread([(s, s, c) for s, c in enumerate((0.1, 0.2, 0.3, 0.4))])
    from demur.stats import mean

    plain = mean([0.1, 0.2, 0.3, 0.4])
    assert within.low == pytest.approx(plain.low)
    assert within.high == pytest.approx(plain.high)
    # One seed that agrees with no other pulls the mean, and the interval shows it.
    pairs = [(a, b, 0.0 if 3 in (a, b) else 0.9) for a in range(4) for b in range(a)]
    found = spread(pairs)
    assert found.value == pytest.approx(0.45)
    assert found.low < 0.0
    assert found.high <= 1.0


# Reading --------------------------------------------------------------------------------------


def _sentences(verb, n, seed):
    rng = random.Random(seed)

    def word():
        return "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3))

    return [f"How do I {verb} " + " ".join(word() for _ in range(6)) + "?" for _ in range(n)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two tiny random models and two classes of prompts."""
    folder = tmp_path_factory.mktemp("sweep")
    for seed, name in enumerate(("one", "two")):
        tiny_hf("llama", dtype=torch.float32, seed=seed).save_pretrained(folder / name)
        tiny_tokenizer("chatml").save_pretrained(folder / name)
    for seed, (name, verb) in enumerate((("harmful", "break"), ("harmless", "paint"))):
        (folder / f"{name}.txt").write_text("\n".join(_sentences(verb, 60, seed)) + "\n")
    return folder


def config_for(place, models=("one",), **changes) -> SweepConfig:
    tree = {
        "models": [str(place / name) for name in models],
        "prompts": {on: str(place / f"{on}.txt") for on in ("harmful", "harmless")},
        "shard": 8,
        "audit": SMALL_AUDIT,
    }
    return sweep_config(tree | changes)


@pytest.fixture(scope="module")
def whitened(place, tmp_path_factory):
    """A plan whose cell is prepared, and whose shards are still to be read, in a folder."""
    folder = tmp_path_factory.mktemp("whitened")
    plan = Plan.of(config_for(place, estimators=["whitened-difference", "logistic-probe"]), folder)
    Bench(folder)(plan.prepare(plan.cells[0]))
    return plan, folder


@pytest.fixture
def prepared(whitened, tmp_path):
    """A copy of it for each test."""
    plan, folder = whitened
    shutil.copytree(folder, tmp_path / "sweep")
    return Plan.of(plan.config, tmp_path / "sweep"), tmp_path / "sweep"


def statistics(plan, group):
    return plan.store.tensors(Ref.parse(plan.merge_ref(group)))


def test_shards_give_the_statistics_of_one_reading_in_any_order(prepared):
    plan, folder = prepared
    group = plan.groups(plan.cells[0])[0]
    assert group.shards == 4
    assert sum(len(group.shard(k)) for k in range(4)) == len(group.prompts) == 29
    forwards = Bench(folder)
    for number in (2, 0, 3, 1):
        forwards(plan.read(group, number))
    assert forwards(plan.merge(group)) == {}
    found = statistics(plan, group)
    model = forwards.model(plan.cells[0].config)
    sites, positions = map(Site.parse, group.settings["sites"]), group.settings["positions"]
    how = {"sites": tuple(sites), "positions": tuple(positions)}
    whole = moments(model, group.prompts, **how)
    assert plan.store.get(Ref.parse(plan.merge_ref(group))).summary["n"] == whole.n == 29
    torch.testing.assert_close(found["mean"], whole.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["total"], whole.total, rtol=1e-5, atol=1e-6)
    rows = collect(model, group.prompts, **how).values
    torch.testing.assert_close(found["rows"], rows, rtol=1e-5, atol=1e-6)


def _shard_file(plan, group, number):
    ref = Ref.parse(plan.read(group, number).ref)
    return plan.store.root / ref.kind / ref.hash / "tensors.safetensors"


def test_a_damaged_shard_is_refused_and_read_again(prepared):
    plan, folder = prepared
    group = plan.groups(plan.cells[0])[1]
    bench = Bench(folder)
    for number in range(group.shards):
        bench(plan.read(group, number))
    assert bench(plan.merge(group)) == {}
    whole = statistics(plan, group)
    shutil.rmtree(plan.store.root / "merged")
    cut, changed = _shard_file(plan, group, 0), _shard_file(plan, group, 2)
    cut.write_bytes(cut.read_bytes()[:-7])
    blob = bytearray(changed.read_bytes())
    blob[-3] ^= 1
    changed.write_bytes(blob)
    assert bench(plan.merge(group)) == {"damaged": [0, 2]}
    assert not plan.has(plan.merge(group))
    assert [task.name.split()[-3] for task in plan.unread(group)] == ["1", "3"]
    for task in list(plan.unread(group)):
        bench(task)
    assert bench(plan.merge(group)) == {}
    again = statistics(plan, group)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_another_model_under_the_same_name_is_refused(place, prepared):
    plan, folder = prepared
    group = plan.groups(plan.cells[0])[0]
    task = plan.read(group, 0)
    other = {**task.about, "model": {**task.about["model"], "name": str(place / "two")}}
    from dataclasses import replace

    with pytest.raises(StoreError, match="no longer the model"):
        Bench(folder)(replace(task, about=other))


def test_estimators_share_shards_and_seeds_only_where_their_prompts_are_the_same(prepared):
    plan, _ = prepared
    one, two = plan.cells
    assert one.estimator != two.estimator
    assert plan.prepare(one).ref == plan.prepare(two).ref
    assert plan.groups(one) is plan.groups(two)
    seeds = Plan.of(plan.config.model_copy(update={"seeds": (0, 1)}), plan.store.root.parent)
    assert len({seeds.prepare(cell).ref for cell in seeds.cells}) == 2
    assert plan.state()[0]["shards"] == 8
    assert not plan.state()[0]["done"]


def test_two_sweeps_in_one_folder_are_told(place, tmp_path):
    with locked(tmp_path), pytest.raises(StoreError, match="another sweep is at work"):
        sweep(config_for(place), tmp_path)


# Processes ------------------------------------------------------------------------------------


def killer(kind, when):
    """Kills the worker of the first task of a kind once it has come so far; says whom it killed."""
    killed = []

    def watch(event):
        if not killed and event.kind == when and event.task.kind == kind:
            killed.append((event.task.ref, event.about.get("done")))
            os.kill(event.pid, signal.SIGKILL)

    return watch, killed


def test_a_killed_worker_costs_a_shard_and_nothing_is_counted_twice(place, tmp_path):
    """One worker, killed while it reads; then the same command, which finds the sweep finished."""
    config = config_for(place)
    events = []
    kill, killed = killer("read", "progress")

    def watch(event):
        events.append(event)
        kill(event)

    done = sweep(config, tmp_path, watch=watch)
    ((ref, prompts),) = killed
    assert 0 < prompts < 8  # In the middle of a shard.
    lost = [event.task.ref for event in events if event.kind == "lost"]
    assert lost == [ref]
    counts = [e.task.ref for e in events if e.kind == "finished" and e.task.kind == "read"]
    assert len(counts) == len(set(counts)) == 8
    (row,) = done.results.rows
    assert row.fit == {"harmful": 29, "harmless": 29}
    plan = Plan.of(config, tmp_path)
    for group in plan.groups(plan.cells[0]):
        assert plan.store.get(Ref.parse(plan.merge_ref(group))).summary["n"] == 29
    assert "read: one, harmful shard" in (tmp_path / "logs/worker-0.log").read_text()
    assert (done.reused, done.results.failed) == (False, 0)

    toml = tmp_path / "again.toml"
    import tomli_w

    tree = config.model_dump(mode="json", exclude_none=True)
    toml.write_text(tomli_w.dumps(tree))
    ran = CliRunner().invoke(cli.app, ["sweep", str(toml), "--out", str(tmp_path), "--json"])
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    assert said["reused"]
    assert said["rows"][0]["site"] == row.site
    assert "this sweep is finished" in ran.stderr
    plain = CliRunner().invoke(cli.app, ["sweep", str(toml), "--out", str(tmp_path), "--dry-run"])
    assert "done" in plain.stdout


def _broad(place, **changes):
    return config_for(
        place,
        models=("one", "two"),
        estimators=["difference-of-means", "whitened-difference"],
        seeds=[0, 1],
        **changes,
    )


def _bits(config, folder):
    plan = Plan.of(config, folder)
    found = {}
    for cell in plan.cells:
        for group in plan.groups(cell):
            for name, tensor in statistics(plan, group).items():
                found[cell.name, group.settings["on"], name] = tensor
        found[cell.name, "unit"] = plan.store.tensors(Ref.parse(plan.audit(cell).ref))["unit"]
    return found


def _same(one, two):
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.slow
def test_the_number_of_workers_changes_no_bit(place, tmp_path):
    """Also with a worker killed in an audit, another one stopped, and a model that is missing."""
    config = _broad(place)
    one = sweep(config, tmp_path / "1")
    two = sweep(config, tmp_path / "2", workers=2)
    kill, killed = killer("cell", "progress")
    stopped = []

    def watch(event):
        kill(event)
        if not stopped and event.kind == "progress" and event.task.kind == "read":
            stopped.append(event.task.ref)
            os.kill(event.pid, signal.SIGSTOP)  # Silent, and not dead.

    four = sweep(config, tmp_path / "4", workers=4, watch=watch, silent=20)
    assert killed
    assert stopped
    assert one.results.figures() == two.results.figures() == four.results.figures()
    bits = _bits(config, tmp_path / "1")
    _same(bits, _bits(config, tmp_path / "2"))
    _same(bits, _bits(config, tmp_path / "4"))
    assert [a.over for a in one.results.agreement] == ["seeds", "estimators"] * 2


@pytest.mark.slow
def test_a_failed_cell_is_a_row_and_the_rest_goes_on(place, tmp_path):
    config = config_for(place, models=("one",))
    tree = config.model_dump(mode="json", exclude_none=True)
    tree["models"] = [*tree["models"], {"name": str(place / "missing"), "label": "gone"}]
    toml = tmp_path / "sweep.toml"
    import tomli_w

    toml.write_text(tomli_w.dumps(tree))
    out = tmp_path / "out"
    ran = CliRunner().invoke(cli.app, ["sweep", str(toml), "--out", str(out), "--json"])
    assert ran.exit_code == 1, ran.output
    said = json.loads(ran.stdout)
    assert said["report"] == str(out / "sweep.html")
    rows = {row["model"]: row for row in said["rows"]}
    assert rows["one"]["error"] is None
    assert rows["one"]["site"]
    assert "missing" in rows["gone"]["error"]
    table = (out / "results.md").read_text()
    assert "| gone | difference-of-means | 0 | failed |" in table
    assert "gone,difference-of-means,0," in (out / "results.csv").read_text()
    page = assert_inert((out / "sweep.html").read_text("utf-8"))
    assert rows["gone"]["error"] in page.text


# In the background of a shell SIGINT is ignored, and so in what is started there.
HEARING = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from demur.cli import main; main()"
)


@pytest.mark.slow
def test_after_an_interruption_the_same_command_goes_on(place, tmp_path):
    config = config_for(place, estimators=["difference-of-means", "whitened-difference"])
    toml = tmp_path / "sweep.toml"
    import tomli_w

    toml.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "demur.cli", "sweep", str(toml), "--out", str(out)]
    hearing = [sys.executable, "-c", HEARING, *command[3:]]
    first = subprocess.Popen(hearing, stderr=subprocess.PIPE, text=True)
    shards = out / "records/shard"
    until = time.monotonic() + 300
    while len(list(shards.glob("[0-9a-f]*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # A quick machine would be done before the other has begun.
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    assert other.returncode == 2, other.stderr
    assert "another sweep is at work" in other.stderr
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "the same command goes on from here" in said
    read = {path.name: path.stat().st_mtime_ns for path in shards.glob("[0-9a-f]*")}
    assert len(read) >= 2
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    after = {path.name: path.stat().st_mtime_ns for path in shards.glob("[0-9a-f]*")}
    assert {name: after[name] for name in read} == read  # Not read a second time.
    whole = sweep(config, tmp_path / "whole")
    found = sweep(config, out)
    assert found.reused
    assert found.results.figures() == whole.results.figures()


@pytest.mark.slow
def test_ray_gives_the_same_bits_and_outlives_a_killed_actor(place, tmp_path):
    pytest.importorskip("ray")
    config = config_for(place, estimators=["difference-of-means", "whitened-difference"])
    plain = sweep(config, tmp_path / "plain")
    kill, killed = killer("read", "started")
    ray = sweep(config, tmp_path / "ray", workers=2, backend="ray", watch=kill)
    assert killed
    assert plain.results.figures() == ray.results.figures()
    _same(_bits(config, tmp_path / "plain"), _bits(config, tmp_path / "ray"))
