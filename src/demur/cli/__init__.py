"""The command line: parse, call one library function, show what it returns.

Data go to standard output, talk to standard error. Nothing heavy is imported before a command
needs it, so that `--help` answers at once. A command is a function in a module of its own, and
takes its place in `demur --help` here.

Exit codes: 0 done; 1 the audit found no usable direction, or a check failed; 2 something that the
user can mend; 3 a fault of demur's; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from demur.cli import (
    anchor,
    audit,
    compare,
    doctor,
    em,
    evaluate,
    export,
    features,
    generate,
    guard,
    harden,
    hydra,
    models,
    organism,
    prompts,
    separate,
    serve,
    sweep,
    talk,
)
from demur.cli.program import app

for _command in (
    audit.audit,
    separate.separate,
    audit.report,
    generate.generate,
    anchor.attack,
    evaluate.evaluate,
    harden.harden,
    compare.compare,
    hydra.hydra,
    sweep.sweep,
    serve.serve,
    doctor.doctor,
):
    app.command()(_command)
app.command("export")(export.export)
app.command("import")(export.import_)
for _group, _commands in (
    ("models", models.app),
    ("prompts", prompts.app),
    ("organism", organism.app),
    ("guard", guard.app),
    ("anchor", anchor.app),
    ("em", em.app),
    ("features", features.app),
):
    app.add_typer(_commands, name=_group)


def main() -> NoReturn:
    """The `demur` program."""
    code: int | str | None = talk.FAULT
    try:
        app(prog_name="demur")
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        talk.say("\ninterrupted")
        code = talk.INTERRUPTED
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader left, and the interpreter would complain while it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = talk.PIPE_CLOSED
    sys.exit(code)
