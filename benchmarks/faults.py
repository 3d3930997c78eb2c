"""The cost of starting, saving and failing, and whether a fault changes the result of a run.

A toy run on a Ray cluster of several raylets, hit by one random fault after another, is compared with the same run
without faults. The column "peer" holds a bar in seconds or steps. A row named "part" is a part of the row above it.

    python -m benchmarks.faults [--quick] [--json FILE]

The environment variable DETOUR_TEST_SEED repeats the faults of an earlier run.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cpu_vs_transformers import MODEL
from benchmarks.table import Row, arguments, report
from monitoring.run_directory import RunDirectory
from tests.chaos.loopback import LoopbackCluster, LoopbackNode
from tests.launcher.toy import (
    DETOUR,
    TRAIN,
    assert_same_run,
    events,
    lines,
    recipe,
    run,
    started,
    steps,
    wait_for,
    workers,
    write,
)
from tests.seeds import draw_seed

SAMPLE = "package://corpus/tico19_en.jsonl.gz"
POISON = Path(__file__).parents[1] / "tests/chaos/poison"
"""Folder that spoils one batch if it is on Python's path."""
INTERVAL = 5
"""Steps between two checkpoints of the run with faults."""


def main() -> None:
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        home = Path(folder)
        shards = home / "shards"
        prepared = run(
            *DETOUR, "prepare", SAMPLE, "--tokenizer", "package://tokenizer/modernbert", "--output", shards, cwd=home
        )
        assert prepared.returncode == 0, prepared.stderr
        rows = cold_start_and_kill(home / "local", shards)
        rows.append(stall_of_a_larger_model(home / "larger", shards))
        rows += node_of_eight(home / "eight", shards)
        rows += random_faults(home / "nodes", shards, faults=5 if options.quick else 20)
    report(rows, options.json)


def cold_start_and_kill(home: Path, shards: Path) -> list[Row]:
    """Measure the time from the command to the first step, and from a killed worker to the next new step."""
    home.mkdir()
    tree = recipe(shards, checkpoint={"every": "10 steps"})
    tree["phases"][0]["steps"] = 60
    directory = home / "run"
    began = time.time()
    with started(*TRAIN, write(home / "toy.yaml", tree), "--output", directory, cwd=home) as job:
        first_step = _when(lambda: 1 in steps(directory), job)
        start = _event(directory, "workers_started")
        wait_for(lambda: 15 in steps(directory), job)
        step_at_kill = max(steps(directory))
        killed = time.time()
        workers(job)[-1].kill()
        failed = wait_for(lambda: _event(directory, "worker_failed"), job)
        wait_for(lambda: _event(directory, "resumed"), job)
        restart = _event(directory, "workers_started", -1)
        new_step = _when(lambda: max(steps(directory)) > step_at_kill, job)
        assert job.wait(600) == 0
    ready = _time(start) - start["seconds"]
    return [
        Row.at_most("cold start to the first step", first_step - began, 20, 1, "s"),
        _part("part: imports, checks, Ray", ready - began),
        _part("part: workers placed, started, imported", start["seconds"]),
        _part("part: model, data, first step", first_step - _time(start)),
        Row.at_most("worker killed to the first new step", new_step - killed, 20, 1, "s"),
        _part("part: noticed", _time(failed) - killed),
        _part("part: workers placed, started, imported", _time(restart) - _time(failed)),
        _part("part: model, checkpoint, recomputed steps", new_step - _time(restart)),
        _stall("training stall of asynchronous checkpoints, toy", directory),
    ]


def stall_of_a_larger_model(home: Path, shards: Path) -> Row:
    """Measure the stall of a save with 17 M parameters; a toy's save is mostly planning."""
    home.mkdir()
    tree = recipe(shards, model=MODEL, checkpoint={"every": "5 steps"}, batch={"sequences": 4, "micro": 1})
    tree["phases"][0]["steps"], tree["phases"][1]["steps"] = 29, 1
    result = run(*TRAIN, write(home / "larger.yaml", tree), "--output", home / "run", cwd=home)
    assert result.returncode == 0, result.stderr
    return _stall("training stall of asynchronous checkpoints, 17 M", home / "run")


