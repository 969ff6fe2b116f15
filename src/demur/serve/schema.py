"""Requests and replies as OpenAI's clients write and read them, and what is added to them."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from demur.serve.edits import At
from demur.serve.trace import Null, SpanName

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=1 << 20)]
_Token = Annotated[int, Field(ge=0, lt=1 << 31)]
_T = TypeVar("_T")
# A body of 1 MB can hold 200,000 empty objects: listing what is wrong with each takes seconds, in
# which nobody is served. The limits that count are the server's settings, and lower.
_Few = Annotated[tuple[_T, ...], Field(max_length=4096, fail_fast=True)]
_Ids = Annotated[tuple[_Token, ...], Field(max_length=1 << 20, fail_fast=True)]
MOST_SCORES = 20  # Likeliest tokens that are told beside each.


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Tolerant(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class EditRequest(_Request):
    """What is done to a loaded direction in this request's rows; see `GET /demur/info`.

    Of `ablate`, `strength` is the share that is taken out; of `add` it counts in lengths of the
    direction; of `clamp` it is the coordinate that is held, in the same lengths; of `anchor` it is
    the anchor's. `layers` are the first and last block.
    """

    kind: Literal["ablate", "add", "clamp", "anchor"]
    direction: str | None = None
    strength: Annotated[float, Field(allow_inf_nan=False, ge=-1000, le=1000)] | None = None
    layers: tuple[int, int] | None = None
    at: At = "all"


class DemurRequest(_Request):
    """What goes beyond OpenAI's parameters. Left out, guard and anchor are on where loaded."""

    edits: _Few[EditRequest] = ()
    guard: bool | None = None
    anchor: bool | None = None
    trace: bool = Field(default=False, description="Also return the reply's token ids.")


class CompletionDemurRequest(DemurRequest):
    """The same of completions."""

    template: bool = Field(
        default=False,
        description="Lay each prompt out as one user message, which guard and anchor can read.",
    )


class StreamOptions(_Request):
    """Of a streamed reply."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ContentPart(_Tolerant):
    """A part of a message; only text is understood."""

    type: str
    text: _Text | None = None


class Message(_Tolerant):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: _Text | _Few[ContentPart] | None = None
    name: str | None = None
    tool_calls: tuple[Any, ...] | None = None
    function_call: Any = None


class _Common(_Request):
    """Parameters of both kinds of completions.

    Parameters without effect on the text are taken and ignored; those that have one and are not
    supported are refused unless they are at their defaults.
    """

    model: str
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | _Few[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Without effect on the text.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # Not supported.
    frequency_penalty: _Number | None = None
    presence_penalty: _Number | None = None
    logit_bias: dict[str, _Number] | None = None


class ChatRequest(_Common):
    """`POST /v1/chat/completions`."""

    messages: _Few[Message]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_SCORES)] | None = None
    demur: DemurRequest | None = None
    parallel_tool_calls: bool | None = None
    # Not supported.
    tools: tuple[Any, ...] | None = None
    tool_choice: Any = None
    functions: tuple[Any, ...] | None = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None
    modalities: tuple[str, ...] | None = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None


class CompletionRequest(_Common):
    """`POST /v1/completions`. Prompts are text as it stands; no chat template lays them out.

    A prompt is text or token ids. Text that spells a control token stays text, and ids of control
    tokens are refused, but for a first one that begins or ends texts.
    """

    prompt: _Text | _Few[_Text] | _Ids | _Few[_Ids]
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="16 where left out; 0, with `echo`, only scores the prompt."
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_SCORES)] | None = None
    echo: bool | None = None
    demur: CompletionDemurRequest | None = None
    # Not supported.
    best_of: int | None = None
    suffix: str | None = None


class TraceRequest(_Request):
    """`POST /demur/trace`: read a conversation along a direction."""

    messages: _Few[Message]
    reply: _Text | None = None
    direction: str
    edits: _Few[EditRequest] = ()
    anchor: bool | None = Field(
        default=None,
        description="Whether the anchor acts while the row is read; it does if left out.",
    )
    null: Null = "covariance"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


# Replies ------------------------------------------------------------------------------------------


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """Any reply but one of status 200."""

    error: ErrorBody


class GuardReply(BaseModel):
    """What the guard says of the request; nats, and each read in standard deviations."""

    score: float
    threshold: float
    flagged: bool
    by: str
    reads: dict[str, float | None]


class AnchorReply(BaseModel):
    """What the anchor's gate made of the request."""

    gate: Literal["open", "shut", "none"]
    opened_at: int | None = None
    by: str | None = None
    score: float | None = None
    threshold: float | None = None
    begun_anew: int = 0


