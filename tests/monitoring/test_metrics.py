"""The table of metrics, and what is made from it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml

from monitoring.docs import PAGE, events_table, metrics_table, with_tables
from monitoring.events import EVENT_TYPES, REASONS, kinds_where
from monitoring.exporter import Exporter
from monitoring.grafana.board import LAYERS, layer_kinds
from monitoring.grafana.run import run as run_dashboard
from monitoring.metrics import METRICS, RUN, Metric, Panel, collect
from monitoring.run_directory import RunDirectory
from monitoring.run_state import RunState, count_restarts, interruptions_in_words, seconds_left, state_of
from monitoring.telemetry import Telemetry, WorkerRecord
from tests.monitoring.dashboards import boards
from tests.monitoring.prometheus import SHIPPED
from tests.monitoring.synthetic import drive, make_config, make_record, make_recorder

ROOT = Path(__file__).parents[2]
KINDS = [event.KIND for event in EVENT_TYPES]


def test_a_new_metric_is_one_row(tmp_path: Path) -> None:
    row = Metric(
        "detour_train_objectives",
        "gauge",
        "Objectives met so far",
        "objectives",
        lambda now: len(now.loss),
        panel=Panel("Learning", "Objectives", "Objectives met so far."),
    )
    table = (*METRICS, row)
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 25))
    recorder.close()
    with Exporter(tmp_path, "toy", "127.0.0.1", 0, table) as exporter, urlopen(exporter.url) as answer:
        lines = answer.read().decode().splitlines()
    assert "# TYPE detour_train_objectives gauge" in lines
    identity = f'id="{RunDirectory(tmp_path).id}",run="toy"'
    assert f"detour_train_objectives{{{identity}}} 2.0" in lines
    assert "| `detour_train_objectives` | gauge | objectives |  | Objectives met so far |" in metrics_table(table)
    titles = [panel["title"] for panel in run_dashboard(table)["panels"]]
    assert titles[titles.index("Learning") : titles.index("Speed")].count("Objectives") == 1
    (panel,) = [panel for panel in run_dashboard(table)["panels"] if panel["title"] == "Objectives"]
    assert [(target["expr"], target["legendFormat"]) for target in panel["targets"]] == [
        (f"detour_train_objectives{RUN}", "objectives")
    ]


def test_the_tables_of_the_document_are_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert metrics_table() in page, "run python -m monitoring.docs"
    assert events_table() in page, "run python -m monitoring.docs"
    assert with_tables(page) == page, "run python -m monitoring.docs"


def test_names_follow_prometheus_conventions() -> None:
    for metric in METRICS:
        assert metric.name.startswith("detour_")
        assert metric.name.endswith("_total") == (metric.type == "counter"), metric.name
        for unit in ("seconds", "bytes", "ratio"):
            assert (metric.unit == unit) == (unit in metric.name.split("_")[-2:] and "per" not in metric.name), (
                metric.name
            )
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_every_row_gives_samples_with_its_labels(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    recorder.step(make_record(config, 20, workers=[WorkerRecord(0, 0.2, 10**9, gpu_utilization=0.9)]))
    recorder.checkpoint_saved(20, 0.5, tmp_path / "checkpoints")
    recorder.close()
    now = Telemetry.read(tmp_path)
    for metric, samples in collect(RunState.of("toy", now, [])):
        assert samples, metric.name
        for labels, _ in samples:
            assert set(metric.labels) <= labels.keys(), metric.name
            assert metric.free_labels or labels.keys() == set(metric.labels), metric.name


def test_known_kinds_and_reasons_are_counted_from_zero_and_unknown_ones_too() -> None:
    line = {"time": "2026-11-27T09:00:00+00:00"}
    lines = [line | {"event": "worker_failed", "reason": "odd"}, line | {"event": "preempted"}, line | {"event": "new"}]
    state = RunState.of("toy", None, lines)
    assert state.events == dict.fromkeys(KINDS, 0) | {"worker_failed": 1, "preempted": 1, "new": 1}
    assert count_restarts(lines) == dict.fromkeys(REASONS, 0) | {"odd": 1, "preempted": 1}
    assert [state_of(lines[:count]) for count in (0, 1)] == ["not_started", "running"]


def test_the_end_tells_interruptions_and_early_ends() -> None:
    """A run that is over and was submitted again has not run in one go."""
    started, failed, stopped = {"event": "workers_started"}, {"event": "failed"}, {"event": "stopped"}
    lost = {"event": "worker_failed", "reason": "node_lost"}
    assert interruptions_in_words([started, failed]) == "never interrupted"
    assert interruptions_in_words([started, failed, started, stopped, started, stopped]).endswith(
        "never interrupted; ended early and continued 2 times"
    )
    words = interruptions_in_words([started, lost, started, stopped, started, {"event": "resumed", "steps_lost": 1}])
    assert words == "interrupted 1 time (1 node lost); 1 step trained again; ended early and continued 1 time"
    killed = interruptions_in_words([started, started, {"event": "resumed", "steps_lost": 1}])
    assert killed == "never interrupted; 1 step trained again; ended early and continued 1 time"


@pytest.mark.parametrize("event", [event for event in EVENT_TYPES if event.INTERRUPTS])
def test_an_interruption_has_a_reason(event: type) -> None:
    assert "reason" in event.__dataclass_fields__  # type: ignore[attr-defined]


def matched(pattern: str) -> list[str]:
    return [kind for kind in KINDS if re.fullmatch(pattern, kind)]


def test_alerts_watch_the_kinds_that_the_event_types_name() -> None:
    rules = yaml.safe_load((SHIPPED / "rules" / "alerts.yml").read_text())["groups"][0]["rules"]
    watched = {
        rule["alert"]: matched(pattern)
        for rule in rules
        for pattern in re.findall(r'detour_events_total\{event=~?"([^"]+)"', rule["expr"])
    }
    checkpoints = [kind for kind in kinds_where(lambda event: event.FAULT) if kind.startswith("checkpoint_")]
    assert watched == {
        "DetourLossNotFinite": ["step_skipped"],
        "DetourCheckpointFailing": checkpoints,
        "DetourRestartStorm": list(kinds_where(lambda event: event.INTERRUPTS)),
    }


def test_dashboards_name_known_events_alone() -> None:
    layers = [kind for layer in LAYERS for kind in layer_kinds(layer)]
    assert sorted(layers) == sorted(kinds_where(lambda event: event.LAYER))
    for board in boards().values():
        for pattern in re.findall(r'event=~\\?"([^"\\]+)', str(board)):
            assert matched(pattern) == sorted(pattern.split("|"), key=KINDS.index), pattern


def test_the_runbook_speaks_of_every_fault() -> None:
    page = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    for kind in kinds_where(lambda event: event.FAULT or event.WARNING):
        assert f"`{kind}`" in page, kind


def test_time_left_counts_standstill() -> None:
    now = Telemetry(run="r", info={}, objectives=["clm"], total_steps=200, step=100, step_seconds=1.0)
    now.counters.step_seconds.observe(100.0)
    start = datetime(2026, 1, 1, tzinfo=UTC)

    def event(kind: str, second: int, **fields: object) -> dict[str, object]:
        return {"event": kind, "time": (start + timedelta(seconds=second)).isoformat(), **fields}

    clock = start.timestamp() + 200
    events = [event("workers_started", 0, workers=["a"]), event("started", 1)]
    assert seconds_left(now, events, clock) == 100
    events += [event("worker_failed", 50, reason="died"), event("workers_started", 80, workers=["a"])]
    events += [event("resumed", 81, steps_lost=20)]
    assert seconds_left(now, events, clock) == pytest.approx(150), "30 s of standstill and 20 steps of 1 s"
    events += [event("preempted", 150, reason="preempted")]
    assert seconds_left(now, events, clock) == pytest.approx(200), "and the workers are not back yet"
    back = [event("worker_failed", 50, reason="died"), event("workers_started", -7000, workers=["a"])]
    assert seconds_left(now, back, clock) == 100, "the clock was set back"
