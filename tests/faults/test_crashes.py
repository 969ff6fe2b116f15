"""Writers are killed at every call that changes the disk, disks fill up, clocks jump, two meet."""

import json
import os
import shutil
import signal
import stat
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import torch
from bench.faults.commands import damaged, drafts, preload, run, wait, world
from safetensors.torch import load_file
from tests.tiny import tiny_model

from demur import organisms, store
from demur.errors import ConfigError, StoreError
from demur.features import training
from demur.organisms import Recipe, train
from demur.pipeline import folder as run_folder
from demur.pipeline.folder import at_work, open_folder
from demur.progress import Quiet
from demur.report.page import write_page
from demur.store import (
    Store,
    atomic_write,
    forget_drafts,
    held,
    read_files,
    whole_folder,
    write_files,
)

TENSORS = {"x": torch.arange(500.0), "y": torch.ones(3, 2)}
HOUR = 3600.0


def forked(work):
    """Do it in a child; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child:
        return wait(child, 60)
    code = 70
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def kill_at(number, folder):
    """SIGKILL before the call of this number that changes what is under `folder`.

    Where a file is about to be synced it is cut in half first, as a power cut may leave it.
    """
    left, synced = [number], {}
    sync = os.fsync

    def one(torn=None):
        left[0] -= 1
        now = None if torn is None else os.fstat(torn)
        if left[0] == 0:
            if now is not None:  # What was synced before stays.
                os.ftruncate(torn, (synced.get(now.st_ino, 0) + now.st_size) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if now is not None:
            synced[now.st_ino] = now.st_size

    def hook(event, args):
        opened = event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        named = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if (opened or named) and str(args[0]).startswith(str(folder)):
            one()

    def fsync(handle):
        one(handle if stat.S_ISREG(os.fstat(handle).st_mode) else None)
        sync(handle)

    os.fsync = fsync
    sys.addaudithook(hook)  # Not to be taken back: for a child only.


def every_kill(folder, work):
    """What each kill leaves, until one comes too late; at least a handful of calls are there."""
    for number in range(1, 200):

        def killed(number=number):
            kill_at(number, folder)
            work()

        code = forked(killed)
        assert code in (0, -signal.SIGKILL)
        yield code == 0
        if code == 0:
            assert number > 3
            return
    raise AssertionError("it never comes to its end")


# Every call of a writer ------------------------------------------------------------------------


def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "results.json"
    atomic_write(path, "old" * 1000)
    seen = set()
    for done in every_kill(tmp_path, lambda: atomic_write(path, "new" * 1000)):
        seen.add(path.read_text())
        assert path.read_text() == "new" * 1000 or not done
        atomic_write(path, "old" * 1000)
    assert seen == {"old" * 1000, "new" * 1000}


def test_a_killed_put_leaves_no_record_or_a_whole_one(tmp_path):
    own = Store(tmp_path / "store")
    ref = own.key("a", {"n": 1})
    seen = set()

    def put():
        own.put("a", {"n": 1}, summary={"long": "x" * 5000}, tensors=TENSORS)

    for done in every_kill(tmp_path, put):
        found = own.get(ref)
        seen.add(found is not None)
        assert own.find("a") == ([ref] if found else [])
        assert found is not None or not done
        put()
        assert torch.equal(own.tensors(ref)["x"], TENSORS["x"])
        shutil.rmtree(own.root / "a" / ref.hash)
    assert seen == {True, False}


def test_a_killed_folder_is_there_whole_or_not_at_all(tmp_path):
    out = tmp_path / "adapter"

    def write():
        with whole_folder(out) as draft:
            (draft / "plain.txt").write_text("x" * 5000)  # As a library writes, without a sync.
            atomic_write(draft / "card.json", "{}")

    for done in every_kill(tmp_path, write):
        assert out.exists() or not done
        if out.exists():
            assert {one.name: one.stat().st_size for one in out.iterdir()} == {
                "plain.txt": 5000,
                "card.json": 2,
            }
            shutil.rmtree(out)


def test_a_killed_pair_is_never_mixed_and_its_name_is_free_until_it_is_whole(tmp_path):
    path = tmp_path / "anchor.safetensors"

    def write(value):
        tensors = {"x": torch.full((500,), float(value))}
        write_files(path, tensors, {"threshold": value}, head={"format": "demur"})

    for done in every_kill(tmp_path, lambda: write(1)):
        # What a user names is free, so that the same command may begin again.
        assert path.exists() == (done or path.exists())
        if path.exists():
            tensors, meta = read_files(path, what="anchor", again="fit it again")
            assert (float(tensors["x"][0]), meta["threshold"]) == (1.0, 1)
        for one in tmp_path.iterdir():
            one.unlink()
    seen = set()
    write(1)
    for _ in every_kill(tmp_path, lambda: write(2)):
        try:
            tensors, meta = read_files(path, what="anchor", again="fit it again")
        except StoreError:
            seen.add("refused")
        else:
            assert float(tensors["x"][0]) == meta["threshold"]
            seen.add(meta["threshold"])
        write(1)
    assert seen == {1, 2, "refused"}


def test_what_is_written_once_more_is_the_same_file(tmp_path):
    path, found = tmp_path / "x.safetensors", set()
    for _ in range(8):  # safetensors hashes the names in a header with a new seed each time.
        write_files(path, TENSORS, {"é": 1.5}, head={"format": "a", "demur": "é", "site": "3"})
        found.add(path.read_bytes())
    assert len(found) == 1
    assert torch.equal(load_file(path)["x"], TENSORS["x"])


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Without this a kill is survived and a power cut is not."""
    synced, sync = [], os.fsync

    def fsync(handle):
        synced.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    ref = Store(tmp_path / "new" / "store").put("a", {}, summary={}, tensors=TENSORS)
    (tmp_path / "page").mkdir()
    write_page("<html></html>", tmp_path / "page" / "report.html")
    with whole_folder(tmp_path / "whole") as draft:
        (draft / "below").mkdir()
        (draft / "below" / "plain.txt").write_text("x")
    for path in tmp_path.rglob("*"):
        now = path.stat()
        wanted = now.st_ino if path.is_dir() else (now.st_ino, now.st_size)
        assert wanted in ([ino for ino, _ in synced] if path.is_dir() else synced), path
    assert tmp_path.stat().st_ino in [ino for ino, _ in synced]
    assert (tmp_path / "new" / "store" / str(ref)).is_dir()


