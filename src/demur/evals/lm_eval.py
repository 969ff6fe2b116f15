"""A bridge to lm-eval: any of its tasks, on a model under any edit or anchor; the extra `lm-eval`.

Plain runs agree with lm-eval's own `HFLM`. Where a chat template is applied, three things differ:
the text of a turn never writes control tokens, and white space around it is dropped, as everywhere
in demur; the prompts keep their named spans, which an anchor reads; and a line break at the end of
the template belongs to the prompt, where `HFLM` scores it as a part of every answer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demur.errors import ConfigError, DemurError, MissingExtraError, TemplateError
from demur.evals.likelihood import (
    Applied,
    Continuation,
    applying,
    likelihoods,
    messages_of,
    text_rows,
)
from demur.evals.rows import EvaluationRecord, ItemRow
from demur.evals.suites import Paired, deltas_of
from demur.interventions import Holder, Intervention
from demur.models import Conversation, Model, conversation_of
from demur.progress import Listener, Quiet

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as _error:
    raise MissingExtraError.needed(extra="lm-eval", module="lm_eval") from _error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

_MAX_GEN_TOKS = 256  # What lm-eval's own models take where a task names none.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature"}
# Said in some tasks, and without effect at these values.
_IDLE: dict[str, Any] = {"top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0, "top_k": 0}


@dataclass(frozen=True, slots=True)
class _Layout:
    """A context as messages: what the model's template lays out."""

    system: str | None
    chat: Conversation
    begun: str


