"""Writes the dashboards as the JSON that Grafana reads: `python -m monitoring.grafana.dashboards`."""

from __future__ import annotations

from pathlib import Path

from configs.files import write_json
from monitoring.grafana.compare import compare
from monitoring.grafana.health import health
from monitoring.grafana.run import run

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = {"run": run, "compare": compare, "health": health}


def main() -> None:
    """Write every dashboard."""
    FOLDER.mkdir(exist_ok=True)
    for name, build in DASHBOARDS.items():
        write_json(FOLDER / f"{name}.json", build())


if __name__ == "__main__":
    main()
