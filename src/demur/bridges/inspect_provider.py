"""A model of demur's as inspect-ai asks it: `inspect eval task.py --model demur/smollm2`.

Model arguments (`-M name=value`) say what is applied: `direction`, `edit`, `strength` and `site` as
for `demur evaluate`; `anchor`; `any_model`; `in_two` for a plain run that one behind an anchor is
compared with, so that rounding is no change; and `adapter`, `revision`, `dtype`, `device`, `system`
and `thinking` as for `demur.load`.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from inspect_ai.model import (  # pyright: ignore[reportMissingImports]
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo  # pyright: ignore[reportMissingImports]

from demur.anchor import load_anchor
from demur.errors import ConfigError
from demur.evals.acts import EditSpec
from demur.evals.likelihood import applying, messages_of
from demur.interventions import Holder, Intervention
from demur.models import Completion, Conversation, conversation_of, load

_LOAD = ("adapter", "revision", "dtype", "device", "system", "thinking", "trust_remote_code")
_OWN = ("direction", "edit", "strength", "site", "anchor", "any_model", "in_two")
_MAX_TOKENS = 256
_GATHER = 0.02  # Seconds in which requests join a batch.
# What changes replies; that demur does not know one of these must not pass unseen.
_UNKNOWN = (
    "top_p", "top_k", "frequency_penalty", "presence_penalty", "logit_bias", "num_choices",
    "logprobs", "response_schema", "best_of",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class _Asked:
    """A request that waits for its reply."""

    system: str | None
    chat: Conversation
    begun: str
    config: GenerateConfig
    reply: Completion | None = None
    opened: bool | None = None
    n_prompt: int = 0
    seconds: float = 0.0
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.reply is not None or self.error is not None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests of one kind are decoded together."""
        c = self.config
        return (self.system, c.max_tokens, c.temperature, c.seed, tuple(c.stop_seqs or ()))


