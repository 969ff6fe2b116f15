"""vLLM behind a narrow adapter: a process in its own environment, spoken to over two pipes.

Prompts are laid out here and sent as token ids, so that both ways of running a model see the same
tokens; replies come back as ids. Nothing is served over HTTP, no code is sent, and no prefix is
cached, since keys and values of an edited stream must never serve another request.

Every edit is counted: a request whose hook did not fire at each layer for each token, on every
rank, ends in an error, not in a reply of the plain model.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from demur.activations import Moments
from demur.edits import as_delta, save_merged
from demur.engines.acts import Act, block_of, operations
from demur.engines.programs import Fault, Operation, Reading, encode
from demur.engines.wire import EngineError, Message, protocol, receive, send
from demur.errors import (
    ConfigError,
    MissingExtraError,
    ModelLoadError,
    NonFiniteError,
    SilentEditError,
    TooFewPromptsError,
)
from demur.interventions import Ablate
from demur.models import Completion, Conversation, Model, Template, TokenBatch, load_tokenizer
from demur.sites import Site

PYTHON = "DEMUR_VLLM_PYTHON"
_DTYPES = ("bfloat16", "float32", "float16")
_TAIL = 12  # Lines of the log that an error shows.


def save(model: Model, folder: Path, act: Ablate | None = None) -> Path:
    """Write a model as it is loaded, its adapter merged, as a folder that an engine loads.

    Args:
        model: Its weights and tokenizer are written.
        folder: Where to.
        act: An ablation to write into the weights; a tied embedding is untied first.

    Raises:
        FamilyError: The architecture cannot carry the ablation.
    """
    if act is not None:
        save_merged(model, as_delta(model, act), str(folder))
        return folder
    model.hf.save_pretrained(folder)
    if model.template is not None:
        model.template.tokenizer.save_pretrained(folder)
    return folder


def find_python(python: str | Path | None = None) -> Path:
    """The interpreter of the environment that has vLLM.

    Raises:
        MissingExtraError: None is named, or it is not there.
    """
    named = python or os.environ.get(PYTHON)
    if not named:
        raise MissingExtraError(
            "vLLM runs in an environment of its own, and none is named",
            f"`scripts/setup-vllm FOLDER` makes one; then set {PYTHON}=FOLDER/bin/python",
        )
    path = Path(named).expanduser()
    if not path.is_file():
        raise MissingExtraError(
            f"there is no interpreter {path}",
            f"`scripts/setup-vllm FOLDER` makes an environment; {PYTHON} names its python",
        )
    return path


def stop_ids(folder: Path, template: Template) -> list[int]:
    """Tokens that end a reply, as `Model.stop_ids` has them, from the files of a checkpoint."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        eos = None
        if path.is_file():
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    tokenizer = template.tokenizer
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if template.kind == "chat" and template.post_ids:
        first = template.post_ids[0]
        if first in set(tokenizer.get_added_vocab().values()):
            found.add(first)
    return sorted(found)