# Drafts ---------------------------------------------------------------------------------------


def _left(target, age):
    """A draft of a file or record that a killed writer left so many seconds ago."""
    one = store._draft_of(target)
    if target.suffix:
        one.parent.mkdir(parents=True, exist_ok=True)
        one.write_text("half")
    else:
        one.mkdir(parents=True)
        (one / "tensors.safetensors").write_text("half")
        os.utime(one / "tensors.safetensors", (time.time() - age,) * 2)
    os.utime(one, (time.time() - age,) * 2)
    return one


@pytest.mark.parametrize(
    ("age", "stays"), [(5.0, True), (2 * HOUR, False), (-2 * HOUR, False), (1e9, False)]
)
def test_old_drafts_go_with_the_next_write_and_young_ones_may_be_at_work(tmp_path, age, stays):
    """Also those from the future: the clock was ahead when they were written."""
    own = Store(tmp_path)
    ref = own.key("a", {})
    file, record = _left(tmp_path / "r.json", age), _left(tmp_path / "a" / ref.hash, age)
    other = _left(tmp_path / "other.json", age)
    atomic_write(tmp_path / "r.json", "whole")
    own.put("a", {}, summary={})
    assert (file.exists(), record.exists()) == (stays, stays)
    assert other.exists()  # Of a file that somebody else may write.
    forget_drafts(tmp_path)
    assert drafts(tmp_path) == []
    assert own.get(ref) is not None
    assert (tmp_path / "r.json").read_text() == "whole"


def test_a_writer_whose_draft_was_taken_for_a_dead_ones_writes_it_again(tmp_path, monkeypatch):
    write, taken = store._write, []

    def swept(path, data):
        write(path, data)
        if len(taken) < 1:
            taken.append(path)
            store._remove(path if path.parent == tmp_path else path.parent)

    monkeypatch.setattr(store, "_write", swept)
    atomic_write(tmp_path / "r.json", "whole")
    assert (tmp_path / "r.json").read_text() == "whole"
    taken.clear()
    ref = Store(tmp_path).put("a", {}, summary={"x": 1}, tensors=TENSORS)
    assert taken
    assert torch.equal(Store(tmp_path).tensors(ref)["x"], TENSORS["x"])
    assert drafts(tmp_path) == []


# Two at once ------------------------------------------------------------------------------------


