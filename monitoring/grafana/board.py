"""The parts that the dashboards share: frame, layout, variables, annotations and queries."""

from __future__ import annotations

from collections.abc import Sequence

from monitoring.events import Layer, kinds_where
from monitoring.grafana.panels import DATASOURCE, Json
from monitoring.metrics import CURRENT

RUNS = '{run=~"$run",id=~"$id"}'
"""Selector of the runs that a dashboard of several runs shows."""
ME = "on (instance, job, run, id)"
STEP_TIME = f"rate(detour_train_step_seconds_sum{RUNS}[5m]) / (rate(detour_train_step_seconds_count{RUNS}[5m]) > 0)"
"""Mean step time over minutes, because no step may end within Grafana's own interval."""
LABELLED = f"{ME} group_left (model, nodes, precision, phases) detour_run_info{RUNS}"
"""Joins the description of the run onto a series."""
LAYERS: dict[Layer, str] = {"Phases": "blue", "Checkpoints": "green", "Interruptions": "red", "Run": "purple"}
"""Colour of each layer of annotations."""


def new_board(
    uid: str, title: str, description: str, panels: Sequence[Json], *, several: bool, annotations: Sequence[Json] = ()
) -> Json:
    """Make a dashboard of these panels, for one run or for several."""
    link = {"title": "Detour", "type": "dashboards", "tags": ["detour"], "asDropdown": True, "includeVars": True}
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["detour"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,  # one crosshair over all panels
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "5s",
        "schemaVersion": 41,
        "links": [link | {"keepTime": True, "targetBlank": False, "icon": "", "tooltip": ""}],
        "templating": {"list": [_datasource_variable(), *_run_variables(several)]},
        "annotations": {"list": list(annotations)},
        "panels": _laid_out(panels),
    }


def _laid_out(panels: Sequence[Json]) -> list[Json]:
    """Place the panels from left to right and from top to bottom, and number them."""
    x = y = height = 0
    placed = []
    for number, panel in enumerate(panels, start=1):
        size = panel["gridPos"]
        if x + size["w"] > 24:
            x, y, height = 0, y + height, 0
        placed.append(panel | {"id": number, "gridPos": {"x": x, "y": y} | size})
        x, height = x + size["w"], max(height, size["h"])
    return placed


def _datasource_variable() -> Json:
    return {"type": "datasource", "name": "datasource", "label": "Datasource", "query": "prometheus"}


def _run_variables(several: bool) -> list[Json]:
    """The name of the run and the id of its directory, because runs of one recipe share a name."""
    chosen = f'detour_run_info{{run{"=~" if several else "="}"$run"}}'
    return [_variable("run", "Run", "detour_run_info", several), _variable("id", "Id", chosen, several)]


def _variable(label: str, title: str, series: str, several: bool) -> Json:
    variable: Json = {
        "type": "query",
        "name": label,
        "label": title,
        "query": f"label_values({series}, {label})",
        "datasource": DATASOURCE,
        "refresh": 2,  # when the time range changes
        "sort": 1,  # by name
        "multi": several,
        "includeAll": several,
    }
    return variable | ({"current": {"text": "All", "value": "$__all"}} if several else {})


def last(selector: str) -> str:
    """The latest value within the time shown, so that a finished run has a value too."""
    return f"last_over_time({selector}[$__range])"


def current_loss(selector: str) -> str:
    """Loss of the current or last objective. A live run's series comes before those of its earlier addresses."""
    loss, phase = f"detour_train_loss{selector}", f"detour_train_phase{selector}"
    ended = f"{last(loss)} and on (instance, job, run, id, objective) {last(phase)} == 1"
    return f"max by (run, id) ({loss} {CURRENT}) or max by (run, id) ({ended})"


def event_annotations(selector: str) -> list[Json]:
    """Vertical lines at the events of the selected runs, one layer per colour."""
    return [
        {
            "name": name,
            "datasource": DATASOURCE,
            "enable": name != "Checkpoints",
            "iconColor": color,
            "hide": False,
            "builtIn": 0,
            "expr": f"increase({events(selector, layer_kinds(name))}[$__rate_interval]) > 0",
            "titleFormat": "{{event}}",
            "step": "5s",
        }
        for name, color in LAYERS.items()
    ]


def layer_kinds(layer: Layer) -> tuple[str, ...]:
    """Kinds of the events that a layer marks."""
    return kinds_where(lambda event: layer == event.LAYER)


def events(selector: str, kinds: Sequence[str]) -> str:
    """PromQL of the number of events of these kinds."""
    return f'detour_events_total{selector[:-1]},event=~"{"|".join(kinds)}"}}'
