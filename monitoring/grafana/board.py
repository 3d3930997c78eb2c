"""What the dashboards have in common: their frame, variables, annotations and parts of queries."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import dashboard as models

from monitoring.grafana.panels import DATASOURCE

RUN = '{run=~"$run"}'
ONE = '{run="$run"}'
"""On the board of a single run, whose name is not a pattern there."""
ME = "on (instance, job, run)"
CURRENT = "and on (instance, job, run, objective) detour_train_phase == 1"
"""Keeps the series of the objective that is trained now; the other one's last value is history."""
STEP_TIME = f"rate(detour_train_step_seconds_sum{RUN}[5m]) / (rate(detour_train_step_seconds_count{RUN}[5m]) > 0)"
"""Over minutes: where a step takes longer than Grafana's own interval, no step ends within one."""
LABELLED = f"{ME} group_left (model, nodes, precision, phases) detour_run_info{RUN}"
"""Joins the description of the run onto a series."""

WARN, BAD = "orange", "red"


def new_board(uid: str, title: str, description: str) -> builders.Dashboard:
    return (
        builders.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["detour"])
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("5s")
        .time("now-1h", "now")
        .link(
            builders.DashboardLink("Detour")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["detour"])
            .as_dropdown(True)
            .keep_time(True)
            .include_vars(True)
        )
        .with_variable(builders.DatasourceVariable("datasource").label("Datasource").type("prometheus"))
        .annotations([])
    )


def fill(board: builders.Dashboard, *panels: Any) -> None:
    for panel in panels:
        board.with_panel(panel)


def run_variable(several: bool) -> builders.QueryVariable:
    variable = (
        builders.QueryVariable("run")
        .label("Run")
        .query("label_values(detour_run_info, run)")
        .datasource(DATASOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(several)
        .include_all(several)
    )
    return variable.current(models.VariableOption(text="All", value="$__all")) if several else variable


def last(selector: str) -> str:
    """The latest value within the time shown, so that a finished run has one too."""
    return f"last_over_time({selector}[$__range])"


def current_loss(selector: str) -> str:
    """Of the objective that is trained now or was last; a live run comes before what it was at another address."""
    loss, phase = f"detour_train_loss{selector}", f"detour_train_phase{selector}"
    ended = f"{last(loss)} and on (instance, job, run, objective) {last(phase)} == 1"
    return f"max by (run) ({loss} {CURRENT}) or max by (run) ({ended})"


def annotate(board: builders.Dashboard, several: bool) -> None:
    """Vertical lines at the events of the run, or of several."""
    match = "=~" if several else "="
    for name, color, events in (
        ("Phases", "blue", "phase_started"),
        ("Checkpoints", "green", "checkpoint_saved"),
        (
            "Interruptions",
            "red",
            "worker_failed|preempted|stopped|failed|checkpoint_failed|checkpoint_damaged|step_skipped|loss_spike",
        ),
        ("Run", "purple", "started|resumed|exported|finished"),
    ):
        board.annotation(
            builders.AnnotationQuery()
            .name(name)
            .datasource(DATASOURCE)
            .enable(name != "Checkpoints")
            .icon_color(color)
            .expr(f'increase(detour_events_total{{run{match}"$run",event=~"{events}"}}[$__rate_interval]) > 0')
        )