class DemurAPI(ModelAPI):
    """Replies under an edit or an anchor, greedily unless a temperature is given.

    Every batch is written inside `demur.applied`, which fails if an edit was never reached, and
    under an anchor each request must have been read by its gate. Whether it opened stands in the
    metadata of the output, under `demur`.

    Attributes:
        model: The model.
        acts: What is applied, in order.
        cut: Whether what stands behind the instruction is a pass of its own.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (inspect-ai's own default)
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        unknown = sorted(model_args.keys() - {*_LOAD, *_OWN})
        if unknown:
            raise ConfigError(
                f"the provider knows no argument `{unknown[0]}`",
                f"there are: {', '.join((*_OWN, *_LOAD))}",
            )
        given = {key: value for key, value in model_args.items() if value is not None}
        own = {key: given.pop(key) for key in _OWN if key in given}
        if "direction" not in own and own.keys() & {"edit", "strength", "site"}:
            raise ConfigError("an edit names no direction", "give `-M direction=FILE`")
        spec = None
        if "direction" in own:
            strength = own.get("strength")
            spec = EditSpec(
                Path(str(own["direction"])),
                own.get("edit", "ablate"),
                None if strength is None else float(strength),
                own.get("site"),
            )
        any_model = bool(own.get("any_model", False))
        if given.get("adapter") == "none":
            given["adapter"] = None
        self.model = load(model_name, **given)
        acts: list[Intervention | Holder] = []
        self.edits: list[str] = []
        self.borrowed: list[str] = []
        if spec is not None:
            acts.append(spec.act(self.model, any_model=any_model))
            self.borrowed += spec.borrowed(self.model)
            self.edits.append(str(spec))
        if "anchor" in own:
            path = Path(str(own["anchor"]))
            anchor = load_anchor(path, self.model, any_model=any_model)
            acts.append(anchor)
            self.edits.append(f"anchor {path.name}")
            self.borrowed += anchor.borrowed(self.model)
        self.acts = tuple(acts)
        self.cut = bool(own.get("in_two", False))
        self._waiting: list[_Asked] = []
        self._turn: anyio.Lock | None = None
        self._times: Counter[str] = Counter()

    def max_tokens(self) -> int | None:
        """Where a task says nothing."""
        return _MAX_TOKENS

    def max_connections(self) -> int:
        """As many requests are decoded together."""
        return 32

    def connection_key(self) -> str:
        """Requests of one loaded model wait for each other."""
        return f"demur {id(self)}"

    def collapse_user_messages(self) -> bool:
        """Turns alternate."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """Turns alternate."""
        return True

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Reply to a conversation.

        Raises:
            ConfigError: Tools are given, or a setting that demur does not know.
            TemplateError: Messages do not go from user to user in turns.
            SilentEditError: An edit was never reached, or the gate has not read the request.
        """
        del tool_choice
        if tools:
            raise ConfigError("demur's models call no tools", "take a task without tools")
        # At these values nothing is asked for.
        idle: dict[str, Any] = {"top_p": 1.0, "num_choices": 1, "logprobs": False, "best_of": 1}
        unknown = [
            name
            for name in _UNKNOWN
            if (value := getattr(config, name, None)) is not None and idle.get(name) != value
        ]
        if unknown:
            raise ConfigError(
                f"demur's models know no {', '.join(f'`{name}`' for name in unknown)}",
                "there are max_tokens, temperature, seed and stop_seqs",
            )
        system, turns, begun = messages_of(
            [{"role": one.role, "content": one.text} for one in input]
        )
        asked = _Asked(system, conversation_of(turns), begun, config)
        self._waiting.append(asked)
        if self._turn is None:
            self._turn = anyio.Lock()
        async with self._turn:
            if not asked.done:
                await anyio.sleep(_GATHER)
                alike = [one for one in self._waiting if one.kind == asked.kind]
                batch = alike[: config.max_connections or self.max_connections()]
                if asked not in batch:
                    batch[-1] = asked
                self._waiting = [one for one in self._waiting if one not in batch]
                # Not to be abandoned: edits are in force until the thread is through.
                await anyio.to_thread.run_sync(partial(self._write, batch))
        if asked.error is not None:
            raise asked.error
        return self._output(asked)

    def _write(self, batch: Sequence[_Asked]) -> None:
        began = time.perf_counter()
        try:
            config = batch[0].config
            if config.temperature:
                # Alone, so that what is drawn does not hang on which requests came together.
                for one in batch:
                    self._reply([one], seed=self._seed(one))
            else:
                self._reply(batch, seed=0)
        except Exception as error:
            for one in batch:
                one.error = error
        for one in batch:
            one.seconds = time.perf_counter() - began

    def _seed(self, asked: _Asked) -> int:
        """With a seed given, a prompt always gets the same reply; without, each time another."""
        text = f"{asked.config.seed} {asked.system} {asked.chat} {asked.begun}"
        if asked.config.seed is None:
            self._times[text] += 1
        digest = hashlib.blake2b(f"{text} {self._times[text]}".encode(), digest_size=4).digest()
        return int.from_bytes(digest)

    def _reply(self, batch: Sequence[_Asked], *, seed: int) -> None:
        config = batch[0].config
        stops = [stop for stop in config.stop_seqs or () if stop]
        with applying(self.model, self.acts, likelihood=False, cut=self.cut) as inside:
            template = inside.template(batch[0].system)
            begun = [template.reply_ids(one.begun) if one.begun else [] for one in batch]
            rows = inside.rows([one.chat for one in batch], begun, batch[0].system)
            replies = self.model.generate(
                rows,
                max_new_tokens=config.max_tokens or _MAX_TOKENS,
                batch_size=len(batch),
                until=(lambda _numbers, texts: [any(s in t for s in stops) for t in texts])
                if stops
                else None,
                temperature=config.temperature or None,
                seed=seed,
            )
            opened = inside.openings(len(batch))
        for one, reply, gate, length in zip(
            batch, replies, opened, rows.mask.sum(1).tolist(), strict=True
        ):
            one.reply, one.opened, one.n_prompt = reply, gate, int(length)

    def _output(self, asked: _Asked) -> ModelOutput:
        reply = asked.reply
        assert reply is not None
        text, stopped = reply.text, reply.finished
        for stop in asked.config.stop_seqs or ():
            if stop and stop in text:
                text, stopped = text.split(stop)[0], True
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        about: dict[str, Any] = {"edits": self.edits, "begun_anew": reply.begun_anew}
        if self.borrowed:
            about["borrowed"] = self.borrowed
        if asked.opened is not None:
            about["gate_opened"] = asked.opened
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=message, stop_reason="stop" if stopped else "max_tokens"
                )
            ],
            usage=ModelUsage(
                input_tokens=asked.n_prompt,
                output_tokens=len(reply.ids),
                total_tokens=asked.n_prompt + len(reply.ids),
            ),
            time=asked.seconds,
            metadata={"demur": about},
        )