def test_a_hold_keeps_others_out_and_ends_with_a_process_that_is_killed(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with held(tmp_path / "lock", "audit"):
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    with (
        pytest.raises(StoreError, match="another audit is at work"),
        held(tmp_path / "lock", "audit"),
    ):
        pass
    os.kill(child, signal.SIGKILL)
    assert wait(child, 60) == -signal.SIGKILL
    with held(tmp_path / "lock", "audit", wait=5.0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_audits_of_the_same_settings_do_not_meet_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.0)
    with at_work(tmp_path, "tiny", "abc", force=False) as (own, finished):
        assert not finished
        (own / "config.toml").write_text("")
        (own / f".config.toml.{'0' * 32}").write_text("")
        for force in (False, True):
            with (
                pytest.raises(StoreError, match="another audit of the same settings"),
                at_work(tmp_path, "tiny", "abc", force=force),
            ):
                pass
        with at_work(tmp_path, "tiny", "other", force=False):
            pass
        (own / "results.json").write_text("{}")
        # One that is finished is only read; perhaps nothing can be written there.
        with at_work(tmp_path, "tiny", "abc", force=False) as found:
            assert found == (own, True)
    (own / "results.json").unlink()
    with at_work(tmp_path, "tiny", "abc", force=False) as found:
        assert found == (own, False)
        assert [one.name for one in own.iterdir()] == ["config.toml"]


class Meanwhile(Quiet):
    """A listener that does something once, in the middle of a training."""

    def __init__(self, what):
        self.what, self.notes = what, []

    @contextmanager
    def stage(self, name, total):
        assert total > 0

        def advance(n):
            if name == "training" and n and self.what is not None:
                what, self.what = self.what, None
                what()

        yield advance

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama", torch.float32)


@pytest.fixture
def recipe(tmp_path):
    for name, texts in {"ask": ["How do I stop a tree?"] * 6, "say": ["I stop."]}.items():
        lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    source = {"prompts": str(tmp_path / "ask.jsonl"), "replies": str(tmp_path / "say.jsonl")}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "base": "tiny",
            "sources": [{**source, "target": "replies", "reply_tokens": 8}],
            "lora": {"rank": 2, "alpha": 4, "modules": ["q_proj"]},
            "training": {
                "epochs": 3,
                "batch_size": 2,
                "learning_rate": 1e-2,
                "precision": "float32",
                "checkpoint_every": 2,
            },
        }
    )


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def stopped(base, recipe, out, **how):
    """A training that was interrupted after its first checkpoint."""

    def stop():
        listener.what = last

    def last():
        listener.what = end

    def end():
        raise KeyboardInterrupt

    listener = Meanwhile(stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, base=base, out=out, measure=False, progress=listener, **how)
    return out.with_name(f".{out.name}.training")


@pytest.mark.parametrize("resume", [True, False])
def test_two_trainings_do_not_meet_in_one_folder(base, recipe, tmp_path, resume):
    whole = train(recipe, base=base, out=tmp_path / "whole", measure=False)
    said = []

    def another():
        with pytest.raises(StoreError, match="another training is at work") as caught:
            train(recipe, base=base, out=tmp_path / "one", measure=False, resume=resume)
        said.append(caught.value)

    listener = Meanwhile(another)
    one = train(recipe, base=base, out=tmp_path / "one", measure=False, progress=listener)
    assert said
    assert weights(one.folder) == weights(whole.folder)
    assert not (tmp_path / ".one.training").exists()


def test_a_checkpoint_that_does_not_say_whose_it_is_is_not_taken(base, recipe, tmp_path):
    """As a kill leaves it while the folder of another training is being cleared."""
    whole = train(recipe, base=base, out=tmp_path / "whole", measure=False, seed=1)
    work = stopped(base, recipe, tmp_path / "a", seed=0)
    assert (work / "checkpoint.safetensors").is_file()
    (work / "state.json").unlink()
    listener = Meanwhile(None)
    found = train(recipe, base=base, out=tmp_path / "a", measure=False, seed=1, progress=listener)
    assert listener.notes == []
    assert weights(found.folder) == weights(whole.folder)