def _stall(name: str, directory: Path) -> Row:
    """Compare the stall with the time of the saves, without the last two, because training waits for these."""
    saves = [event for event in lines(RunDirectory(directory).events) if event["event"] == "checkpoint_saved"]
    stall, seconds = (sum(save[key] for save in saves[:-2]) for key in ("stall_seconds", "seconds"))
    return Row.at_most(name, stall, seconds, 0.1, "s of saving")


def node_of_eight(home: Path, shards: Path) -> list[Row]:
    """Measure the time from the loss of one of eight nodes to the first new step, on the nodes that are left.

    All eight nodes share the cores of this machine, so their processes start one after the other. The node is lost
    when the spare workers are ready, about a minute and a half after the start.
    """
    home.mkdir()
    tree = recipe(
        shards,
        cluster={"nodes": [4, 8], "workers_per_node": 1},
        parallel={"pipeline": 2},
        data={"streams": 12},
        batch={"sequences": 12, "micro": 1},
        checkpoint={"every": f"{INTERVAL} steps"},
    )
    tree["phases"][0]["steps"] = 2000
    with LoopbackCluster(8) as cluster:
        job = _Job(cluster, write(home / "toy.yaml", tree), home / "run")
        wait_for(lambda: len(cluster.spares()) == 8, job.process, timeout=900)
        job.wait_for_step(max(steps(job.directory)) + INTERVAL)
        reached, killed = max(steps(job.directory)), time.time()
        cluster.kill_node(job.member(-1)[1])
        failed = job.wait_for_event("worker_failed", killed)
        restart = job.wait_for_event("workers_started", killed)
        job.wait_for_step(reached + 1)
        new_step = time.time()
        job.close()
    assert failed["reason"] == "node_lost", failed
    assert len(restart["workers"]) == restart["spares"] == 6, restart
    return [
        Row.at_most("node of eight lost to the first new step", new_step - killed, 20, 1, "s"),
        _part("part: noticed", _time(failed) - killed),
        _part("part: workers placed, ready", _time(restart) - _time(failed)),
        _part("part: model, checkpoint, recomputed steps", new_step - _time(restart)),
    ]


def random_faults(home: Path, shards: Path, faults: int) -> list[Row]:
    """Hit a run with one fault after another at random steps, then repeat it without faults.

    In both runs an early batch has no finite loss. If a disk may be mounted, the run with faults has its own disk.
    """
    home.mkdir()
    disk = home / "disk"
    disk.mkdir()
    small = not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "none", disk], check=False).returncode
    try:
        return _random_faults(
            home, disk, shards, faults, FAULTS if small else [f for f in FAULTS if f is not fill_disk]
        )
    finally:
        if small:
            subprocess.run(["umount", "--lazy", disk], check=True)  # a killed worker may still use it


def _random_faults(home: Path, disk: Path, shards: Path, faults: int, kinds: list[Fault]) -> list[Row]:
    random.seed(draw_seed())
    tree = recipe(
        shards,
        cluster={"nodes": 2, "workers_per_node": 1, "hang_timeout": 20, "max_failures": 10 * faults},
        checkpoint={"every": f"{INTERVAL} steps"},
    )
    tree["phases"][0]["steps"], tree["phases"][1]["steps"] = 15 * faults, 6
    toy = write(home / "toy.yaml", tree)
    with LoopbackCluster(3, path=POISON) as cluster:
        job = _Job(cluster, toy, disk / "run")
        outcomes = []
        for number in range(1, faults + 1):
            outcomes.append(_cause(random.choice(kinds), job))
            print(f"{number:>3}/{faults} {outcomes[-1]}", flush=True)
        job.finish()
        assert "step_skipped" in events(job.directory), "no batch was poisoned"
        clean = _Job(cluster, toy, home / "clean")
        clean.finish()
    changed = 0
    try:
        assert_same_run(job.directory, clean.directory)
    except AssertionError as error:
        changed = faults
        print(f"the run differs from the undisturbed one: {error}")
    return _rows(outcomes, changed)


