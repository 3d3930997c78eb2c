"""The shipped Prometheus configuration, rules and dashboards against a real server and two runs at once."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.schema import RunConfig
from monitoring import kubernetes
from monitoring.discovery import announced
from monitoring.events import Resumed, Started, WorkerFailed, WorkersStarted, record
from monitoring.exporter import Exporter
from monitoring.telemetry import WorkerRecord
from tests.monitoring.browser import needs_chromium, photograph
from tests.monitoring.dashboards import boards, expressions, fill_in
from tests.monitoring.preview import preview
from tests.monitoring.prometheus import SHIPPED, Server, needs_prometheus, prometheus, wait_until
from tests.monitoring.synthetic import make_config, make_record, make_recorder
from tests.monitoring.test_exporter import ENDPOINT
from tests.programs import needs_program

HERE = Path(__file__).parent
SIZES = {"run": (1760, 2050), "health": (1760, 1500), "compare": (1760, 1700)}


@dataclass
class Scene:
    server: Server
    run: SteadyRun
    """Alpha, which is half-way; beta runs beside it."""
    alpha: ExitStack
    """Closing it ends alpha's endpoint; beta's goes on."""
    began: float


class SteadyRun(threading.Thread):
    """A run in real time, eight steps a second until hurried: a switch, and a failure that loses a second of work."""

    def __init__(self, directory: Path, config: RunConfig, fails: bool, worse: float) -> None:
        super().__init__(daemon=True)
        self.directory, self.config, self.fails, self.worse = directory, config, fails, worse
        self.hurry = threading.Event()
        self.start()

    def run(self) -> None:
        recorder = make_recorder(self.directory, self.config)
        record(self.directory, WorkersStarted(workers=["10.0.0.1", "10.0.0.2", "10.0.0.2"], seconds=1.0))
        record(self.directory, Started(step=0, precision="fp32"))
        recorder.phase_started(0, self.config.phases[0].objective, 0)
        step, state, failed = 0, None, not self.fails
        while step < self.config.total_steps:
            self.hurry.wait(0.125)
            step += 1
            if step == 41:
                recorder.phase_started(1, "mlm", 40)
            gpus = [WorkerRecord(rank, 0.12 + 0.01 * rank, (9 + rank) * 2**30, 0.9) for rank in range(3)]
            one = make_record(self.config, step, step_seconds=0.125 * self.worse, workers=gpus)
            held_out = {name: loss * self.worse for name, loss in (one.eval_loss or {}).items()}
            worse = {"loss": one.loss * self.worse, "eval_loss": held_out or None}
            recorder.step(one.model_copy(update=worse))
            if step % 20 == 0:
                state = (step, recorder.state())
                recorder.checkpoint_saved(step, 0.2, self.directory / "checkpoints" / f"step-{step:08d}")
            if step == 68 and not failed and state:
                failed = True
                record(self.directory, WorkerFailed(step=step, reason="died", rank=1, detail="killed"))
                time.sleep(1.5)
                step = state[0]
                recorder = make_recorder(self.directory, self.config, state[1], step)
                record(self.directory, Resumed(step=step, precision="fp32"))
        recorder.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("prometheus")
    targets = folder / "targets"
    began = time.time()
    with prometheus(folder, targets, interval="1s") as server, ExitStack() as stack:
        runs: dict[str, ExitStack] = {}
        configs = {}
        for name, first in (("alpha", "clm"), ("beta", "mlm")):
            phases: list[dict[str, Any]] = [{"objective": first, "steps": 40}, {"objective": "mlm", "steps": 400}]
            configs[name] = make_config(name=name, phases=phases, monitoring={"every": "1 steps"})
            (folder / name).mkdir()
            runs[name] = stack.enter_context(ExitStack())
            exporter = runs[name].enter_context(Exporter(folder / name, name, "127.0.0.1", 9464))
            runs[name].enter_context(announced(targets, exporter.target))
        wait_until(lambda: server.value("count(detour_run_info)") == 2, 30)
        going = {
            "alpha": SteadyRun(folder / "alpha", configs["alpha"], fails=True, worse=1.0),
            "beta": SteadyRun(folder / "beta", configs["beta"], fails=False, worse=1.1),
        }
        wait_until(lambda: (server.value('detour_train_step{run="alpha"}') or 0) > 150, 120)
        yield Scene(server, going["alpha"], runs["alpha"], began)
        for one in going.values():
            one.hurry.set()
            one.join()


@needs_prometheus
def test_both_runs_are_found_and_nothing_is_mixed(scene: Scene) -> None:
    assert scene.server.value("count(detour_run_info)") == 2
    by_run = scene.server.query("count by (run) (count by (run, instance) (detour_train_step))")
    assert {sample["metric"]["run"]: sample["value"][1] for sample in by_run} == {"alpha": "1", "beta": "1"}
    assert scene.server.query_range('ALERTS{alertstate="firing"}', time.time() - scene.began) == []


@needs_prometheus
def test_every_contract_metric_arrives_with_its_type_and_labels(scene: Scene) -> None:
    metadata = scene.server.get("metadata")
    for name, (kind, labels) in ENDPOINT.items():
        described = metadata.get(name) or metadata[name.removesuffix("_total")]
        assert described[0]["type"] == kind, name
        series = scene.server.query(f'{name}{"_bucket" if kind == "histogram" else ""}{{run="alpha"}}')
        assert series, name
        extra = {"le"} if kind == "histogram" else set()
        for one in series:
            assert one["metric"].keys() == {"__name__", "job", "instance", "run", "id"} | labels | extra, name


@needs_prometheus
def test_counters_stay_monotonic_through_a_failure_and_the_endpoint_stays(scene: Scene) -> None:
    window = time.time() - scene.began
    for name, (kind, _) in ENDPOINT.items():
        for suffix in {"counter": ("",), "histogram": ("_bucket", "_sum", "_count")}.get(kind, ()):
            for series in scene.server.query_range(f'{name}{suffix}{{run="alpha"}}', window):
                values = [float(value) for _, value in series["values"]]
                assert values == sorted(values), series["metric"]
    assert scene.server.value('detour_launcher_restarts_total{run="alpha",reason="died"}') == 1
    assert scene.server.value('min_over_time(up{job="detour"}[5m])') == 1
    rolled_back = scene.server.query_range('detour_train_step{run="alpha"}', window)[0]["values"]
    assert any(int(b) < int(a) for (_, a), (_, b) in pairwise(rolled_back))


@needs_prometheus
def test_every_dashboard_expression_returns_series(scene: Scene) -> None:
    window = time.time() - scene.began
    checked = 0
    for board, panel, expression in expressions():
        filled = fill_in(expression, run="alpha|beta" if board == "compare" else "alpha", interval="15s")
        assert scene.server.query_range(filled, window), f"{board}: {panel}: {filled}"
        checked += 1
    assert checked > 50


@needs_prometheus
@needs_chromium
def test_every_dashboard_can_be_looked_at(scene: Scene, tmp_path: Path) -> None:
    for name, board in boards().items():
        page = tmp_path / f"{name}.html"
        run = "alpha|beta" if name == "compare" else "alpha"
        page.write_text(preview(scene.server, board, run, time.time() - scene.began))
        assert photograph(page, f"dashboard-{name}", SIZES[name]) == []


@needs_prometheus
def test_every_recording_rule_gives_series(scene: Scene) -> None:
    rules = yaml.safe_load((SHIPPED / "rules" / "recording.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        assert scene.server.query_range(rule["record"], time.time() - scene.began), rule["record"]


@needs_prometheus
def test_a_finished_run_leaves_no_series(scene: Scene) -> None:
    """Runs last in this file: it ends alpha."""
    scene.run.hurry.set()
    wait_until(lambda: scene.server.value('detour_train_step{run="alpha"}') == 440, 30)
    scene.alpha.close()
    wait_until(lambda: scene.server.query('{run="alpha"}') == [], 20)
    assert scene.server.query('detour_train_step{run="beta"}')


@needs_program("promtool", "apt-get install prometheus")
def test_alerts_fire_and_stay_silent_as_they_should() -> None:
    ran = subprocess.run(["promtool", "test", "rules", HERE / "alerts_test.yml"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_operators_file_holds_the_shipped_rules() -> None:
    assert kubernetes.PAGE.read_text() == kubernetes.page(), "run python -m monitoring.kubernetes"
    monitor, rules = kubernetes.documents()
    job = yaml.safe_load((kubernetes.PAGE.parent / "rayjob.yaml").read_text())
    (head,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in [port["name"] for port in head["ports"]]
    assert "monitoring.address=0.0.0.0" in job["spec"]["entrypoint"]
    assert [group["name"] for group in rules["spec"]["groups"]] == ["detour-alerts", "detour-recording"]


def test_alertmanager_routes_to_receivers_that_exist() -> None:
    config = yaml.safe_load((SHIPPED / "alertmanager.yml").read_text())
    routes = [config["route"], *config["route"]["routes"]]
    assert {route["receiver"] for route in routes} <= {receiver["name"] for receiver in config["receivers"]}
    assert {"run", "id"} <= set(config["route"]["group_by"])


def test_every_alert_has_its_tests_and_its_place_in_the_runbook() -> None:
    groups = yaml.safe_load((SHIPPED / "rules" / "alerts.yml").read_text())["groups"]
    cases = yaml.safe_load((HERE / "alerts_test.yml").read_text())["tests"]
    tested = [test for case in cases for test in case.get("alert_rule_test", ())]
    runbook = (HERE.parents[1] / "docs" / "runbook.md").read_text()
    for rule in (rule for group in groups for rule in group["rules"]):
        mine = [bool(test.get("exp_alerts")) for test in tested if test["alertname"] == rule["alert"]]
        assert {True, False} <= set(mine), rule["alert"]
        assert f"## {rule['alert']}\n" in runbook
        assert rule["annotations"]["runbook_url"].endswith(f"docs/runbook.md#{rule['alert'].lower()}")
        assert "/d/detour-run?var-run={{ $labels.run }}&var-id={{ $labels.id }}" in rule["annotations"]["dashboard_url"]
        assert rule["labels"]["severity"] in ("critical", "warning")