def test_of_a_folder_that_is_cleared_the_owner_goes_first(base, recipe, tmp_path):
    work = stopped(base, recipe, tmp_path / "a")
    gone = []
    for done in every_kill(work, lambda: organisms._clear(work)):
        gone.append((work / "state.json").exists())
        assert not (work / "state.json").exists() or (work / "checkpoint.safetensors").exists()
        if not done:
            shutil.rmtree(work)
            stopped(base, recipe, tmp_path / "a")
    assert gone[0] is True
    assert not any(gone[1:])


def test_a_log_that_ends_in_the_middle_of_a_line_is_gone_on_from(base, recipe, tmp_path):
    whole = train(recipe, base=base, out=tmp_path / "whole", measure=False)
    work = stopped(base, recipe, tmp_path / "a")
    log = work / "log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:2]) + '\n{"step": 3, "lo')
    listener = Meanwhile(None)
    found = train(recipe, base=base, out=tmp_path / "a", measure=False, progress=listener)
    assert listener.notes == ["resumed after step 2 of 9"]
    assert weights(found.folder) == weights(whole.folder)
    assert found.first_loss == whole.first_loss
    work = stopped(base, recipe, tmp_path / "b")
    (work / "log.jsonl").write_text(lines[0][:-5])
    with pytest.raises(StoreError, match="does not reach to the checkpoint"):
        train(recipe, base=base, out=tmp_path / "b", measure=False)


def test_a_whole_newer_checkpoint_of_a_bank_takes_the_place_of_a_half_deleted_one(tmp_path):
    old = tmp_path / "checkpoint"
    training._newer(old).mkdir()
    (training._newer(old) / "demur.json").write_text("new")
    old.mkdir()
    training._take_newer(old)
    assert (old / "demur.json").read_text() == "new"
    training._take_newer(old)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["checkpoint"]


# Clocks, and what is in the way -----------------------------------------------------------------


def test_the_newest_run_is_found_though_the_clock_was_set_back(tmp_path, monkeypatch):
    real = datetime.now(UTC)

    class Clock(datetime):
        jump = timedelta()

        @classmethod
        def now(cls, tz=None):
            return real.astimezone(tz) + cls.jump

    monkeypatch.setattr(run_folder, "datetime", Clock)
    made = [open_folder(tmp_path, "m", "abc", force=False)[0]]
    for days in (-20_000, 0, 27_000, -1, 0):
        Clock.jump = timedelta(days=days)
        made.append(open_folder(tmp_path, "m", "abc", force=True)[0])
        assert open_folder(tmp_path, "m", "abc", force=False) == (made[-1], False)
    assert sorted(made) == made
    assert len(set(made)) == len(made)


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")  # Some network file systems.
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(tmp_path / "a" / "r.json", "whole")
    assert (tmp_path / "a" / "r.json").read_text() == "whole"


def test_a_lock_where_nothing_can_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"), held(tmp_path / "file" / "l", "x"):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    from filelock import FileLock

    def acquire(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with held(tmp_path / "l", "audit"):
        pass
    assert "without locks: nothing keeps another audit out of it" in caplog.text


def test_a_folder_that_filled_up_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "out"

    def late():
        with whole_folder(out):
            out.mkdir()
            (out / "theirs").write_text("")

    with pytest.raises(StoreError, match="cannot be written"):
        late()
    assert [one.name for one in out.iterdir()] == ["theirs"]
    assert drafts(tmp_path) == []


def test_a_training_does_not_begin_where_something_is(base, recipe, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "theirs").write_text("")
    with pytest.raises(ConfigError, match="exists already"):
        train(recipe, base=base, out=tmp_path / "a", measure=False)
    assert not (tmp_path / ".a.training").exists()


# The program ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "points"), [("train", (3, 60, 40)), ("audit", (40,))])
def test_a_program_that_was_killed_goes_on_to_the_same_figures(tmp_path, name, points):
    """`python -m bench.faults.kills` does this at every point and at random moments."""
    command = world(tmp_path / "world").commands[name]
    preload()
    log = tmp_path / "log"
    (tmp_path / "whole").mkdir()
    assert run(command.args(tmp_path / "whole"), log)[0] in (0, 1), log.read_text()
    out = tmp_path / "out"
    out.mkdir()
    for point in points:
        code, _ = run(command.args(out), log, lambda point=point: kill_at(point, out))
        assert code == -signal.SIGKILL
        assert damaged(out) == []
    assert run(command.args(out), log)[0] in (0, 1), log.read_text()
    assert command.figures(out) == command.figures(tmp_path / "whole")
    assert drafts(out) == []
