"""The kinds of panels in Grafana's JSON. Each has a unit, a legend, a description, thresholds and the datasource."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from monitoring.metrics import Query, Steps

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
"""The datasource that the user of the dashboard chooses."""
LEGEND: Json = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
MERGE: Json = {"id": "merge", "options": {}}


def row(title: str) -> Json:
    """A heading; the panels after it belong to it."""
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": 24, "h": 1}}


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    thresholds: Steps = (),
    low: float | None = None,
    high: float | None = None,
) -> Json:
    """Lines over time."""
    targets = [
        _target(*query, letter) | {"instant": False, "range": True}
        for letter, query in zip(ascii_uppercase, queries, strict=False)
    ]
    options = {"legend": LEGEND, "tooltip": {"mode": "multi", "sort": "asc"}}
    panel = _panel("timeseries", title, description, unit, (width, 8), targets, options, thresholds)
    panel["fieldConfig"]["defaults"] |= {
        key: value for key, value in (("min", low), ("max", high)) if value is not None
    } | {
        "custom": {
            "thresholdsStyle": {"mode": "dashed" if thresholds else "off"},
            "lineWidth": 2,
            "fillOpacity": 4,
            "showPoints": "never",
        }
    }
    return panel


def figure(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    width: int = 4,
    thresholds: Steps = (),
    decimals: int | None = None,
    by_name: bool = False,
) -> Json:
    """The value now in large type, or the legend of the series with `by_name`.

    The query is an instant one, because a range would add the value of an earlier phase.
    """
    options = {
        "graphMode": "none",
        "colorMode": "value",
        "justifyMode": "auto",
        "textMode": "name" if by_name else "value",
        "wideLayout": True,
        "reduceOptions": {"calcs": ["lastNotNull"]},
        "orientation": "auto",
    }
    targets = [_target(*query, "A") | {"instant": True, "range": False}]
    panel = _panel("stat", title, description, unit, (width, 4), targets, options, thresholds)
    panel["fieldConfig"]["defaults"] |= {} if decimals is None else {"decimals": decimals}
    return panel


def ranking(
    title: str,
    description: str,
    labels: dict[str, str],
    columns: dict[str, tuple[str, str]],
    *,
    describing: str | None = None,
    width: int = 24,
) -> Json:
    """A table with one row per combination of labels.

    Args:
        title: Title of the panel.
        description: Text behind the panel's information mark.
        labels: Name of the column of each label.
        columns: PromQL and unit of each column of numbers.
        describing: PromQL whose labels are shown and whose value is not.
        width: Of 24 columns.
    """
    queries = [expression for expression, _ in columns.values()] + ([describing] if describing else [])
    letters = dict(zip([*columns, *([""] if describing else [])], ascii_uppercase, strict=False))
    order = [*labels, *(f"Value #{letters[name]}" for name in columns)]
    targets = [
        _target(expression, "{{run}} {{id}}", letter) | {"instant": True, "range": False, "format": "table"}
        for expression, letter in zip(queries, letters.values(), strict=True)
    ]
    hidden = ["Time", *([f"Value #{letters['']}"] if describing else [])]
    organize = {
        "excludeByName": dict.fromkeys(hidden, True),
        "indexByName": {name: index for index, name in enumerate(order)},
        "renameByName": labels | {f"Value #{letters[name]}": name for name in columns},
    }
    panel = _panel("table", title, description, "short", (width, 8), targets)
    panel["transformations"] = [MERGE, {"id": "organize", "options": organize}]
    units = [_unit_of(name, unit) for name, (_, unit) in columns.items()]
    panel["fieldConfig"]["overrides"] = [*units, _link_of(labels["run"], labels["id"])]
    return panel


def against(
    title: str, description: str, unit: str, y: str, x: str, x_name: str, by: Sequence[str], width: int = 12
) -> Json:
    """One curve per value of the labels `by`: PromQL `y` over PromQL `x`, both with these labels alone."""
    targets = [
        _target(expression, " ".join("{{" + label + "}}" for label in by), letter) | {"format": "table"}
        for letter, expression in (("X", x), ("Y", y))
    ]
    organize = {"excludeByName": {"Time": True}, "renameByName": {"Value #X": x_name, "Value #Y": title}}
    partition = {"fields": list(by), "naming": {"asLabels": True}, "keepFields": False}
    options = {"mapping": "auto", "legend": LEGEND, "tooltip": {"mode": "single", "sort": "asc"}, "series": []}
    panel = _panel("xychart", title, description, unit, (width, 9), targets, options)
    panel["transformations"] = [
        MERGE,
        {"id": "organize", "options": organize},
        {"id": "partitionByValues", "options": partition},
    ]
    panel["fieldConfig"]["defaults"]["custom"] = {"show": "lines", "fillOpacity": 50}
    panel["fieldConfig"]["overrides"] = [_unit_of(x_name, "short")]
    return panel


def _panel(
    type: str,
    title: str,
    description: str,
    unit: str,
    size: tuple[int, int],
    targets: Sequence[Json],
    options: Json | None = None,
    thresholds: Steps = (),
) -> Json:
    steps = [{"value": None, "color": "green"}, *({"value": value, "color": color} for value, color in thresholds)]
    return {
        "type": type,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"w": size[0], "h": size[1]},
        "targets": list(targets),
        **({"options": options} if options else {}),
        "fieldConfig": {
            "defaults": {"unit": unit, "thresholds": {"mode": "absolute", "steps": steps}},
            "overrides": [],
        },
    }


def _target(expression: str, legend: str, letter: str) -> Json:
    return {"expr": expression, "legendFormat": legend, "refId": letter, "datasource": DATASOURCE}


def _link_of(run: str, id: str) -> Json:
    """A link from each cell of the column of names to the dashboard of that run."""
    url = f"/d/detour-run?var-run=${{__data.fields.{run}}}&var-id=${{__data.fields.{id}}}&${{__url_time_range}}"
    properties = [{"id": "links", "value": [{"title": "Dashboard of the run", "url": url}]}]
    return {"matcher": {"id": "byName", "options": run}, "properties": properties}


def _unit_of(column: str, unit: str) -> Json:
    return {"matcher": {"id": "byName", "options": column}, "properties": [{"id": "unit", "value": unit}]}
