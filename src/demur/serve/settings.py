"""What a server is told: limits, what clients may ask for, and who may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class ServeSettings(BaseModel):
    """Limits of a server and what it allows.

    Attributes:
        name: What clients call the model; None is the name that it was loaded by.
        batch: Most replies that are written together.
        cache_tokens: Most tokens whose keys and values are kept, padding counted.
        queue: Most replies that wait; beyond that requests are turned away.
        max_tokens: Most tokens of a reply, and the length of one that asks for none.
        max_choices: Most replies to one request, `n` times the prompts.
        max_messages: Most messages of a conversation.
        max_stops: Most stop strings.
        max_edits: Most edits of a request.
        timeout: Seconds from a request's arrival to its last token.
        shutdown: Seconds that accepted requests are given to finish when the server stops.
        requests: Most requests at a time, whatever they ask for; twice as many connections.
        body_bytes: Most bytes of a request.
        body_seconds: Seconds that a request's body may take to arrive, and that a client may leave
            a reply unread.
        head_seconds: Seconds that a request's headers may take to arrive.
        temperature: Of requests that name none; OpenAI's is 1.
        opt_out: Whether a request may go without the guard and the anchor, or with a weaker anchor.
        raw: Whether prompts without a chat template are taken even though a guard or an anchor is
            loaded: these read and act at the template's positions, so such a prompt goes without.
        edits: Whether a request may edit the loaded directions.
        trace: Whether a request may read activations.
        client_system: Whether clients may send system messages. The guard reads what users say,
            which a system message is no part of.
        on_flag: What becomes of a flagged request: its score is reported, or it is refused with
            `refusal` and the finish reason `content_filter`.
        refusal: What is said instead.
        key: Clients must name it; None lets everyone in.
        hosts: Values of the Host header that are answered, without ports; None answers all.
        log_prompts: Whether texts may stand in the log.
        runs: A folder of audits to show.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str | None = None
    batch: int = Field(default=16, ge=1)
    cache_tokens: int = Field(default=32768, ge=256)
    queue: int = Field(default=64, ge=1)
    max_tokens: int = Field(default=1024, ge=1)
    max_choices: int = Field(default=8, ge=1)
    max_messages: int = Field(default=128, ge=1)
    max_stops: int = Field(default=4, ge=1)
    max_edits: int = Field(default=8, ge=1)
    timeout: float = Field(default=300.0, gt=0)
    shutdown: float = Field(default=30.0, ge=0)
    requests: int = Field(default=512, ge=1)
    body_bytes: int = Field(default=1 << 20, ge=1024)
    body_seconds: float = Field(default=30.0, gt=0)
    head_seconds: float = Field(default=15.0, gt=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    opt_out: bool = False
    raw: bool = False
    edits: bool = True
    trace: bool = True
    client_system: bool = True
    on_flag: Literal["report", "refuse"] = "report"
    refusal: str = "I'm sorry, but I can't help with that."
    key: str | None = Field(default=None, min_length=1, repr=False)
    hosts: tuple[str, ...] | None = LOOPBACK
    log_prompts: bool = False
    runs: Path | None = None
