"""Writes deploy/monitoring.yaml, the shipped rules for the Prometheus operator: `python -m monitoring.kubernetes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from configs.files import write_atomically

RULES = Path(__file__).parent / "prometheus" / "rules"
PAGE = Path(__file__).parents[1] / "deploy" / "monitoring.yaml"
HEADER = """# The metrics of the runs of deploy/rayjob.yaml, and Detour's rules, for the Prometheus operator:
#   kubectl apply -f deploy/monitoring.yaml
# Written by `python -m monitoring.kubernetes` from monitoring/prometheus/rules. The links of the alerts need the
# external labels `grafana` and `runbooks` of monitoring/prometheus/prometheus.yml in the Prometheus resource.
"""


def documents() -> list[dict[str, Any]]:
    """Return the PodMonitor and the PrometheusRule."""
    groups = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    monitor = {
        "selector": {"matchLabels": {"ray.io/node-type": "head"}},
        "podMetricsEndpoints": [{"port": "detour", "interval": "15s"}],
    }
    return [_resource("PodMonitor", monitor), _resource("PrometheusRule", {"groups": groups})]


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": kind, "metadata": {"name": "detour"}, "spec": spec}


def page() -> str:
    """Return the text of the file."""
    return HEADER + yaml.safe_dump_all(documents(), sort_keys=False, width=120)


if __name__ == "__main__":
    write_atomically(PAGE, page())
