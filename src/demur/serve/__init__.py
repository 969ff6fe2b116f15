"""A server that speaks OpenAI's protocol, with guard, anchor and edits; the extra `serve`.

`demur.serve.app` and `demur.serve.run` need the extra; the engine that writes replies does not.
"""

from demur.serve.edits import EDIT_KINDS, Edit
from demur.serve.engine import Engine, Event, Job, Reply
from demur.serve.settings import ServeSettings

__all__ = ["EDIT_KINDS", "Edit", "Engine", "Event", "Job", "Reply", "ServeSettings"]
