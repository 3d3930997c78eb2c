"""The cost of monitoring: the recorder's share of a step, the time of a scrape, and what reads the logs of a long run.

The benchmark sleeps through its steps, so that telemetry is written as often as in training, and times the recorder's
calls alone. The fastest round counts, because it contains the least of other programs' time. How the trainer gets the
record of a logged step is not timed here: it gathers a few numbers per rank and waits for the device for that. That
time belongs to the training loop's share of a step (benchmarks/README.md).

    python -m benchmarks.overhead [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from benchmarks.table import Row, arguments, report
from configs.load import dump_config, load_config
from configs.schema import RunConfig
from monitoring.events import CheckpointSaved
from monitoring.events import record as record_event
from monitoring.exporter import Exporter
from monitoring.recorder import Recorder, StepRecord
from monitoring.run_directory import RunDirectory
from monitoring.telemetry import WorkerRecord

SHARE = 0.005
"""Largest share of a step that monitoring may take."""
SCRAPE_MS = 100.0
"""Longest time that a scrape may take."""


def main() -> None:
    options = arguments(__doc__)
    rounds = 3 if options.quick else 10
    config = load_config("demo", ["phases.0.steps=1000000", "monitoring.every=10 steps"])
    report(
        [
            recording(config, rounds, ranks=2, step=0.05, steps=100),
            recording(config, rounds, ranks=8, step=0.25, steps=20),
            recording(config, rounds, ranks=512, step=1.0, steps=10),
            scraping(config, rounds, ranks=512, events=100),
            scraping(config, rounds, ranks=512, events=5000),
            *long_runs(steps=200_000, events=20_000),
        ],
        options.json,
    )


def recording(config: RunConfig, rounds: int, ranks: int, step: float, steps: int) -> Row:
    def one_round(folder: Path) -> float:
        recorder = _recorder(folder, config)
        spent = 0.0
        for number in range(1, steps + 1):
            time.sleep(step)
            record = _record(number, step, ranks if recorder.due(number) else 0)
            began = time.perf_counter()
            recorder.step(record)
            spent += time.perf_counter() - began
        recorder.close()
        return spent / steps

    spent = _fastest(rounds, one_round)
    return Row.at_most(f"recorder, {ranks} ranks, step of {step:g} s", spent * 1e3, step * 1e3, SHARE, "ms per step")


def scraping(config: RunConfig, rounds: int, ranks: int, events: int) -> Row:
    def one_round(folder: Path) -> float:
        recorder = _recorder(folder, config)
        recorder.step(_record(1, 1.0, ranks))
        recorder.close()
        for number in range(events):
            path = "checkpoints/step-00000000"
            record_event(folder, CheckpointSaved(step=number, seconds=1.0, stall_seconds=0.1, path=path))
        with Exporter(folder, config.name, "127.0.0.1", 0) as exporter:
            urlopen(exporter.url).read()
            began = time.perf_counter()
            urlopen(exporter.url).read()
            return time.perf_counter() - began

    spent = _fastest(rounds, one_round)
    return Row.at_most(f"scrape, {ranks} ranks, {events:,} events", spent * 1e3, SCRAPE_MS, 1.0, "ms")


def long_runs(steps: int, events: int) -> list[Row]:
    """Measure what reads the logs of a long run: report, `detour monitor --once` and `detour compare` of two runs."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / name for name in ("a", "b")]
        for run in runs:
            _write_long_run(run, steps, events)
        detour = [sys.executable, "-m", "detour_train"]
        write = (
            "import sys, pathlib; from monitoring.report import write_report; write_report(pathlib.Path(sys.argv[1]))"
        )
        _timed([sys.executable, "-c", write, str(runs[0])])
        size = RunDirectory(runs[0]).report.stat().st_size / 1e6
        monitor, _ = _timed([*detour, "monitor", str(runs[0]), "--once"])
        compare, memory = _timed([*detour, "compare", *map(str, runs), "--output", f"{folder}/compare.html"])
    length = f"{steps:,} steps, {events:,} events"
    return [
        Row.at_most(f"report.html, {length}", size, 2.0, 1.0, "MB"),
        Row.at_most(f"monitor --once, {length}", monitor, 1.0, 1.0, "s"),
        Row.at_most(f"compare of two, {length}", compare, 5.0, 1.0, "s"),
        Row.at_most(f"memory of compare, {length}", memory, 300.0, 1.0, "MB"),
    ]


def _write_long_run(folder: Path, steps: int, events: int) -> None:
    config = load_config("demo", [f"phases.0.steps={steps // 2}", f"phases.1.steps={steps // 2}"])
    folder.mkdir()
    run = RunDirectory(folder)
    run.config.write_text(dump_config(config))
    _recorder(folder, config).close()
    with run.metrics.open("a") as file:
        for step in range(1, steps + 1):
            phase = int(step > steps // 2)
            line: dict[str, Any] = {"step": step, "phase": phase, "objective": config.phases[phase].objective}
            line |= {"loss": 3 + math.sin(step) / 9, "tokens": 2000 * step, "learning_rate": 1e-3 / step}
            line |= {"grad_norm": 1 + math.cos(step) / 9, "packing_ratio": 0.99, "step_seconds": 0.2}
            line |= {"data_wait_seconds": 0.001, "tokens_per_second": 1e4 + step % 97, "mfu": 0.4}
            file.write(json.dumps(line) + "\n")
    with run.events.open("a") as file:
        for number in range(events):
            moment = datetime.fromtimestamp(1.7e9 + 60 * number, UTC).isoformat()
            path = f"checkpoints/step-{10 * number:08d}"
            line = {"time": moment, "event": CheckpointSaved.KIND, "step": 10 * number, "seconds": 1.0}
            file.write(json.dumps(line | {"stall_seconds": 0.1, "path": path}) + "\n")


def _timed(command: list[str]) -> tuple[float, float]:
    """Run a command, and return its seconds of processor time and its largest resident memory in MB.

    Each of the commands is one thread, whose wall time is its processor time on a machine that is idle.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def _fastest(rounds: int, one_round: Callable[[Path], float]) -> float:
    times = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            times.append(one_round(Path(folder)))
    return min(times)


def _recorder(folder: Path, config: RunConfig) -> Recorder:
    return Recorder(folder, config, {"device": "none"}, devices=1, peak_flops=1e12, state=None, step=0)


def _record(step: int, seconds: float, ranks: int) -> StepRecord:
    return StepRecord(
        step=step,
        phase=0,
        objective="clm",
        loss=3.0,
        tokens=2000,
        learning_rate=1e-3,
        grad_norm=1.0,
        step_seconds=seconds,
        data_wait_seconds=0.001,
        flops=1e9,
        packing_ratio=0.99,
        epochs={"medquad": 0},
        workers=[WorkerRecord(rank, seconds, 10**9) for rank in range(ranks)] or None,
    )


if __name__ == "__main__":
    main()
