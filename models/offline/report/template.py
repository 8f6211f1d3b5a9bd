"""Templates of pages: `base.html` is extended, its `base.css` comes before the page's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template


def page_template(path: Path, filters: Mapping[str, Callable[..., Any]]) -> Template:
    """A template that escapes everything and knows no undefined names.

    Args:
        path: of the template; its `<name>.css` stands beside it.
        filters: that it uses.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([path.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    environment.globals["own_style"] = path.with_suffix(".css").name
    return environment.get_template(path.name)
