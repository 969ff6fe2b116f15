import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 5


def test_every_command_in_it_exists():
    from typer.main import get_command

    from demur.cli import app

    root = get_command(app)
    lines = re.findall(r"^\$ demur (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    assert lines
    for line in lines:
        command = root
        for word in line.split():
            if not hasattr(command, "commands"):
                break
            assert word in command.commands, line
            command = command.commands[word]
        options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        for flag in re.findall(r"--[a-z-]+", line):
            assert flag in options, line


def test_every_page_it_links_to_exists():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
