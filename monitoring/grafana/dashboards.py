"""Writes the dashboards as the JSON that Grafana reads: `python -m monitoring.grafana.dashboards`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from monitoring.grafana.compare import compare
from monitoring.grafana.health import health
from monitoring.grafana.run import run

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = {"run": run, "compare": compare, "health": health}


def build(name: str) -> dict[str, Any]:
    """A dashboard as Grafana reads it, every panel with an id of its own."""
    board = json.loads(json.dumps(DASHBOARDS[name]().build(), cls=JSONEncoder))
    for number, panel in enumerate(board["panels"], start=1):
        panel["id"] = number
    for annotation in board["annotations"]["list"]:  # the SDK has no field for what the Prometheus editor asks
        annotation |= {"titleFormat": "{{event}}", "step": "5s"} if "expr" in annotation else {}
    return dict(board)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(json.dumps(build(name), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