class DemurLM(TemplateLM):
    """A model as lm-eval sees it, under whatever `inside` put in force.

        with applying(model, [Ablate(direction)]) as inside:
            results = lm_eval.simple_evaluate(DemurLM(inside), tasks=["arc_easy"])

    Attributes:
        inside: The model, and what is applied to it.
        batch_size: Most rows that are decoded together.
        opened: Contexts, and whether the gate of an anchor opened on them.
    """

    def __init__(
        self,
        inside: Applied,
        *,
        batch_size: int = 32,
        seed: int = 0,
        name: str = "plain",
        listener: Listener | None = None,
    ) -> None:
        super().__init__()
        model = inside.model
        self.inside, self.batch_size, self.seed, self.name = inside, batch_size, seed, name
        self.listener = listener or Quiet()
        self.opened: dict[str, bool] = {}
        self.tokenizer = inside.template().tokenizer
        self._layouts: dict[str, _Layout] = {}
        config = model.hf.config.get_text_config()
        limit = inside.template().max_length
        self.max_length: int = limit or getattr(config, "max_position_embeddings", None) or 2048

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        token = self.tokenizer.eos_token_id
        return int(token) if token is not None else self.inside.model.pad_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that has nothing in front of it."""
        token = self.tokenizer.bos_token_id
        return int(token) if token is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the layout in lm-eval's cache of requests."""
        return self.inside.template().hash

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any
    ) -> list[int]:
        """Token ids, with what the tokenizer begins every text with unless it is there already."""
        options: dict[str, Any] = {}
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        elif has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            options["add_special_tokens"] = False
        return list(self.tokenizer(string, **options)["input_ids"])

    # Chats ----------------------------------------------------------------------------------------

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The context as text; what it stands for is kept, so that its spans are known later.

        Raises:
            TemplateError: Messages do not go from user to user in turns.
        """
        del add_generation_prompt  # Said by whether the last message is the assistant's.
        system, turns, begun = messages_of(chat_history)
        if not any(str(one["content"]).strip() for one in turns):
            return begun  # Tasks that score whole texts ask nothing: what they score is no chat.
        chat = conversation_of(turns)
        batch = self.inside.template(system).encode([chat], pad_id=self.inside.model.pad_id)
        text = self.tokenizer.decode(batch.ids[0].tolist()) + begun
        self._layouts[text] = _Layout(system, chat, begun)
        return text

    def _layout(self, context: str) -> _Layout | None:
        """What a context stands for; None for a text that is no chat."""
        found = self._layouts.get(context)
        if found is None and self._layouts and context:
            # A task may write more behind what the template wrote: the beginning of the reply.
            for text, one in self._layouts.items():
                if context.startswith(text):
                    return _Layout(one.system, one.chat, one.begun + context[len(text) :])
        return found

    # What lm-eval asks for ------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of continuations, and whether greedy decoding writes them."""
        del disable_tqdm
        asked = [self._pair(*request.args) for request in requests]
        with self.listener.stage(f"likelihoods, {self.name}", len(asked)) as advance:
            found = likelihoods(self.inside, asked, progress=advance)
        for request, one in zip(requests, found, strict=True):
            if one.opened is not None:
                self._note(request.args[0], one.opened)
        return [(one.value, one.greedy) for one in found]

    def _note(self, context: str, opened: bool) -> None:
        self.opened[context] = opened or self.opened.get(context, False)

    def _pair(self, context: str, continuation: str) -> Continuation:
        layout = self._layout(context)
        if layout is not None:
            template = self.inside.template(layout.system)
            begun = tuple(template.reply_ids(layout.begun)) if layout.begun else ()
            tokens = template.reply_ids(continuation)
            return Continuation(begun, tuple(tokens), layout.chat, layout.system)
        if context:
            before, tokens = self._encode_pair(context, continuation)
        else:
            tokens = self.tok_encode(continuation, add_special_tokens=False)
            before = [self.prefix_token_id]
            if tokens[:1] == before:
                tokens = tokens[1:]
        return self._cut(before, tokens)

    def _cut(self, before: Sequence[int], tokens: Sequence[int]) -> Continuation:
        """Drop tokens from the left where a row is longer than the context."""
        if len(tokens) > self.max_length:
            raise TemplateError(
                f"a continuation has {len(tokens)} tokens, the context holds {self.max_length}",
                "leave that task out",
            )
        extra = max(0, len(before) + len(tokens) - (self.max_length + 1))
        return Continuation(tuple(before[extra:]), tuple(tokens))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The same for tokens, of texts that are no chats."""
        asked = [self._cut(before, tokens) for _, before, tokens in requests]
        return [(one.value, one.greedy) for one in likelihoods(self.inside, asked)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in disjoint windows as long as the context."""
        del disable_tqdm
        asked: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for before, tokens in map(make_disjoint_window, windows):
                asked.append(Continuation(tuple(before), tuple(tokens)))
                owners.append(number)
        sums = [0.0] * len(requests)
        with self.listener.stage(f"texts, {self.name}", len(asked)) as advance:
            for owner, one in zip(
                owners, likelihoods(self.inside, asked, progress=advance), strict=True
            ):
                sums[owner] += one.value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies, up to the first of the texts that end them."""
        del disable_tqdm
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            chat = self._layout(request.args[0])
            key = [request.args[1], chat is not None, chat.system if chat else None]
            groups.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(number)
        out = [""] * len(requests)
        with self.listener.stage(f"replies, {self.name}", len(requests)) as advance:
            for numbers in groups.values():
                own: list[Any] = [requests[number].args for number in numbers]
                for number, text in zip(numbers, self._written(own, advance), strict=True):
                    out[number] = text
        return out

    def _written(self, asked: Sequence[tuple[str, dict[str, Any]]], advance: Any) -> list[str]:
        model = self.inside.model
        options: dict[str, Any] = dict(normalize_gen_kwargs(asked[0][1], _MAX_GEN_TOKS))
        idle = {key for key, value in _IDLE.items() if options.get(key) == value}
        unknown = sorted(options.keys() - _KNOWN - idle)
        if unknown:
            raise ConfigError(
                f"a task asks to generate with {', '.join(f'`{one}`' for one in unknown)}",
                f"demur knows {', '.join(sorted(_KNOWN))}",
            )
        stops = [one for one in options["until"] if one]
        limit = int(options["max_gen_toks"])
        layouts = [self._layout(context) for context, _ in asked]
        chats = [one for one in layouts if one is not None]
        if chats:
            template = self.inside.template(chats[0].system)
            begun = [template.reply_ids(one.begun) if one.begun else [] for one in chats]
            batch = self.inside.rows([one.chat for one in chats], begun, chats[0].system)
        else:
            self.inside.needs_chat()
            room = self.max_length - limit
            if room < 1:
                raise ConfigError(
                    f"a task asks for {limit} new tokens, the context holds {self.max_length}",
                    "set `max_gen_toks` in the task's generation_kwargs",
                )
            rows = [
                (self.tok_encode(context) or [self.prefix_token_id])[-room:] for context, _ in asked
            ]
            batch = text_rows(model, rows)

        def ended(_numbers: list[int], texts: list[str]) -> list[bool]:
            return [any(stop in text for stop in stops) for text in texts]

        replies = model.generate(
            batch,
            max_new_tokens=limit,
            batch_size=self.batch_size,
            until=ended if stops else None,
            temperature=float(options["temperature"]) if options["do_sample"] else None,
            seed=self.seed,
            progress=advance,
        )
        for (context, _), opened in zip(asked, self.inside.openings(len(asked)), strict=True):
            if opened is not None:
                self._note(context, opened)
        return [_until(reply.text, stops) for reply in replies]


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, maxsplit=1)[0]
    return text


# The evaluation -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an intervention changes.

    Attributes:
        record: The deltas.
        items: Item by item.
    """

    record: EvaluationRecord
    items: tuple[ItemRow, ...]


