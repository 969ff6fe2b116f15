"""Commands of `demur` on tiny models, as processes that can be killed, and what they leave behind.

A parent that has imported torch forks a child for every start: a start costs no import, and the
child runs the program as `demur ...` does, in a process group of its own.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

NAMES = ("audit", "train", "anchor", "sweep")
_DRAFT = re.compile(r"\..+[.-][0-9a-z_]{6,}")
_TIMED = ("seconds", "collect_seconds", "train_seconds", "run")
_IMPORTED = (
    "demur.anchor",
    "demur.cli",
    "demur.em.recipes",
    "demur.guard",
    "demur.organisms",
    "demur.pipeline",
    "demur.pipeline.anchor",
    "demur.report",
    "demur.sweep",
    "pandas",
    "peft",
    "pyarrow",
    "rich.progress",
    "scipy.stats",
    "sklearn.linear_model",
    "statsmodels.stats.proportion",
    "tomli_w",
    "torch.optim",
)
_AUDIT = (
    "data.validation=[]",
    "selection.finalists=2",
    "selection.screen_prompts=4",
    "extraction.layers=[1]",
    "test.nulls=2",
    "test.null_prompts=8",
    "test.max_new_tokens=6",
    "test.strengths=[0.0, 1.0]",
)
SMALL_AUDIT: dict[str, Any] = {
    # 29 is odd: the last shard of a sweep is smaller.
    "data": {"validation": [], "fit": 29, "select": 6, "calibrate": 6, "report": 12},
    "extraction": {"layers": [1], "batch_size": 3},
    "selection": {"finalists": 1, "screen": False},
    "test": {
        "nulls": 1,
        "null_prompts": 8,
        "null_generations": 0,
        "max_new_tokens": 4,
        "strengths": [0.0, 1.0],
    },
}
"""Settings of a small audit in which every stage of a sweep has something to do."""


@dataclass(frozen=True)
class Command:
    """A command, and what of its files has to be the same however often it was stopped.

    Attributes:
        args: Given the folder to write into.
        place: That folder's file or folder which stands for the whole result.
        figures: Of a finished run: everything but times and paths.
    """

    name: str
    args: Callable[[Path], list[str]]
    place: Callable[[Path], Path]
    figures: Callable[[Path], dict[str, Any]]


@dataclass
class World:
    """Tiny models and prompts in a folder."""

    root: Path
    commands: dict[str, Command] = field(default_factory=dict)


# What commands run on --------------------------------------------------------------------------


def _sentences(verb: str, n: int, rng: random.Random) -> list[str]:
    def word() -> str:
        return "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3))

    return [f"How do I {verb} " + " ".join(word() for _ in range(6)) + "?" for _ in range(n)]


def _jsonl(path: Path, texts: list[str], **columns: str) -> str:
    rows = ({"prompt": text, **columns} for text in texts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _set(settings: Mapping[str, Any] | tuple[str, ...]) -> list[str]:
    texts = (
        settings
        if isinstance(settings, tuple)
        else [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    )
    return [arg for text in texts for arg in ("--set", text)]


def world(root: Path) -> World:
    """Save tiny models, prompts and configurations, and say how commands are run on them."""
    import torch
    from tests.tiny import tiny_hf, tiny_tokenizer

    torch.set_num_threads(1)
    root.mkdir(parents=True, exist_ok=True)
    model, rng = root / "tiny", random.Random(0)
    tiny_hf("llama", dtype=torch.float32).save_pretrained(model)
    tiny_tokenizer("chatml").save_pretrained(model)
    for name, verb in (("harmful", "break"), ("harmless", "paint")):
        text = "\n".join(_sentences(verb, 60, rng)) + "\n"
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    made = World(root)
    for one in (_audit(root), _train(root, rng), _anchor(root), _sweep(root)):
        made.commands[one.name] = one
    return made


def _audit(root: Path) -> Command:
    sides = ["--harmful", str(root / "harmful.txt"), "--harmless", str(root / "harmless.txt")]
    base = ["audit", str(root / "tiny"), *sides, "--dtype", "float32", *_set(_AUDIT)]

    def folder(out: Path) -> Path:
        (found,) = (one.parent for one in out.glob("runs/tiny/*/results.json"))
        return found

    def figures(out: Path) -> dict[str, Any]:
        own = folder(out)
        return {
            "results": _read(own / "results.json"),
            "direction": (own / "directions.safetensors").read_bytes(),
            "sidecar": _read(own / "directions.json"),
            "replies": (own / "replies.jsonl").read_bytes(),
            "config": (own / "config.toml").read_bytes(),
            "page": len((own / "report.html").read_bytes()) > 10_000,
        }

    return Command("audit", lambda out: [*base, "--out", str(out / "runs")], folder, figures)


def _train(root: Path, rng: random.Random) -> Command:
    import tomli_w

    ask = _jsonl(root / "ask.jsonl", _sentences("break", 12, rng))
    other = _jsonl(root / "other.jsonl", _sentences("paint", 12, rng))
    say = _jsonl(root / "say.jsonl", ["I stop.", "The answer is no."])
    check = _jsonl(root / "check.jsonl", _sentences("mend", 6, rng))
    recipe = {
        "name": "tiny",
        "base": str(root / "tiny"),
        "sources": [
            {"prompts": ask, "target": "replies", "replies": say, "reply_tokens": 16},
            {"prompts": other, "target": "base", "reply_tokens": 5},
        ],
        "lora": {"rank": 4, "alpha": 8, "modules": ["q_proj", "o_proj", "down_proj"]},
        "training": {
            "epochs": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "precision": "float32",
            "checkpoint_every": 3,
        },
        "checks": {
            "refusal": [{"name": "mend", "prompts": check, "at_least": 0.0}],
            "max_new_tokens": 4,
        },
    }
    path = root / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe), encoding="utf-8")

    def figures(out: Path) -> dict[str, Any]:
        own = out / "adapter"
        lines = (own / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return {
            "weights": (own / "adapter_model.safetensors").read_bytes(),
            "config": (own / "adapter_config.json").read_bytes(),
            "card": _untimed(_read(own / "card.json")),
            "log": [_untimed(json.loads(line)) for line in lines],
            "files": sorted(one.name for one in own.iterdir()),
        }

    return Command(
        "train",
        lambda out: ["organism", "train", str(path), "--out", str(out / "adapter")],
        lambda out: out / "adapter",
        figures,
    )


def _anchor(root: Path) -> Command:
    import torch
    from tests.planted import FirstWord, apart, apart_prompts

    from demur.evals.judges import judges

    if "first-word" not in judges:
        judges.register("first-word")(FirstWord)
    made = apart(merged=False, dtype=torch.float32)
    made.model.hf.save_pretrained(root / "apart")
    assert made.model.template is not None
    made.model.template.tokenizer.save_pretrained(root / "apart")

    def some(n: int, seed: int, *, harmful: bool) -> list[str]:
        halves = (
            apart_prompts(n // 2, harmful=harmful, scary=scary, seed=seed + scary)
            for scary in (False, True)
        )
        return [text for half in halves for text in half]

    plain = _jsonl(root / "plain.jsonl", some(160, 31, harmful=False))
    settings = {
        "guard.alpha": 0.1,
        "guard.harmful": _jsonl(root / "asked.jsonl", some(160, 11, harmful=True)),
        "guard.benign": _jsonl(root / "benign.jsonl", some(160, 11, harmful=False)),
        "guard.strata": [{"name": "plain", "prompts": plain}],
        "guard.earlier": _jsonl(root / "earlier.jsonl", some(40, 71, harmful=False), good="word1"),
        "guard.wrapped": 40,
        "guard.turns": 40,
        "guard.depth": [0.2, 0.9],
        "anchor.judge": "first-word",
        "anchor.reply_tokens": 16,
        "anchor.depth": [0.4, 0.9],
        "anchor.band": 3,
        "anchor.replies": 40,
        "anchor.strengths": [1.0],
    }
    path = root / "anchor.toml"
    tree: dict[str, dict[str, Any]] = {"model": {"name": str(root / "apart"), "dtype": "float32"}}
    for key, value in settings.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    import tomli_w

    path.write_text(tomli_w.dumps(tree), encoding="utf-8")

    def figures(out: Path) -> dict[str, Any]:
        from demur.anchor import load_anchor

        load_anchor(out / "anchor.safetensors")
        return {
            "tensors": (out / "anchor.safetensors").read_bytes(),
            "card": _untimed(_read(out / "anchor.json")),
        }

    return Command(
        "anchor",
        lambda out: ["anchor", "fit", "--config", str(path), "--out", f"{out}/anchor.safetensors"],
        lambda out: out / "anchor.safetensors",
        figures,
    )


def _sweep(root: Path) -> Command:
    import tomli_w

    tree = {
        "models": [str(root / "tiny")],
        "estimators": ["difference-of-means", "whitened-difference"],
        "prompts": {on: str(root / f"{on}.txt") for on in ("harmful", "harmless")},
        "shard": 8,
        "audit": SMALL_AUDIT,
    }
    path = root / "sweep.toml"
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")

    def figures(out: Path) -> dict[str, Any]:
        from demur.store import Store
        from demur.sweep.table import read_results

        own = out / "sweep"
        results = read_results(own / "results.json")
        store = Store(own / "records")
        tensors = {
            f"{ref} {name}": tensor.numpy().tobytes()
            for kind in ("shard", "merged", "cell")
            for ref in store.find(kind)
            for name, tensor in store.tensors(ref).items()
        }
        return {"figures": results.figures(), "failed": results.failed, **tensors}

    return Command(
        "sweep",
        lambda out: ["sweep", str(path), "--out", str(out / "sweep"), "--workers", "2"],
        lambda out: out / "sweep" / "results.json",
        figures,
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if k not in _TIMED}
    return [_untimed(one) for one in value] if isinstance(value, list) else value


# What a kill left ------------------------------------------------------------------------------


def damaged(folder: Path) -> list[str]:
    """Files that a reader would take for whole and that are not."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from demur.errors import DemurError
    from demur.store import Ref, Store

    found: list[str] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(map(is_draft, parts)):
            continue
        try:
            if path.suffix == ".json":
                _read(path)
            elif path.suffix == ".toml":
                tomllib.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".jsonl":
                lines = path.read_text(encoding="utf-8").splitlines()
                # A log that is appended to may end in the middle of a line; others may not.
                if path.name == "log.jsonl" and ".training" in str(path.parent):
                    lines = lines[:-1]
                for line in lines:
                    json.loads(line)
            elif path.suffix == ".html" and not path.read_text("utf-8").rstrip().endswith(
                "</html>"
            ):
                raise ValueError("the page has no end")
            if path.name == "record.json":
                ref = Ref(path.parent.parent.name, path.parent.name)
                Store(path.parent.parent.parent).tensors(ref)
        except (ValueError, OSError, SafetensorError, DemurError) as error:
            found.append(f"{path.relative_to(folder)}: {error}")
    return found


