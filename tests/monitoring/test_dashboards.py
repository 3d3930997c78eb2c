"""Checks of the dashboards that need no Grafana server."""

import itertools
import json
import re
from typing import Any

import pytest
import yaml

from monitoring.grafana import dashboards as code
from tests.monitoring.dashboards import boards, expressions, panels

VARIABLE = {"type": "prometheus", "uid": "${datasource}"}


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return set(itertools.product(columns, rows))


@pytest.mark.parametrize("name", code.DASHBOARDS)
def test_the_files_are_what_the_code_builds(name: str) -> None:
    assert boards()[name] == code.DASHBOARDS[name](), "run python -m monitoring.grafana.dashboards"


def test_identities_are_unique_and_the_schema_is_current() -> None:
    found = boards().values()
    assert len({board["uid"] for board in found}) == len({board["title"] for board in found}) == 3
    for board in found:
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
        assert board["schemaVersion"] >= 41


@pytest.mark.parametrize("name", code.DASHBOARDS)
def test_every_panel_is_complete(name: str) -> None:
    board = boards()[name]
    for panel in panels(board):
        title, defaults = panel["title"], panel["fieldConfig"]["defaults"]
        assert panel["description"], title
        assert defaults["unit"], title
        assert defaults["thresholds"]["steps"][0]["color"], title
        assert panel["datasource"] == VARIABLE, title
        assert all(target["datasource"] == VARIABLE for target in panel["targets"]), title
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), title
        assert all(target["legendFormat"] for target in panel["targets"]), title
        if panel["type"] in ("timeseries", "xychart"):
            assert panel["options"]["legend"]["showLegend"], title
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables.keys() == {"datasource", "run", "id"}
    assert variables["run"]["datasource"] == VARIABLE
    assert all(annotation["datasource"] == VARIABLE for annotation in board["annotations"]["list"])


@pytest.mark.parametrize("name", code.DASHBOARDS)
def test_panels_fill_the_grid_without_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in boards()[name]["panels"]:
        mine = cells(panel)
        assert not mine & taken, panel["title"]
        assert all(x < 24 for x, _ in mine), panel["title"]
        taken |= mine


def test_every_query_follows_the_run_variable() -> None:
    for board, panel, expression in expressions():
        for selector in re.findall(r"\bdetour_[\w:]+(\{[^}]*\})?", expression.replace("detour_train_phase == 1", "")):
            wanted = 'run="$run",id="$id"' if board == "run" else 'run=~"$run",id=~"$id"'
            assert wanted in selector, f"{board}: {panel}: {expression}"


def test_steps_are_not_looked_for_where_none_may_end_and_runs_of_one_name_are_not_added() -> None:
    for board, panel, expression in expressions():
        if "rate(" in expression and "_step" in expression:
            assert "$__" not in expression, f"{board}: {panel}: a step may take longer than Grafana's interval"
        assert not re.search(r"(sum|count) by \(run, id\) \((detour|last|rate)", expression), f"{board}: {panel}"


def test_provisioning_and_compose_fit_each_other() -> None:
    folder = code.FOLDER.parent
    compose = yaml.safe_load((folder.parent / "compose.yaml").read_text())
    mounts = dict(mount.split(":")[:2] for mount in compose["services"]["grafana"]["volumes"])
    assert "/tmp:/tmp:ro" in compose["services"]["prometheus"]["volumes"], "what it finds runs by may not exist yet"
    assert not any(mount.startswith("/tmp/") for mount in compose["services"]["prometheus"]["volumes"])
    provider = yaml.safe_load((folder / "provisioning/dashboards/detour.yaml").read_text())["providers"][0]
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    source = yaml.safe_load((folder / "provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    assert source["url"].strip("${}") in compose["services"]["grafana"]["environment"]
    scrape = yaml.safe_load((folder.parent / "prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
    assert json.dumps(compose).count(":latest") == 0
