"""Reads the dashboards' JSON as Grafana would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from monitoring.grafana.dashboards import FOLDER


def boards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str, str]]:
    """(board, panel, PromQL) of every panel, and of every annotation that watches what a healthy run does."""
    for name, board in boards().items():
        for panel in panels(board):
            for target in panel["targets"]:
                yield name, panel["title"], target["expr"]
        for annotation in board["annotations"]["list"]:
            yield name, annotation["name"], annotation["expr"]


def fill_in(expression: str, run: str, interval: str, shown: str = "15m") -> str:
    """Put values in the place of Grafana's variables; `shown` is the time the dashboard shows.

    interval: `$__rate_interval`. `$__interval` is the time of a point: over a quarter of an hour it is the least, which
    the datasource has from the scrapes.
    """
    expression = expression.replace('id="$id"', 'id=~".+"').replace("$id", ".+")  # the runs of a test have other names
    filled = expression.replace("$run", run).replace("$__range", shown)
    return filled.replace("$__rate_interval", interval).replace("$__interval", "5s")
