"""A page of HTML from a template of this package, written whole or not at all."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from demur.errors import StoreError
from demur.report import words
from demur.store import atomic_write


def write_page(page: str, path: Path) -> Path:
    """Write a page, whole or not at all.

    Raises:
        StoreError: It cannot be written.
    """
    if not path.parent.is_dir():  # More likely misspelt than wanted.
        raise StoreError(
            f"{path} cannot be written: there is no folder {path.parent}",
            "name another file with `--out`",
        )
    atomic_write(path, page)
    return path


def rendered(template: str, **values: Any) -> str:
    """A template of this package, with the page's style and filters; undefined names raise."""
    environment = Environment(
        loader=PackageLoader("demur.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_final,
    )
    environment.globals["missing"] = words.NOT_MEASURED
    environment.filters.update(
        estimate=words.estimate,
        number=words.number,
        token=words.token,
        p=words.p_value,
        percent=words.percent,
    )
    style = files("demur.report").joinpath("templates", "report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(style=Markup(style), **values)


def _final(value: Any) -> Any:
    """What every `{{ }}` prints: hostile text made visible, nothing measured said so."""
    if value is None:
        return words.NOT_MEASURED
    if isinstance(value, str) and not isinstance(value, Markup):
        return words.readable(value)
    return value