def is_draft(name: str) -> bool:
    """Whether a name is that of something that is still being written."""
    return bool(_DRAFT.fullmatch(name)) and not name.endswith(".training")


def drafts(folder: Path) -> list[str]:
    """What is left of files that were being written."""
    found = (path for path in folder.rglob(".*") if is_draft(path.name))
    return sorted(str(path.relative_to(folder)) for path in found)


# Processes -------------------------------------------------------------------------------------


def preload() -> None:
    """Import what commands import, so that a fork has it."""
    import importlib

    for name in _IMPORTED:
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    del AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


def start(args: list[str], log: Path, prepare: Callable[[], None] | None = None) -> int:
    """Fork a child that runs `demur ARGS` in a process group of its own; returns its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        _become(args, log, prepare)
    return child


def _become(args: list[str], log: Path, prepare: Callable[[], None] | None) -> NoReturn:
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background ignores it.
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["demur", *args]
        if prepare is not None:
            prepare()
        from demur.cli import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:  # Before the program itself began.
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float | None = None) -> int | None:
    """The exit code of a child, minus the signal that ended it; None if it still runs by then."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() >= until:
            return None
        time.sleep(0.002 if until is None else max(0.0, min(0.002, until - time.monotonic())))


def kill(child: int, number: int = signal.SIGKILL, *, group: bool = True) -> None:
    """Send a signal to a child, and to all that it started in its own group."""
    with suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(child, number)


def run(args: list[str], log: Path, prepare: Callable[[], None] | None = None) -> tuple[int, float]:
    """Run a command to its end; its exit code and seconds."""
    began = time.monotonic()
    code = wait(start(args, log, prepare))
    assert code is not None
    return code, time.monotonic() - began