def evaluate(
    model: Model,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    acts: Sequence[Intervention] = (),
    anchor: Holder | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool | None = None,
    include_path: Path | None = None,
    defaults: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    edits: Sequence[str] | None = None,
    anchor_file: str | None = None,
    borrowed: Sequence[str] = (),
    listener: Listener | None = None,
) -> Evaluation:
    """Run lm-eval's tasks twice over the same items, plainly and under an intervention.

    Args:
        model: The model.
        tasks: Names as lm-eval knows them, or configurations.
        acts: Edits, in order.
        anchor: Holds the model behind them.
        limit: Items of each task at most, from the first on.
        num_fewshot: Examples in front; None is what the task says.
        chat: Whether prompts are laid out by the chat template; None is where an anchor needs it.
        include_path: Folder of tasks of your own.
        defaults: Whether lm-eval's own tasks can be named too.
        batch_size: Most rows that are decoded together.
        seed: Of draws, and of the examples in front.
        edits: What the edits are called in the record.
        anchor_file: What the anchor is called in the record.
        borrowed: What the record says of edits or an anchor of another model.
        listener: Hears the progress.

    Raises:
        ConfigError: There is nothing to apply, no such task, or a plain text under an anchor.
        SilentEditError: An edit was never reached, or the gate has not read every prompt.
    """
    if not acts and anchor is None:
        raise ConfigError("there is nothing to compare with", "give an edit or an anchor")
    laid_out = anchor is not None if chat is None else chat
    listener = listener or Quiet()
    how: dict[str, Any] = {
        "tasks": tasks,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "chat": laid_out,
        "manager": _tasks(tasks, include_path, defaults=defaults, listener=listener),
        "seed": seed,
    }
    applied_acts = (*acts, *(() if anchor is None else (anchor,)))
    runs: list[tuple[dict[str, Any], DemurLM]] = []
    seconds: dict[str, float] = {}
    for name, own in (("plain", ()), ("edited", applied_acts)):
        began = time.perf_counter()
        with applying(model, own, cut=anchor is not None) as inside:
            lm = DemurLM(inside, batch_size=batch_size, seed=seed, name=name, listener=listener)
            runs.append((_run(lm, **how), lm))
        seconds[name] = round(time.perf_counter() - began, 2)
    (before, _), (after, held) = runs
    notes: list[str] = list(borrowed)
    paired = [
        one
        for task in before["samples"]
        for one in _paired(task, before["samples"][task], after["samples"][task], held, notes)
    ]
    deltas, items = deltas_of(paired, notes)
    assert model.template is not None
    names = edits if edits is not None else [type(act).__name__ for act in acts]
    from importlib.metadata import version

    return Evaluation(
        EvaluationRecord(
            demur=version("demur"),
            suite=f"lm-eval {version('lm-eval')}",
            model=model.name,
            adapter=model.adapter,
            fingerprint=model.fingerprint,
            dtype=str(model.dtype).removeprefix("torch."),
            template_hash=model.template.hash,
            edits=tuple(names),
            anchor=anchor_file if anchor_file is not None or anchor is None else "in memory",
            chat=laid_out,
            limit=limit,
            seed=seed,
            deltas=tuple(deltas),
            seconds=seconds,
            notes=tuple(notes),
        ),
        tuple(items),
    )


