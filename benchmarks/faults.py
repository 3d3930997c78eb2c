"""What starting, saving and failing cost, and whether any fault costs a step.

A toy run on a real Ray cluster of several raylets, to which one random fault after another happens, is compared with
the same run without any. The peers are bars in seconds or steps; the rows named "part" say where the time above went.

    python -m benchmarks.faults [--quick] [--json FILE]
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cpu_vs_transformers import MODEL
from benchmarks.table import Row, arguments, report
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

SAMPLE = "package://corpus/tico19_en.jsonl.gz"
POISON = Path(__file__).parents[1] / "tests/chaos/poison"
"""On Python's path, it spoils one batch."""
INTERVAL = 5
"""Steps between two checkpoints of the run that faults happen to."""


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
        rows += random_faults(home / "nodes", shards, faults=5 if options.quick else 20)
    report(rows, options.json)


def cold_start_and_kill(home: Path, shards: Path) -> list[Row]:
    """On a local cluster: from the command to the first step, and from a killed worker to the first new step."""
    home.mkdir()
    tree = recipe(shards, checkpoint={"every": "10 steps"})
    tree["phases"][0]["steps"] = 60
    directory = home / "run"
    began = time.time()
    with started(*TRAIN, write(home / "toy.yaml", tree), "--output", directory, cwd=home) as job:
        first_step = _when(lambda: 1 in steps(directory), job)
        start = _event(directory, "workers_started")
        wait_for(lambda: 15 in steps(directory), job)
        last = max(steps(directory))
        killed = time.time()
        workers(job)[-1].kill()
        failed = wait_for(lambda: _event(directory, "worker_failed"), job)
        wait_for(lambda: _event(directory, "resumed"), job)
        again = _event(directory, "workers_started", -1)
        new_step = _when(lambda: max(steps(directory)) > last, job)
        assert job.wait(600) == 0
    ready = _time(start) - start["seconds"]
    return [
        Row.at_most("cold start to the first step", first_step - began, 20, 1, "s"),
        _part("part: imports, checks, Ray", ready - began),
        _part("part: workers placed, started, imported", start["seconds"]),
        _part("part: model, data, first step", first_step - _time(start)),
        Row.at_most("worker killed to the first new step", new_step - killed, 20, 1, "s"),
        _part("part: noticed", _time(failed) - killed),
        _part("part: workers placed, started, imported", _time(again) - _time(failed)),
        _part("part: model, checkpoint, recomputed steps", new_step - _time(again)),
        _stall("training stall of asynchronous checkpoints, toy", directory),
    ]


def stall_of_a_larger_model(home: Path, shards: Path) -> Row:
    """17 M parameters, 200 MB a checkpoint: what of a save stands in the way of training once it is not all plan."""
    home.mkdir()
    tree = recipe(shards, model=MODEL, checkpoint={"every": "5 steps"}, batch={"sequences": 4, "micro": 1})
    tree["phases"][0]["steps"], tree["phases"][1]["steps"] = 29, 1
    result = run(*TRAIN, write(home / "larger.yaml", tree), "--output", home / "run", cwd=home)
    assert result.returncode == 0, result.stderr
    return _stall("training stall of asynchronous checkpoints, 17 M", home / "run")


def _stall(name: str, directory: Path) -> Row:
    """Over the saves that training went on behind; at the end of a phase it waits for them."""
    saves = [event for event in lines(directory / "events.jsonl") if event["event"] == "checkpoint_saved"]
    stall, seconds = (sum(save[key] for save in saves[:-2]) for key in ("stall_seconds", "seconds"))
    return Row.at_most(name, stall, seconds, 0.1, "s of saving")


