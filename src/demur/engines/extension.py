"""Inside vLLM's workers: programs at work through vllm-lens, and the count of what it took.

vllm-lens logs an error in a hook and goes on without it, for every request of the batch. So a
firing counts only once its dispatch for that layer has come back; what did not come back leaves a
gap, which whoever asked sees. Hooks are made here, from a closed list: none is sent.

Imported by vLLM alone, in an environment of its own.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import vllm_lens._worker_ext as plugin  # pyright: ignore[reportMissingImports]
from vllm_lens import Hook  # pyright: ignore[reportMissingImports]

from demur.engines.programs import Place, Program, decode
from demur.engines.wire import pack, unpack

ROW = "demur_row"
_Fired = tuple[Program, int, Place, int, bool]
_fired: list[_Fired] = []  # Of the dispatch that is under way; a worker is one thread.
_dispatch: Any = None


def _counted(extension: Any, layer: int, output: Any) -> Any:
    """The plug-in's dispatch for one layer; what fired counts once it has come back."""
    _fired.clear()
    try:
        changed = _dispatch(extension, layer, output)
    except Exception as error:
        # The plug-in now drops what every request of this batch was given at this layer, those
        # that fired before the error too: none of it is committed.
        if len(extension.demur_raised) < 8:
            extension.demur_raised.append(f"a hook at block {layer} raised {error!r}"[:400])
        raise
    for program, at, place, tokens, edits in _fired:
        if edits and changed is None:
            program.fault(place.row, f"the plug-in did not take an edit at block {layer}")
        else:
            program.commit(at, place, tokens)
    return changed


class Extension(plugin.HiddenStatesExtension):  # pyright: ignore[reportUntypedBaseClass]
    """What vLLM mixes into each of its workers; every method is called on all of them."""

    demur_programs: dict[str, Program] = {}  # noqa: RUF012 (each worker gets its own, below)
    demur_raised: list[str] = []  # noqa: RUF012

    def demur_install(self) -> str:
        """Install the hooks of the plug-in and our count of them; returns JSON about the model."""
        global _dispatch  # noqa: PLW0603 (the plug-in's dispatch is a global too)
        if _dispatch is None:
            _dispatch = plugin._hook_inner
            plugin._hook_inner = _counted
        self.demur_programs, self.demur_raised = {}, []
        self.install_hooks()
        config = self.model_config
        return json.dumps(
            {
                "n_layers": int(config.get_total_num_hidden_layers()),
                "d_model": int(config.get_hidden_size()),
                "vocabulary": int(config.get_vocab_size()),
                "rank": int(self.rank),
                "threads": torch.get_num_threads(),
            }
        )

    def demur_begin(self, key: str, spec: str, data: bytes) -> None:
        """Build a program of what was sent; requests that carry its key run under it."""
        config = self.model_config
        operations = decode(
            json.loads(spec),
            unpack(data),
            n_layers=int(config.get_total_num_hidden_layers()),
            d_model=int(config.get_hidden_size()),
        )
        program = Program(operations, reads=bool(self._should_capture))

        def fire(ctx: Any, x: Any) -> Any:
            place = self._demur_place(ctx)
            new = program.run(ctx.layer_idx, x, place)
            _fired.append((program, ctx.layer_idx, place, len(x), new is not None))
            return new

        self.demur_programs[key] = program
        self._hook_data[key] = [Hook(fn=fire, layer_indices=list(program.layers))]

    def demur_end(self, key: str) -> tuple[str, bytes]:
        """Forget a program; returns what it reached and read."""
        self._hook_data.pop(key, None)
        program = self.demur_programs.pop(key, None)
        self._hook_contexts.clear()
        raised = list(self.demur_raised)
        if not self.demur_programs:
            self.demur_raised.clear()
        if program is None:
            return json.dumps({"rows": {}, "raised": raised, "moments": {}}), b""
        head, tensors = program.moments()
        told = {"rows": program.report(), "raised": raised, "moments": head}
        return json.dumps(told), pack(tensors)

    def demur_cpu_s(self) -> float:
        """Seconds that all cores have spent on this rank."""
        return time.process_time()

    def _demur_place(self, ctx: Any) -> Place:
        """Which request a context belongs to, and where its slice begins."""
        request = ctx.saved.get("demur")
        if request is None:
            request = next(
                name
                for name, held in self._hook_contexts.items()
                if any(one is ctx for one in held.values())
            )
            ctx.saved["demur"] = request
        runner = self.model_runner
        state = runner.requests[request]
        batch = runner.input_batch
        return Place(
            row=int(state.sampling_params.extra_args[ROW]),
            n_prompt=int(state.num_prompt_tokens),
            start=int(batch.num_computed_tokens_cpu[batch.req_id_to_index[request]]),
        )
