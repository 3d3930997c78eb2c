"""HTML pages in the one style of the reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from monitoring.charts import Line


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    title: str
    chart: Markup
    note: str = ""
    keys: Sequence[Line] = ()
    """Lines that the caption names."""
    wide: bool = False


def render(template: str, *, package: str = "monitoring", **values: Any) -> str:
    """Render a page. Every value is escaped unless it is Markup.

    Args:
        template: File name in the folder `pages` of the package, or of `monitoring`.
        package: Package whose `pages` are searched first.
        values: Variables of the template, which also gets `written` (the program and the time).
    """
    loaders = [PackageLoader(name, "pages") for name in dict.fromkeys([package, "monitoring"])]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    written = f"detour-train {version('detour-train')} on {datetime.now(UTC):%-d %B %Y, %H:%M} UTC"
    return environment.get_template(template).render(written=written, **values)
