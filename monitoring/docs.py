"""Writes the generated tables of docs/monitoring.md: `python -m monitoring.docs`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from configs.files import write_atomically
from monitoring.events import EVENT_TYPES, Event
from monitoring.metrics import METRICS, Metric

PAGE = Path(__file__).parents[1] / "docs" / "monitoring.md"


def metrics_table(metrics: Sequence[Metric] = METRICS) -> str:
    """Describe every metric in one row of a Markdown table."""
    rows = ["| metric | type | unit | labels | meaning |", "|---|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels) + " and others" * bool(metric.free_labels)
        rows.append(f"| `{metric.name}` | {metric.type} | {metric.unit} | {labels} | {metric.help} |")
    return "\n".join(rows)


def events_table(events: Sequence[type[Event]] = EVENT_TYPES) -> str:
    """Describe every kind of event in one row of a Markdown table."""
    rows = ["| event | fields | meaning |", "|---|---|---|"]
    for event in events:
        names = ", ".join(f"`{field.name}`" for field in fields(event))
        rows.append(f"| `{event.KIND}` | {names} | {inspect.getdoc(event)} |")
    return "\n".join(rows)


def with_tables(page: str) -> str:
    """Write both tables between their markers in a page."""
    for name, table in (("metrics", metrics_table()), ("events", events_table())):
        start, end = f"<!-- {name}: written by python -m monitoring.docs -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        page = before + start + table + end + rest.partition(end)[2]
    return page


def main() -> None:
    """Write the page again."""
    write_atomically(PAGE, with_tables(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