@dataclass(frozen=True)
class _Outcome:
    """Effect of one fault."""

    fault: Fault
    step: int
    """Last completed step when the fault began."""
    noticed: float
    """Seconds until Detour noticed the fault."""
    recovered: float
    """Seconds until the first new step."""
    recomputed: int
    """Steps that were done twice."""

    def __str__(self) -> str:
        times = f"noticed {self.noticed:5.1f} s  going on {self.recovered:5.1f} s"
        return f"step {self.step:>4}  {self.fault.__name__:<28}{times}  {self.recomputed} steps recomputed"


def _cause(fault: Fault, job: _Job) -> _Outcome:
    """Cause a fault at a random step, and wait for the first new step."""
    job.wait_for_step(max([0, *steps(job.directory)]) + random.randint(2, 8))
    reached, began = max(steps(job.directory)), time.time()
    noticed = fault(job)
    recomputed = 0
    if fault is fill_disk:  # it ends no worker; training continues without checkpoints until there is room
        job.wait_for_event("checkpoint_saved", since=noticed, count=2)  # two, because the next fault may damage one
    else:
        recomputed = max(0, reached - job.wait_for_event("resumed", since=began)["step"])
    job.wait_for_step(reached + 1)
    return _Outcome(fault, reached, noticed - began, time.time() - began, recomputed)