def _split_cores(ranks: int) -> str:
    """The cores that this process may use, in as many parts, as vLLM wants them written."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = len(cores) // ranks
    if not each:
        return "nobind"
    parts = (cores[rank * each : (rank + 1) * each] for rank in range(ranks))
    return "|".join(",".join(map(str, part)) for part in parts)


@dataclass(frozen=True, slots=True)
class Spent:
    """What a call cost inside the engine.

    Attributes:
        wall_s: Seconds on the clock.
        cpu_s: Seconds of all cores and all ranks.
    """

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Ran:
    """What came back of a call."""

    rows: list[dict[str, Any]]
    reports: Mapping[str, list[dict[str, Any]]]
    tensors: Mapping[str, Tensor]


def check_reached(
    ranks: Sequence[Mapping[str, Any]],
    needed: Mapping[int, int],
    layers: Iterable[int],
    *,
    n_ranks: int,
) -> None:
    """See that a program was at work on every token of its requests.

    Args:
        ranks: What each rank reports, see `Program.report`.
        needed: By request, how many tokens the model has computed for it.
        layers: Blocks that the program acts at.
        n_ranks: How many ranks there are.

    Raises:
        SilentEditError: Some request was not reached whole; its reply must not be used.
    """
    bad: list[str] = []
    if len(ranks) != n_ranks:
        bad.append(f"{len(ranks)} of {n_ranks} ranks report")
    why: list[str] = []
    for number, rank in enumerate(ranks):
        why += [str(one) for one in rank.get("raised", ())]
        for row, tokens in needed.items():
            seen = rank["rows"].get(str(row))
            who = f"request {row + 1}" + (f" on rank {number}" if n_ranks > 1 else "")
            if seen is None:
                bad.append(f"{who} was never reached")
                continue
            if seen["fault"] is not None:
                bad.append(f"{who}: {seen['fault']}")
                continue
            short = [n for n in layers if int(seen["reached"].get(str(n), 0)) < tokens]
            if short:
                reached = int(seen["reached"].get(str(short[0]), 0))
                bad.append(f"{who}: {reached} of {tokens} tokens at block {short[0]}")
    if bad:
        more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
        raised = f" ({why[0]})" if why else ""
        raise SilentEditError(
            f"edits or readings did not run in the engine: {'; '.join(bad[:3])}{more}{raised}",
            "the replies of this call are void; the engine's log says more, and the versions of "
            "vllm and vllm-lens must be those of `scripts/setup-vllm`",
        )


class Engine:
    """A model in vLLM, in a process of its own.

        with Engine(folder, python="/opt/vllm/bin/python") as engine:
            replies = engine.generate(prompts, max_new_tokens=48, acts=(Add(direction),))

    Attributes:
        n_layers: Blocks of the model.
        d_model: Width of the stream.
        threads: Of all ranks together.
        versions: Of what runs in the other environment.
        spent: What the last call cost inside the engine.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        python: str | Path | None = None,
        dtype: str = "bfloat16",
        tensor_parallel: int = 1,
        adapters: Mapping[str, str | Path] | None = None,
        lora_rank: int = 8,
        max_length: int = 2048,
        rows: int = 64,
        kv_gib: float = 1.0,
        system: str | None = None,
        thinking: bool | None = None,
        start_within_s: float = 900.0,
    ) -> None:
        """Name what is to be run; `with` starts it.

        Args:
            folder: A Hugging Face folder of safetensors, see `save`.
            python: Interpreter of vLLM's environment; None takes `DEMUR_VLLM_PYTHON`.
            dtype: Of weights and stream.
            tensor_parallel: Over how many ranks each matrix is spread.
            adapters: PEFT LoRA folders by name; requests choose one of them, or none.
            lora_rank: The largest rank among them, as vLLM wants it named.
            max_length: Most tokens of a prompt and its reply.
            rows: Most requests that are computed together.
            kv_gib: Memory for keys and values, GiB a rank.
            system: A system prompt for every prompt; None keeps the template's default.
            thinking: For templates that can open or close a thinking block.
            start_within_s: Seconds that loading may take.

        Raises:
            MissingExtraError: No environment of vLLM is named or there.
            ModelLoadError: The folder is none of a model.
            ConfigError: The dtype is unknown, or a number is not above 0.
        """
        self.folder = Path(folder).expanduser().resolve()
        if not (self.folder / "config.json").is_file():
            raise ModelLoadError(
                f"{self.folder} has no config.json, so it is no Hugging Face model folder",
                "write one with `demur.engines.vllm.save(model, folder)`",
            )
        if dtype not in _DTYPES:
            raise ConfigError(f"unknown dtype `{dtype}`", f"choose {', '.join(_DTYPES)}")
        if min(tensor_parallel, max_length, rows, lora_rank) < 1 or not kv_gib > 0:
            raise ConfigError(
                f"ranks {tensor_parallel}, length {max_length}, rows {rows}, rank {lora_rank}, "
                f"memory {kv_gib} GiB",
                "give numbers above 0",
            )
        self.python = find_python(python)
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        own = config.get("text_config", config).get("max_position_embeddings")
        self.max_length = min(max_length, own) if isinstance(own, int) else max_length
        self.template = Template(
            load_tokenizer(str(self.folder)),
            system=system,
            thinking=thinking,
            max_length=self.max_length,
        )
        self.stop_ids = stop_ids(self.folder, self.template)
        self.tensor_parallel = tensor_parallel
        self.adapters = {name: str(Path(path).resolve()) for name, path in (adapters or {}).items()}
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel,
            "max_model_len": self.max_length,
            "max_num_seqs": rows,
            "max_num_batched_tokens": max(2048, self.max_length),
        }
        self._lora_rank = lora_rank
        self._kv_gib = kv_gib
        self._start_within_s = start_within_s
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self.n_layers = self.d_model = self.threads = 0
        self.versions: Mapping[str, str] = {}
        self.spent = Spent(0.0, 0.0)

    # Its process --------------------------------------------------------------------------------

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the process and load the model; takes a minute or two.

        Raises:
            EngineError: It does not start, or its copy of demur is another one.
            ModelLoadError: vLLM cannot load the folder.
        """
        if self._process is not None:
            return
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        log, name = tempfile.mkstemp(prefix="demur-vllm-", suffix=".log")
        self._log = Path(name)
        try:
            self._process = subprocess.Popen(
                [
                    str(self.python),
                    "-I",
                    "-m",
                    "demur.engines.worker",
                    str(theirs_in),
                    str(theirs_out),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs_in, theirs_out),
                env=self._environment(),
                start_new_session=True,  # So that its ranks can be ended with it.
            )
        finally:
            for one in (theirs_in, theirs_out, log):
                os.close(one)
            self._in, self._out = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        try:
            hello = self._hear(self._start_within_s)
            if hello.head.get("protocol") != protocol():
                raise EngineError(
                    f"the demur in {self.python} is another one than this",
                    "install it there again: `scripts/setup-vllm` does",
                )
            found = self._ask(
                {
                    "do": "load",
                    "folder": str(self.folder),
                    "options": self._options,
                    "adapters": self.adapters,
                    "lora_rank": self._lora_rank,
                },
                within_s=self._start_within_s,
                failing=ModelLoadError,
            )
            ranks = found.head["ranks"]
            if len(ranks) != self.tensor_parallel or len({one["d_model"] for one in ranks}) != 1:
                raise EngineError(
                    f"{len(ranks)} ranks answer, {self.tensor_parallel} were asked for",
                    "the engine's log says more",
                )
        except BaseException:
            self.close(within_s=1.0)
            raise
        self.n_layers, self.d_model = int(ranks[0]["n_layers"]), int(ranks[0]["d_model"])
        self.versions = found.head["versions"]
        self.threads = sum(int(one["threads"]) for one in ranks)

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VLLM_"))}
        if self.tensor_parallel > 1:
            # By itself vLLM wants a NUMA node for each rank, and does not start where there is one.
            kept["VLLM_CPU_OMP_THREADS_BIND"] = _split_cores(self.tensor_parallel)
        return kept | {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(self._kv_gib))),
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # The plug-in knows the first one.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TORCHDYNAMO_DISABLE": "1",  # Hooks need eager mode; a few helpers would be compiled.
            # Threads that spin while they wait take the cores from each other.
            "OMP_WAIT_POLICY": "passive",
            "GOMP_SPINCOUNT": "0",
        }

    def close(self, *, within_s: float = 60.0) -> None:
        """End the process and all its ranks, by force if it takes longer."""
        process = self._process
        if process is None:
            return
        self._process = None
        for pipe in (self._out, self._in):
            with suppress(OSError):  # It died before what was written reached it.
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(within_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # Ranks that outlive it.
        process.wait()
        if self._log is not None:
            self._log.unlink(missing_ok=True)

    def log_tail(self) -> str:
        """The last lines of what the process has printed."""
        if self._log is None or not self._log.exists():
            return ""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(line[:300] for line in lines[-_TAIL:])

    def _hear(self, within_s: float | None) -> Message:
        with selectors.DefaultSelector() as ready:
            ready.register(self._in, selectors.EVENT_READ)
            if not ready.select(within_s):
                raise EngineError(
                    f"the engine said nothing for {within_s:.0f} s\n{self.log_tail()}",
                    "the machine may be busy: raise `start_within_s`",
                )
        told = receive(self._in)
        if told is None:
            raise EngineError(
                f"the engine's process ended\n{self.log_tail()}",
                "its last words are above; a lack of memory ends it without any",
            )
        return told

    def _ask(
        self,
        head: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        *,
        within_s: float | None = None,
        failing: type[EngineError | ModelLoadError] = EngineError,
    ) -> Message:
        if self._process is None:
            raise EngineError("the engine is not running", "use it inside `with Engine(...)`")
        send(self._out, Message(head, tensors or {}))
        told = self._hear(within_s)
        if (error := told.head.get("error")) is not None:
            if "hint" in told.head:  # One of demur's own, raised on the other side.
                raise ConfigError(f"vLLM: {error}", str(told.head["hint"]))
            raise failing(f"vLLM: {error}\n{self.log_tail()}", "its last words are above")
        return told

    # What it does -------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str | Conversation] | TokenBatch) -> TokenBatch:
        """Prompts as `Model.encode` lays them out; errors are those of `Template.encode`."""
        if isinstance(prompts, TokenBatch):
            return prompts
        return self.template.encode(prompts, pad_id=0)

    def generate(
        self,
        prompts: Sequence[str | Conversation] | TokenBatch,
        *,
        max_new_tokens: int,
        acts: Sequence[Act] = (),
        each: Sequence[Sequence[Act]] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> list[Completion]:
        """Reply to each prompt, in the order given.

        Args:
            prompts: User messages, conversations, or rows that `encode` or `Model.encode` made.
            max_new_tokens: Replies are cut there.
            acts: Interventions on every request.
            each: Interventions on each request, in place of `acts`; requests of all kinds share
                batches.
            adapter: The LoRA that every request runs with, or that each does.
            temperature: None always takes the likeliest token.
            seed: Of the draws, which are not those of `Model.generate`.

        Raises:
            FamilyError: An intervention is an ablation, or acts where no hook of an engine does.
            ConfigError: An intervention is not on the engine's list.
            SilentEditError: A hook did not fire on some token of a request.
        """
        if temperature is not None and not temperature > 0:
            raise ConfigError(
                f"{temperature} is no temperature", "give one above 0, or none to reply greedily"
            )
        batch = self.encode(prompts)
        programs, owners = self._programs(acts, each, len(batch))
        ran = self._run(
            batch,
            programs,
            owners,
            max_new_tokens=max_new_tokens,
            adapter=adapter,
            temperature=temperature,
            seed=seed,
        )
        return [self._completion(row) for row in ran.rows]

    def moments(
        self,
        prompts: Sequence[str | Conversation] | TokenBatch,
        *,
        sites: Sequence[Site],
        positions: Sequence[int],
        rank: int = 64,
        acts: Sequence[Act] = (),
        adapter: str | None = None,
    ) -> Moments:
        """Read mean and covariance per site and position, reduced in the engine's hooks.

        No activation leaves the engine's process, so that memory and traffic do not grow with the
        number of prompts.

        Args:
            prompts: As for `generate`.
            sites: Outputs of blocks, `3.resid_post` or, the same tensor, `4.resid_pre`.
            positions: Token indices from the end of the prompt.
            rank: Of the covariance sketch, see `Moments`; 0 keeps no covariance.
            acts: Interventions in force while it is read.
            adapter: The LoRA that the prompts run with.

        Raises:
            FamilyError: A site is the output of no block, or see `generate`.
            TooFewPromptsError: A prompt is shorter than a position asks for, or there is none.
            NonFiniteError: Activations hold NaN or infinity.
            SilentEditError: A hook did not fire on some token of a prompt.
        """
        batch = self.encode(prompts)
        blocks = [block_of(site) for site in sites]
        if not sites or not positions or max(positions) > -1:
            raise ConfigError(
                f"sites {[str(one) for one in sites]} and positions {list(positions)}",
                "name at least one of each; -1 is a prompt's last token",
            )
        if bool((batch.ends + min(positions) < 0).any()):
            raise TooFewPromptsError(
                f"a prompt is shorter than position {min(positions)} asks for",
                "read fewer positions from the end",
            )
        reading = Reading(tuple(sorted(set(blocks))), tuple(positions), rank)
        program = (*operations(acts, n_layers=self.n_layers), reading)
        ran = self._run(
            batch, {"0": program}, ["0"] * len(batch), max_new_tokens=1, adapter=adapter
        )
        head = ran.reports["0"][0]["moments"]
        per: dict[str, list[Tensor]] = {"mean": [], "total": [], "spread": []}
        for block in blocks:
            if int(head[str(block)]["n"]) != len(batch):
                raise SilentEditError(
                    f"{head[str(block)]['n']} of {len(batch)} prompts were read at block {block}",
                    "this is a fault in demur: report it",
                )
            for name, parts in per.items():
                parts.append(ran.tensors[f"0/0/{block}.{name}"])
        whole = {name: torch.cat(parts) for name, parts in per.items()}
        if not all(bool(torch.isfinite(one).all()) for one in whole.values()):
            raise NonFiniteError(
                "activations in the engine hold NaN or infinity",
                "try `dtype='float32'`; the checkpoint may also be damaged",
            )
        return Moments(
            tuple(sites),
            tuple(positions),
            rank,
            n=len(batch),
            exact=all(bool(head[str(block)]["exact"]) for block in blocks),
            **whole,
        )

    def logprobs(
        self,
        prompts: Sequence[str | Conversation] | TokenBatch,
        *,
        acts: Sequence[Act] = (),
        adapter: str | None = None,
    ) -> Float[Tensor, "prompt vocab"]:
        """Log-probabilities of the token behind each prompt, float32; errors as for `generate`."""
        batch = self.encode(prompts)
        programs, owners = self._programs(acts, None, len(batch))
        ran = self._run(batch, programs, owners, max_new_tokens=1, adapter=adapter, logprobs=True)
        found = ran.tensors["logprobs"]
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(
                "log-probabilities of the engine are missing or not finite",
                "try `dtype='float32'`; the checkpoint may also be damaged",
            )
        return found

    def check(self, prompt: str = "Tell me about trees.") -> None:
        """See that this installation fails closed: a hook is made to raise, and must be noticed.

        Raises:
            EngineError: The reply came back as if nothing had happened.
        """
        batch = self.encode([prompt] * 2)
        middle = Fault(self.n_layers // 2, int(batch.ends[0]) - 1)
        try:
            self._run(batch, {"0": (middle,)}, ["0", None], max_new_tokens=2)
        except SilentEditError:
            return
        raise EngineError(
            "a hook raised in the engine and its request ended as if it had not",
            "do not use this installation: take the versions of `scripts/setup-vllm`",
        )

    def _programs(
        self, acts: Sequence[Act], each: Sequence[Sequence[Act]] | None, n: int
    ) -> tuple[dict[str, tuple[Operation, ...]], list[str | None]]:
        """Programs by name, and which of them each request runs under; the same acts, the same."""
        if each is None:
            each = [acts] * n
        elif acts or len(each) != n:
            raise ConfigError(
                f"got interventions for {len(each)} of {n} requests"
                + (" and for all of them" if acts else ""),
                "give `acts` for all requests, or one sequence for each in `each`",
            )
        programs: dict[str, tuple[Operation, ...]] = {}
        names: dict[tuple[int, ...], str] = {}
        owners: list[str | None] = []
        for own in each:
            if not own:
                owners.append(None)
                continue
            key = tuple(id(act) for act in own)
            if key not in names:
                names[key] = str(len(names))
                programs[names[key]] = operations(own, n_layers=self.n_layers)
            owners.append(names[key])
        return programs, owners

    def _run(
        self,
        batch: TokenBatch,
        programs: Mapping[str, Sequence[Operation]],
        owners: Sequence[str | None],
        *,
        max_new_tokens: int,
        adapter: str | Sequence[str | None] | None = None,
        temperature: float | None = None,
        seed: int = 0,
        logprobs: bool = False,
    ) -> _Ran:
        chosen = [adapter] * len(batch) if adapter is None or isinstance(adapter, str) else adapter
        if unknown := {one for one in chosen if one is not None} - set(self.adapters):
            raise ConfigError(
                f"no adapter is called {', '.join(sorted(unknown))}",
                f"there are: {', '.join(self.adapters) or 'none; name them in `adapters`'}",
            )
        ids = [row[mask].tolist() for row, mask in zip(batch.ids, batch.mask, strict=True)]
        longest = max(len(one) for one in ids) + max_new_tokens
        if max_new_tokens < 1 or longest > self.max_length:
            raise ConfigError(
                f"a prompt and its reply may take {longest} tokens, the engine holds "
                f"{self.max_length}; replies of {max_new_tokens} were asked for",
                "ask for at least 1 and fewer, or raise `max_length`",
            )
        rows = [
            {
                "ids": one,
                "program": owner,
                "adapter": lora,
                "temperature": temperature,
                "seed": seed + number,
            }
            for number, (one, owner, lora) in enumerate(zip(ids, owners, chosen, strict=True))
        ]
        specs: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, program in programs.items():
            specs[name], own = encode(program)
            tensors |= {f"{name}/{key}": value for key, value in own.items()}
        told = self._ask(
            {
                "do": "run",
                "rows": rows,
                "programs": specs,
                "max_new_tokens": max_new_tokens,
                "stop_ids": self.stop_ids,
                "logprobs": logprobs,
            },
            tensors,
        )
        written = told.head["rows"]
        if len(written) != len(rows):
            raise EngineError(
                f"{len(written)} replies came to {len(rows)} requests", "the log says more"
            )
        for name, program in programs.items():
            needed = {
                number: len(ids[number]) + len(written[number]["ids"]) - 1
                for number, owner in enumerate(owners)
                if owner == name
            }
            layers = sorted({layer for one in program for layer in one.layers})
            ranks = told.head["reports"].get(name, [])
            check_reached(ranks, needed, layers, n_ranks=self.tensor_parallel)
        self.spent = Spent(float(told.head["wall_s"]), float(told.head["cpu_s"]))
        return _Ran(written, told.head["reports"], told.tensors)

    def _completion(self, row: Mapping[str, Any]) -> Completion:
        ids = tuple(int(one) for one in row["ids"])
        finished = bool(row["finished"])
        if finished:
            ids = ids[:-1]
        text = self.template.tokenizer.decode(ids, skip_special_tokens=True)
        text = text.rpartition("</think>")[2].lstrip() if "</think>" in text else text
        return Completion(text, ids, finished)