class EditReply(BaseModel):
    """An edit, and how often it acted, over all sites and tokens of the pass."""

    direction: str
    kind: str
    strength: float
    layers: tuple[int, int] | None
    at: str
    applied: int


class DemurReply(BaseModel):
    """What goes beyond OpenAI's fields, for the first choice; `choices` has all of them."""

    guard: GuardReply | None = None
    anchor: AnchorReply
    edits: list[EditReply] = []
    seed: int | None = Field(default=None, description="Of the draws; None of a greedy reply.")
    ids: list[int] | None = None
    template: bool = Field(
        default=True,
        description="Whether the chat template laid the prompt out; a raw one is not guarded.",
    )


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ReplyMessage(BaseModel):
    """The message of a reply."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class TopLogprob(BaseModel):
    """A token and the logarithm of its probability.

    A part of a character is spelled as the vocabulary does, and has no bytes.
    """

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """The same of a token that was written, with the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of all tokens that were written, those of thinking that the text leaves out too.

    By the softmax of the logits, whatever the temperature.
    """

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """The same of completions: side by side, with `echo` from the prompt's first token on.

    That one has none. The token that ended a text is among them, and no part of the text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChatChoice(BaseModel):
    """One of the replies."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"]
    demur: DemurReply


class ChatReply(BaseModel):
    """A whole reply; streamed ones come as `chat.completion.chunk` events."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    demur: DemurReply


class TextChoice(BaseModel):
    """One of the texts."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"]
    demur: DemurReply


class CompletionReply(BaseModel):
    """Whole texts; streamed ones come as `text_completion` events."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str
    demur: DemurReply


class ModelReply(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "demur"


class ModelsReply(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelReply]


class HealthReply(BaseModel):
    """Whether requests are taken, and whether by what was made on another model."""

    status: Literal["ok", "stopping"]
    borrowed: bool = False


class TokenReply(BaseModel):
    """A token of a traced conversation."""

    text: str
    span: SpanName
    t_inst: bool


class NullReply(BaseModel):
    """What random directions of norm 1 give on the same tokens: 5th to 95th percentile by site."""

    kind: Null
    seed: int
    low: list[float]
    high: list[float]


class TraceReply(BaseModel):
    """Projections on a direction, in residual-stream units, by site and token."""

    direction: str
    site: str
    norm: float
    anchor: AnchorReply = Field(
        description="Its gate; `opened_at` counts tokens of the reply that was given."
    )
    tokens: list[TokenReply]
    sites: list[str]
    values: list[list[float]]
    null: NullReply


class DirectionReply(BaseModel):
    """A loaded direction."""

    name: str
    site: str
    position: int
    norm: float
    recipe: str


class InfoReply(BaseModel):
    """What is served, and what a request may ask for."""

    model: str
    loaded: str
    fingerprint: str
    borrowed: list[str]
    family: str
    layers: int
    d_model: int
    dtype: str
    template: dict[str, Any]
    directions: list[DirectionReply]
    edit_kinds: list[str]
    at: list[str]
    guard: dict[str, Any] | None
    anchor: dict[str, Any] | None
    limits: dict[str, Any]
    runs: bool


class RunReply(BaseModel):
    """An audit's folder."""

    name: str
    when: str
    verdict: str
    report: bool


class RunsReply(BaseModel):
    """The audits' folders, newest first."""

    runs: list[RunReply]