@contextmanager
def _calm() -> Iterator[None]:
    """Have lm-eval talk through demur's listener alone."""
    import logging

    # Its warnings name choices that demur made on purpose; its errors are raised.
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    before = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)


def _tasks(
    wanted: Sequence[str | Mapping[str, Any]],
    include_path: Path | None,
    *,
    defaults: bool,
    listener: Listener,
) -> Any:
    """What knows all tasks that are wanted; lm-eval's own are many, and are read if need be."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    names = [one for one in wanted if isinstance(one, str)]
    folder = None if include_path is None else str(include_path)
    with _calm(), listener.stage("tasks", 1) as advance:
        manager = TaskManager(include_path=folder, include_defaults=False)

        def missing() -> list[str]:
            return [one for one in names if not manager.match_tasks([one])]

        if defaults and (missing() or len(names) < len(wanted)):
            manager = TaskManager(include_path=folder)
        advance(1)
    for name in missing():
        near = get_close_matches(name, manager.all_tasks, n=1)
        raise ConfigError(
            f"lm-eval has no task called `{name}`",
            f"did you mean `{near[0]}`?"
            if near
            else "name a folder of your own tasks with `--include-path`",
        )
    return manager


def _run(
    lm: DemurLM,
    *,
    tasks: Sequence[str | Mapping[str, Any]],
    manager: Any,
    limit: int | None,
    num_fewshot: int | None,
    chat: bool,
    seed: int,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    run: Any = simple_evaluate
    with _calm():
        try:
            found = run(
                lm,
                tasks=[one if isinstance(one, str) else dict(one) for one in tasks],
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except DemurError:
            raise
        except (OSError, ConnectionError) as error:
            raise ConfigError(
                f"a task could not be loaded: {str(error).splitlines()[0][:300]}",
                "lm-eval's own tasks fetch their items from the hub; tasks of your own may read "
                "local files",
            ) from error
    assert found is not None
    return dict(found)


def _paired(
    task: str,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    held: DemurLM,
    notes: list[str],
) -> Iterator[Paired]:
    """Figures of one task, item by item."""

    def keyed(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
        return {(str(row["filter"]), str(row["doc_id"])): row for row in rows}

    first, second = keyed(before), keyed(after)
    if first.keys() != second.keys() or any(
        first[key]["doc_hash"] != second[key]["doc_hash"]
        or first[key]["prompt_hash"] != second[key]["prompt_hash"]
        for key in first
    ):
        raise ConfigError(
            f"{task} gave other items in its second run", "its configuration draws without a seed"
        )
    filters = list(dict.fromkeys(name for name, _ in first))
    for name in filters:
        keys = [key for key in first if key[0] == name]
        metrics = dict.fromkeys(metric for key in keys for metric in first[key]["metrics"])
        opened = [
            _opened(second[key], held) if held.inside.held is not None else None for key in keys
        ]
        for metric in metrics:
            sides = [
                [_number(rows[key].get(metric), metric) for key in keys] for rows in (first, second)
            ]
            flat = [value for side in sides for value in side if value is not None]
            if not flat:
                notes.append(f"{task}: `{metric}` has no number for each item, so it is not paired")
                continue
            share = all(value in (0.0, 1.0) for value in flat)
            unit = "share" if share else _UNITS.get(metric, "score")
            label = metric if len(filters) == 1 else f"{metric}, {name}"
            yield Paired(
                task, label, [item for _, item in keys], sides[0], sides[1], opened, unit=unit
            )


def _opened(row: Mapping[str, Any], held: DemurLM) -> bool:
    return any(held.opened.get(str(arguments[0]), False) for arguments in row["arguments"])


# Of a text these are kept as its log-probability and its length; what is paired is a text's own.
_UNITS = {
    "word_perplexity": "nats per word",
    "byte_perplexity": "nats per byte",
    "bits_per_byte": "bits per byte",
}


def _number(value: Any, metric: str) -> float | None:
    if isinstance(value, bool | int | float) or hasattr(value, "item"):
        number = float(value)
        return number if math.isfinite(number) else None
    if metric in _UNITS and isinstance(value, tuple | list) and len(value) == 2 and value[1]:
        nats = -float(value[0]) / float(value[1])
        return nats / math.log(2) if metric == "bits_per_byte" else nats
    return None