def random_faults(home: Path, shards: Path, faults: int) -> list[Row]:
    """On a cluster of raylets: one fault after another at random steps; then the same run without any.

    In both, a batch early on has no finite loss. The run with faults lies on a disk of its own, if one may be mounted.
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
            subprocess.run(["umount", "--lazy", disk], check=True)  # a killed worker may not have left it yet


def _random_faults(home: Path, disk: Path, shards: Path, faults: int, kinds: list[Fault]) -> list[Row]:
    seed = random.randrange(2**32)
    print(f"faults drawn from seed {seed}", flush=True)
    draw = random.Random(seed)
    tree = recipe(
        shards,
        cluster={"nodes": 2, "workers_per_node": 1, "hang_timeout": 20, "max_failures": 10 * faults},
        checkpoint={"every": f"{INTERVAL} steps"},
    )
    tree["phases"][0]["steps"], tree["phases"][1]["steps"] = 15 * faults, 6
    toy = write(home / "toy.yaml", tree)
    recomputed: dict[Fault, int] = dict.fromkeys(kinds, 0)
    recovery, lost, each = [], 0, []
    with LoopbackCluster(3, path=POISON) as cluster:
        job = _Job(cluster, toy, disk / "run")
        for number in range(faults):
            fault = draw.choice(kinds)
            at = max([0, *steps(job.directory)]) + draw.randint(2, 8)
            job.wait_for_step(at)
            reached, began = max(steps(job.directory)), time.time()
            print(f"{number + 1:>3}/{faults} step {reached:>4}  {fault.__name__:<28}", end="", flush=True)
            noticed = fault(job)
            if fault is fill_disk:  # it ends no worker: the training goes on without checkpoints, until there is room
                again = 0
                job.wait_for_event("checkpoint_saved", since=noticed, count=2)  # the next fault may damage one
            else:
                again = max(0, reached - job.wait_for_event("resumed", since=began)["step"])
            job.wait_for_step(reached + 1)
            back = time.time() - began
            recomputed[fault] = max(recomputed[fault], again)
            recovery.append(back)
            name = f"fault {number + 1}: {fault.__name__} at step {reached}"
            each += [_part(f"{name}, noticed", noticed - began), _part(f"{name}, going on", back)]
            print(f"noticed {noticed - began:5.1f} s  going on {back:5.1f} s  {again} steps recomputed", flush=True)
        job.finish()
        assert "step_skipped" in events(job.directory), "no batch was poisoned"
        clean = _Job(cluster, toy, home / "clean")
        clean.finish()
    try:
        assert_same_run(job.directory, clean.directory)
    except AssertionError as error:
        lost = faults
        print(f"the run differs from the undisturbed one: {error}")
    recovery.sort()

    def most(faults: Iterable[Fault]) -> int:
        return max(recomputed[fault] for fault in faults)

    return [
        Row.at_most("faults that changed the result", lost, faults, 0, "faults"),
        Row.at_most("steps recomputed after a fault, most", most(set(kinds) - DAMAGE), INTERVAL, 1, "steps"),
        Row.at_most("steps recomputed, newest checkpoint damaged", most(DAMAGE), 2 * INTERVAL, 1, "steps"),
        _part("fault to the first new step, median", recovery[len(recovery) // 2]),
        _part("fault to the first new step, longest", recovery[-1]),
        *each,
    ]


class _Job:
    """A run on the cluster, submitted again whenever its driver has gone."""

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
        """The last of at least `count` of them."""

        def found() -> dict[str, Any] | None:
            those = [event for event in lines(self.directory / "events.jsonl") if event["event"] == kind]
            return those[-1] if len(those) >= count and _time(those[-count]) > since else None

        event: dict[str, Any] = wait_for(found, self.process, timeout=600)
        return event

    def member(self, index: int) -> tuple[psutil.Process, LoopbackNode]:
        """A worker and its node, the head's first."""
        return sorted(self.cluster.workers().items(), key=lambda item: item[1].address)[index]


def kill_worker(job: _Job) -> float:
    began = time.time()
    job.member(random.choice([0, -1]))[0].kill()
    return _time(job.wait_for_event("worker_failed", began))


def stop_worker(job: _Job) -> float:
    """SIGSTOP: alive, and gets nowhere."""
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
    """And kill the driver, so that it is needed."""
    job.process.kill()
    job.process.wait()
    saved = sorted((job.directory / "checkpoints").glob("step-*"))
    if len(saved) > 1:
        victim = max(saved[-1].glob("*.distcp"))
        victim.write_bytes(victim.read_bytes()[:-1])
    job.submit_again()
    return time.time()


def delete_newest_checkpoint(job: _Job) -> float:
    """And kill the driver, so that it is needed."""
    job.process.kill()
    job.process.wait()
    saved = sorted((job.directory / "checkpoints").glob("step-*"))
    if len(saved) > 1:
        shutil.rmtree(saved[-1])
    job.submit_again()
    return time.time()


def kill_worker_in_save(job: _Job) -> float:
    """Rank 0, which ends the save; on a toy the kill may come a blink too late."""
    saving = job.directory / "checkpoints"
    wait_for(lambda: list(saving.glob(".step-*.partial")), job.process, pause=0.001)
    began = time.time()
    job.member(0)[0].kill()
    return _time(job.wait_for_event("worker_failed", began))


def fill_disk(job: _Job) -> float:
    """Until a checkpoint has failed; there is room left for the logs (tests/chaos fills a disk to the last byte)."""
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
"""Does it, and says when it was noticed."""
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
"""What they leave is the checkpoint before the newest."""


def _when(condition: Callable[[], Any], job: psutil.Popen) -> float:
    wait_for(condition, job)
    return time.time()


def _event(directory: Path, kind: str, number: int = 0) -> dict[str, Any]:
    found = [event for event in lines(directory / "events.jsonl") if event["event"] == kind]
    return found[number] if found else {}


def _time(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _part(name: str, seconds: float) -> Row:
    return Row(name, seconds, 0.0, 0.0, None, "s", None)


if __name__ == "__main__":
    main()
