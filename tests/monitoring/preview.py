"""Draws a dashboard's layout with a live Prometheus' data, for a person to judge.

It is not Grafana: no Grafana server was to be had.
"""

from __future__ import annotations

import math
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, DictLoader, Environment, PackageLoader
from markupsafe import Markup

from configs.units import format_count
from monitoring.charts import NOTHING, Band, Line, Mark, line_chart
from monitoring.formatting import format_seconds, percent
from tests.monitoring.dashboards import fill_in
from tests.monitoring.prometheus import Server

PAGE = Path(__file__).with_name("preview.html")


def preview(server: Server, board: dict[str, Any], run: str, seconds: float) -> str:
    """The dashboard as a page, over the last `seconds`."""
    environment = Environment(
        loader=ChoiceLoader([DictLoader({"preview": PAGE.read_text()}), PackageLoader("monitoring", "pages")]),
        autoescape=True,
    )
    marks = [mark for annotation in board["annotations"]["list"] for mark in _marks(server, annotation, run, seconds)]
    panels = [
        {
            "row": panel["type"] == "row",
            "title": panel["title"],
            "x": panel["gridPos"]["x"],
            "w": panel["gridPos"]["w"],
            "h": panel["gridPos"]["h"],
            "body": "" if panel["type"] == "row" else _body(server, panel, run, seconds, marks),
        }
        for panel in board["panels"]
    ]
    return environment.get_template("preview").render(title=board["title"], board=board, panels=panels)


def _body(server: Server, panel: dict[str, Any], run: str, seconds: float, marks: list[Mark]) -> Markup:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "stat":
        (target,) = panel["targets"]
        found = server.query(fill_in(target["expr"], run, "15s"))
        assert len(found) <= 1, f"{panel['title']}: {len(found)} values in one figure"
        if not found:
            return Markup('<div class="big quiet">No data</div>')
        series = found[0]
        name = panel["options"].get("textMode") == "name"
        decimals = panel["fieldConfig"]["defaults"].get("decimals")
        text = _legend(target, series) if name else _number(unit, decimals)(float(series["value"][1]))
        return Markup('<div class="big">{}</div>').format(text)
    if panel["type"] == "table":
        return _table(server, panel, run)
    if panel["type"] == "xychart":
        return _against(server, panel, run, seconds)
    drawn = [
        (target, series)
        for target in panel["targets"]
        for series in server.query_range(fill_in(target["expr"], run, "15s"), seconds)
    ]
    start = time.time() - seconds
    scale = 2**30 if unit == "bytes" else 1
    lines = [
        Line(
            _legend(target, series),
            [(float(t) - start, float(v) / scale) for t, v in series["values"]],
            f"c{index % 8}",
        )
        for index, (target, series) in enumerate(drawn)
    ]
    shown = [mark for mark in (Mark(mark.x - start, mark.kind, mark.label) for mark in marks) if mark.x >= 0]
    zero = panel["fieldConfig"]["defaults"].get("min") == 0
    width = panel["gridPos"]["w"] * 68
    chart = line_chart(
        panel["title"],
        lines,
        number=(lambda y: f"{y:g} GiB") if unit == "bytes" else _number(unit),
        x_name="seconds",
        marks=shown,
        bands=[Band(0, seconds, "", "")],  # all panels over the same time
        from_zero=zero,
        size=(width, 230),
    )
    return chart if chart == NOTHING else Markup("{}{}").format(chart, _keys(lines))


def _keys(lines: list[Line]) -> Markup:
    keys = Markup("").join(Markup('<span class="{}">{}</span>').format(line.color, line.name) for line in lines[:12])
    return Markup('<div class="keys">{}</div>').format(keys)


def _table(server: Server, panel: dict[str, Any], run: str) -> Markup:
    """As Grafana's transformations make it: `merge` joins the rows that share labels, `organize` chooses columns."""
    merge, organize = panel["transformations"]
    assert (merge["id"], organize["id"]) == ("merge", "organize")
    rows: list[dict[str, Any]] = []
    for target in panel["targets"]:
        for series in server.query(fill_in(target["expr"], run, "15s")):
            cells = series["metric"] | {f"Value #{target['refId']}": float(series["value"][1])}
            mates = [row for row in rows if all(row[key] == cells[key] for key in row.keys() & cells.keys())]
            for row in mates:
                row.update(cells)
            rows += [] if mates else [cells]
    options = organize["options"]
    found = {key for row in rows for key in row} - {key for key, hidden in options["excludeByName"].items() if hidden}
    order = sorted(found, key=lambda key: options["indexByName"].get(key, math.inf))
    names = [options["renameByName"].get(key, key) for key in order]
    units = {each["matcher"]["options"]: each["properties"][0]["value"] for each in panel["fieldConfig"]["overrides"]}

    def text(name: str, value: Any) -> str:
        return _number(units.get(name, "none"))(value) if isinstance(value, float) else value or ""

    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in names)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup("<td>{}</td>").format(text(name, row.get(key))) for name, key in zip(names, order, strict=True)
            )
        )
        for row in rows
    )
    return Markup("<table><tr>{}</tr>{}</table>").format(head, body)


def _against(server: Server, panel: dict[str, Any], run: str, seconds: float) -> Markup:
    x, y = (
        {
            f"{s['metric']['run']} {s['metric']['id']}": dict(s["values"])
            for s in server.query_range(fill_in(t["expr"], run, "15s"), seconds)
        }
        for t in panel["targets"]
    )
    lines = [
        Line(name, [(float(x[name][t]), float(v)) for t, v in y[name].items() if t in x[name]], f"c{index}")
        for index, name in enumerate(y)
    ]
    size = (panel["gridPos"]["w"] * 68, 250)
    chart = line_chart(panel["title"], lines, number=_number("none"), x_name="tokens", x_number=format_count, size=size)
    return Markup("{}{}").format(chart, _keys(lines))


def _marks(server: Server, annotation: dict[str, Any], run: str, seconds: float) -> list[Mark]:
    kind = "fault" if annotation["iconColor"] == "red" else "switch"
    found = server.query_range(fill_in(annotation["expr"], run, "3s"), seconds) if annotation["enable"] else []
    marks = []
    for series in found:
        times = [float(value[0]) for value in series["values"]]
        marks += [Mark(b, kind, annotation["name"]) for a, b in pairwise([-math.inf, *times]) if b - a > 1]
    return marks


def _legend(target: dict[str, Any], series: dict[str, Any]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: series["metric"].get(match[1], ""), target["legendFormat"])


def _number(unit: str, decimals: int | None = None) -> Any:
    def plain(value: float) -> str:
        if not math.isfinite(value):
            return "-"
        return {
            "percentunit": percent,
            "s": lambda v: (
                format_seconds(v) if v >= 60 else f"{v:.3g} s" if decimals is None else f"{v:.{decimals}f} s"
            ),
            "bytes": lambda v: f"{v / 2**30:.3g} GiB",
            "short": format_count,
        }.get(unit, lambda v: f"{v:.4g}" if decimals is None else f"{v:.{decimals}f}")(value)

    return plain
