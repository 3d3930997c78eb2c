"""A real training run under the shipped Prometheus configuration, with one of its workers killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from monitoring.log import read_events, read_metrics
from monitoring.monitor import DirectorySource, EndpointSource
from tests.monitoring.dashboards import expressions, fill_in
from tests.monitoring.prometheus import Server, needs_prometheus, prometheus, wait_until
from tests.monitoring.test_exporter import ENDPOINT

pytestmark = [needs_prometheus, pytest.mark.timeout(2000)]  # a minute and a half on two idle cores

RECIPE = """
name: watched
model: {size: tiny}
tokenizer: package://tokenizer/modernbert
data:
  sequence_length: 64
  streams: 2
  sources: [{name: tico19, text: "package://corpus/tico19_en.jsonl.gz", shards: shards/tico19}]
  evaluation: {text: "package://corpus/tico19_fr.jsonl.gz", shards: shards/held-out, every: 20 steps, sequences: 4}
batch: {sequences: 4, micro: 2}
phases:
  - {objective: clm, steps: 60}
  - {objective: mlm, steps: 120}
checkpoint: {every: 20 steps}
cluster: {workers_per_node: 2}
monitoring: {every: 1 steps, targets: targets}
"""
GPU_ONLY = "detour_worker_gpu_utilization_ratio"


@dataclass
class Watched:
    server: Server
    directory: Path
    url: str
    began: float


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The run in its second phase, after a worker was killed in the first; it is over when the fixture is torn down."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "recipe.yaml").write_text(RECIPE)
    began = time.time()
    with prometheus(folder, folder / "targets", interval="1s") as server:
        command = [sys.executable, "-m", "detour_train", "train"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        log = (folder / "output.txt").open("wb")
        job = subprocess.Popen(
            [*command, "recipe.yaml", "--output", "run"], cwd=folder, env=environment, stdout=log, stderr=log
        )
        try:

            def step_reached(step: int) -> bool:
                assert job.poll() is None, (folder / "output.txt").read_text()
                return (server.value('detour_train_step{run="watched"}') or 0) >= step

            wait_until(lambda: step_reached(35), 600)
            worker = next(p for p in _family(job.pid) if "".join(p.cmdline()[:1]).startswith("ray::Worker"))
            worker.send_signal(signal.SIGKILL)
            wait_until(lambda: step_reached(90), 600)
            url = re.search(r"http://[\d.:]+/metrics", (folder / "output.txt").read_text())
            assert url
            yield Watched(server, folder / "run", url[0], began)
            assert job.wait(timeout=300) == 0, (folder / "output.txt").read_text()
            wait_until(lambda: server.query('{run="watched"}') == [], 60)
        finally:
            job.terminate()
            job.wait()
            log.close()


def _family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_a_real_run_is_watched_through_the_loss_of_a_worker(watched: Watched) -> None:
    """One test, because the run goes on meanwhile."""
    server, window = watched.server, time.time() - watched.began
    state = EndpointSource(watched.url.replace("/metrics", "/telemetry.json")).read().run
    assert state.telemetry
    assert (state.run, state.telemetry.total_steps, state.restarts["died"]) == ("watched", 180, 1)

    for name, (kind, labels) in ENDPOINT.items():
        series = server.query_range(f'{name}{"_bucket" if kind == "histogram" else ""}{{run="watched"}}', window)
        assert series, name
        extra = {"le"} if kind == "histogram" else set()
        for one in series:
            if name != "detour_run_info":
                assert one["metric"].keys() == {"__name__", "job", "instance", "run", "id"} | labels | extra, name
            if kind != "gauge":
                values = [float(value) for _, value in one["values"]]
                assert values == sorted(values), one["metric"]
    (described,) = server.query('detour_run_info{run="watched"}')
    assert described["metric"].keys() >= {"model", "phases", "nodes", "precision", "parameters"}
    assert server.value('min_over_time(up{job="detour"}[10m])') == 1

    for board, panel, expression in expressions():
        if GPU_ONLY not in expression:
            filled = fill_in(expression, run="watched", interval="1m")
            assert server.query_range(filled, window), f"{board}: {panel}: {filled}"


def test_the_log_of_that_run_has_every_step_once(watched: Watched) -> None:
    wait_until((watched.directory / "report.html").exists, 300)  # the last thing that a run writes
    assert [line["step"] for line in read_metrics(watched.directory)] == list(range(1, 181))
    assert [event["event"] for event in read_events(watched.directory)].count("phase_started") == 2
    assert DirectorySource(watched.directory).read().run.state == "finished"
    assert (watched.directory / "report.html").stat().st_size > 20_000
