"""The examples, run for real, cell by cell as a notebook would run them."""

import ast
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from demur.models import Completion

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("audit", "anchor", "compare")
MARK = "# %%"


def cells(name):
    """Source of each cell, with empty lines before it so that errors name the right line."""
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    starts = [0, *(i for i, line in enumerate(lines) if line.startswith(MARK)), len(lines)]
    return ["\n" * a + "\n".join(lines[a:b]) for a, b in pairwise(starts)]


def shown(value):
    """What a notebook makes of a cell's value."""
    for name in ("_repr_html_", "_repr_mimebundle_"):
        if hasattr(value, name):
            found = getattr(value, name)()
            return found if isinstance(found, str) else str(found)
    return repr(value)


@pytest.mark.parametrize("name", NAMES)
def test_cells_hide_nothing_in_functions(name):
    every = cells(name)
    assert len(every) > 6
    for source in every[1:]:
        assert source.strip().startswith(f"{MARK} ")  # A heading.
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    hiding = ast.FunctionDef | ast.ClassDef | ast.Lambda
    assert not [node for node in ast.walk(tree) if isinstance(node, hiding)]
    assert "--quick" in (ast.get_docstring(tree) or "")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs(name, tmp_path, monkeypatch, capsys):
    # `-f` is what a notebook's kernel is started with.
    monkeypatch.setattr(sys, "argv", [name, "-f", "k.json", "--quick", "--out", str(tmp_path)])
    space = {"__name__": "__main__"}
    said, tables = [], 0
    for source in cells(name):
        tree = ast.parse(source, filename=f"{name}.py")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{name}.py", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"{name}.py", "eval"), space)
            if value is not None:
                said.append(shown(value))
                tables += "<table" in said[-1]
        for text in replies(space):
            assert text not in "".join(said)
    out = capsys.readouterr().out
    assert "prove nothing" in out
    assert "n=" in out
    assert "[" in out
    for text in replies(space):
        assert text not in out
    assert tables
    drawn = list(tmp_path.glob("*.svg"))
    assert drawn
    for path in drawn:
        assert path.read_text(encoding="utf-8").startswith("<svg")
    for path in tmp_path.glob("*.html"):
        assert "cdn.jsdelivr.net" not in path.read_text(encoding="utf-8")[:2000]


def replies(space):
    """Texts of replies that a cell left behind, long enough to be told from other text."""
    lists = [value for value in space.values() if isinstance(value, list)]
    texts = [one.text.strip() for own in lists for one in own if isinstance(one, Completion)]
    return [text for text in texts if len(text) > 20]