def _rows(outcomes: Sequence[_Outcome], changed: int) -> list[Row]:
    recovered = sorted(outcome.recovered for outcome in outcomes)
    each: list[Row] = []
    for number, outcome in enumerate(outcomes, 1):
        name = f"fault {number}: {outcome.fault.__name__} at step {outcome.step}"
        each += [_part(f"{name}, noticed", outcome.noticed), _part(f"{name}, going on", outcome.recovered)]

    def most(damage: bool) -> int:
        return max((outcome.recomputed for outcome in outcomes if (outcome.fault in DAMAGE) == damage), default=0)

    return [
        Row.at_most("faults that changed the result", changed, len(outcomes), 0, "faults"),
        Row.at_most("steps recomputed after a fault, most", most(damage=False), INTERVAL, 1, "steps"),
        Row.at_most("steps recomputed, newest checkpoint damaged", most(damage=True), 2 * INTERVAL, 1, "steps"),
        _part("fault to the first new step, median", recovered[len(recovered) // 2]),
        _part("fault to the first new step, longest", recovered[-1]),
        *each,
    ]


class _Job:
    """A run on the cluster, which is submitted again when its driver has ended."""

    def __init__(self, cluster: LoopbackCluster, toy: Path, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self._command: list[str | Path] = [*TRAIN, toy, "--output", directory]
        self._open()

    def _open(self) -> None:
        self._context = started(*self._command, cwd=self.directory.parent, env=self.cluster.environment)
        self.process = self._context.__enter__()

    def close(self) -> None:
        self._context.__exit__(None, None, None)

    def submit_again(self) -> None:
        self.close()
        self._open()

    def finish(self) -> None:
        assert self.process.wait(1800) == 0
        self.close()

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: max([0, *steps(self.directory)]) >= step, self.process, timeout=600)

    def wait_for_event(self, kind: str, since: float, count: int = 1) -> dict[str, Any]:
        """Wait for `count` events of a kind after a time; return the last of them."""

        def last() -> dict[str, Any] | None:
            matching = [event for event in lines(RunDirectory(self.directory).events) if event["event"] == kind]
            return matching[-1] if len(matching) >= count and _time(matching[-count]) > since else None

        event: dict[str, Any] = wait_for(last, self.process, timeout=600)
        return event

    def member(self, index: int) -> tuple[psutil.Process, LoopbackNode]:
        """Return a worker and its node; the worker on the head node has index 0."""
        return sorted(self.cluster.workers().items(), key=lambda item: item[1].address)[index]


def kill_worker(job: _Job) -> float:
    began = time.time()
    job.member(random.choice([0, -1]))[0].kill()
    return _time(job.wait_for_event("worker_failed", began))


def stop_worker(job: _Job) -> float:
    """Suspend a worker, which is then alive without progress."""
    began = time.time()
    job.member(random.choice([0, -1]))[0].suspend()
    return _time(job.wait_for_event("worker_failed", began))


def kill_node(job: _Job) -> float:
    began = time.time()
    job.cluster.kill_node(job.member(-1)[1])
    noticed = _time(job.wait_for_event("worker_failed", began))
    job.cluster.add_node()
    return noticed


def drain_node(job: _Job) -> float:
    began = time.time()
    node = job.member(-1)[1]
    job.cluster.drain_node(node, seconds=60)
    noticed = _time(job.wait_for_event("preempted", began))
    job.cluster.kill_node(node)
    job.cluster.add_node()
    return noticed


def kill_driver(job: _Job) -> float:
    job.process.kill()
    job.process.wait()
    job.submit_again()
    return time.time()


def terminate_driver(job: _Job) -> float:
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(300) == 75
    noticed = time.time()
    job.submit_again()
    return noticed


def truncate_newest_checkpoint(job: _Job) -> float:
    """Shorten a file of the newest checkpoint, after a kill of the driver, so that the checkpoint is needed."""
    job.process.kill()
    job.process.wait()
    saved = sorted(RunDirectory(job.directory).checkpoints.glob("step-*"))
    if len(saved) > 1:
        victim = max(saved[-1].glob("*.distcp"))
        victim.write_bytes(victim.read_bytes()[:-1])
    job.submit_again()
    return time.time()


def delete_newest_checkpoint(job: _Job) -> float:
    """Delete the newest checkpoint, after a kill of the driver, so that the checkpoint is needed."""
    job.process.kill()
    job.process.wait()
    saved = sorted(RunDirectory(job.directory).checkpoints.glob("step-*"))
    if len(saved) > 1:
        shutil.rmtree(saved[-1])
    job.submit_again()
    return time.time()


def kill_worker_in_save(job: _Job) -> float:
    """Kill rank 0, which ends the save. On a toy the kill may come too late."""
    checkpoints = RunDirectory(job.directory).checkpoints
    wait_for(lambda: list(checkpoints.glob(".step-*.partial")), job.process, pause=0.001)
    began = time.time()
    job.member(0)[0].kill()
    return _time(job.wait_for_event("worker_failed", began))


def fill_disk(job: _Job) -> float:
    """Fill the disk until a checkpoint has failed, but leave room for the logs."""
    began = time.time()
    filler = job.directory.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**12))
        file.truncate(file.tell() - 2**18)
    noticed = _time(job.wait_for_event("checkpoint_failed", began))
    filler.unlink()
    return noticed


Fault = Callable[[_Job], float]
"""Causes a fault, and returns the time at which it was noticed."""
FAULTS: list[Fault] = [
    kill_worker,
    stop_worker,
    kill_node,
    drain_node,
    kill_driver,
    terminate_driver,
    truncate_newest_checkpoint,
    delete_newest_checkpoint,
    kill_worker_in_save,
    fill_disk,
]

DAMAGE: set[Fault] = {truncate_newest_checkpoint, delete_newest_checkpoint}
"""Faults after which the checkpoint before the newest is loaded."""


def _when(condition: Callable[[], Any], job: psutil.Popen) -> float:
    wait_for(condition, job)
    return time.time()


def _event(directory: Path, kind: str, number: int = 0) -> dict[str, Any]:
    matching = [event for event in lines(RunDirectory(directory).events) if event["event"] == kind]
    return matching[number] if matching else {}


def _time(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _part(name: str, seconds: float) -> Row:
    return Row(name, seconds, 0.0, 0.0, None, "s", None)


if __name__ == "__main__":
    main()
