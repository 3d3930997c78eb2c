"""One run on a real cluster of several nodes, to which everything happens: it ends as if nothing had."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from monitoring.telemetry import Telemetry
from tests.chaos.loopback import LoopbackCluster, LoopbackNode
from tests.chaos.seed import drawn
from tests.launcher.toy import TRAIN, assert_same_run, events, lines, recipe, started, steps, until, wait_for, write

pytestmark = pytest.mark.chaos
STEPS = (150, 10)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LoopbackCluster]:
    with LoopbackCluster(4) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed_on_nodes(cluster: LoopbackCluster, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of STEPS on two nodes that nothing happened to; its recipe lies beside it."""
    home = tmp_path_factory.mktemp("nodes")
    tree = recipe(
        toy_shards,
        cluster={"nodes": 2, "workers_per_node": 1, "hang_timeout": 45, "max_failures": 20},
        checkpoint={"every": "5 steps"},
    )
    for phase, length in zip(tree["phases"], STEPS, strict=True):
        phase["steps"] = length
    (home / "toy.yaml").write_text(yaml.safe_dump(tree))
    command: list[str | Path] = [*TRAIN, home / "toy.yaml", "--output", home / "run"]
    subprocess.run(command, cwd=home, env=cluster.environment, check=True, timeout=900)
    return home / "run"


@pytest.mark.timeout(1800)
def test_everything_happens_to_one_run(cluster: LoopbackCluster, undisturbed_on_nodes: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    command: list[str | Path] = [*TRAIN, undisturbed_on_nodes.parent / "toy.yaml", "--output", directory]

    def failures() -> list[str]:
        return [event["reason"] for event in lines(directory / "events.jsonl") if event["event"] == "worker_failed"]

    def member(index: int) -> tuple[psutil.Process, LoopbackNode]:
        """A worker and its node; the last is never on the head."""
        return sorted(cluster.workers().items(), key=lambda item: item[1].address)[index]

    draw = drawn()

    def advance() -> None:
        """Wait for some steps more than there are now."""
        step = max([0, *steps(directory)]) + draw.randint(1, 8)
        wait_for(lambda: max([0, *steps(directory)]) >= step, job)

    with started(*command, cwd=tmp_path, env=cluster.environment) as job:
        advance()
        member(0)[0].kill()
        wait_for(lambda: "died" in failures(), job)

        advance()
        member(-1)[0].suspend()
        wait_for(lambda: "hung" in failures(), job)

        advance()
        before = len(failures())
        cluster.kill_node(member(-1)[1])
        wait_for(lambda: len(failures()) > before, job)
        assert failures()[before] in ("node_lost", "died")

        advance()
        cluster.drain_node(member(-1)[1], seconds=600)
        preempted = wait_for(lambda: [e for e in lines(directory / "events.jsonl") if e["event"] == "preempted"], job)
        assert preempted[0]["step"] == steps(directory)[-1], "saved before it left"

        advance()
        job.kill()
        job.wait()
    shutil.rmtree(max((directory / "checkpoints").glob("step-*")))

    with started(*command, cwd=tmp_path, env=cluster.environment) as job:
        advance()
        job.send_signal(signal.SIGTERM)
        assert job.wait(200) == 75
    assert steps(directory)[-1] < sum(STEPS), "it was stopped on its way"
    newest = max((directory / "checkpoints").glob("step-*/*.distcp"))
    newest.write_bytes(newest.read_bytes()[:-1])

    with started(*command, cwd=tmp_path, env=cluster.environment) as job:
        assert job.wait(900) == 0
    assert "checkpoint_damaged" in events(directory)
    assert_same_run(directory, undisturbed_on_nodes)


@pytest.mark.timeout(1800)
def test_submitted_job_is_stopped_and_submitted_again(undisturbed_on_nodes: Path, tmp_path: Path) -> None:
    """Through the job server, on one node: on one machine, each of several would clear the work of the others."""
    with LoopbackCluster(1, cpus=2) as cluster:
        submit_stop_and_submit(cluster, undisturbed_on_nodes, tmp_path)


def submit_stop_and_submit(cluster: LoopbackCluster, undisturbed_on_nodes: Path, tmp_path: Path) -> None:
    directory, sources = tmp_path / "run", tmp_path / "sources"
    sources.mkdir()
    shutil.copy(undisturbed_on_nodes.parent / "toy.yaml", sources)
    train = Path(sys.executable).parent / "detour-train"

    def submit(name: str, *options: str) -> str:
        words: list[str | Path] = ["--submission-id", name, "--working-dir", sources, *options, "--"]
        keys = ["cluster.workers_per_node=2"]
        return cluster.job("submit", *words, train, "toy.yaml", *keys, "--nodes", "1", "--output", directory)

    submit("first", "--no-wait")
    until(lambda: 3 in steps(directory))
    cluster.job("stop", "first")
    saved = max(line["step"] for line in lines(directory / "events.jsonl") if line["event"] == "checkpoint_saved")
    assert steps(directory)[-1] == saved < sum(STEPS)
    assert "all saved" in cluster.job("logs", "first")
    assert "is complete" in submit("second")
    assert_same_run(directory, undisturbed_on_nodes)


@pytest.mark.timeout(1800)
def test_run_goes_on_with_the_nodes_left_and_grows_again(
    cluster: LoopbackCluster, undisturbed_on_nodes: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    command: list[str | Path] = [*TRAIN, undisturbed_on_nodes.parent / "toy.yaml", "--output", directory]

    def sizes() -> list[int]:
        begun = [event for event in lines(directory / "events.jsonl") if event["event"] == "workers_started"]
        return [len(event["workers"]) for event in begun]

    with started(*command, "cluster.nodes=[1,2]", cwd=tmp_path, env=cluster.environment) as job:
        wait_for(lambda: 3 in steps(directory), job)
        cluster.kill_node(max(cluster.workers().values(), key=lambda node: node.address))
        wait_for(lambda: sizes() == [2, 1], job)
        wait_for(lambda: 8 in steps(directory), job)
        cluster.add_node()
        wait_for(lambda: sizes() == [2, 1, 2], job)
        assert job.wait(900) == 0
    assert steps(directory) == list(range(1, sum(STEPS) + 1))
    for mine, theirs in zip(
        lines(directory / "metrics.jsonl"), lines(undisturbed_on_nodes / "metrics.jsonl"), strict=True
    ):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.timeout(1800)
def test_worker_killed_while_it_saves(cluster: LoopbackCluster, undisturbed_on_nodes: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    command: list[str | Path] = [*TRAIN, undisturbed_on_nodes.parent / "toy.yaml", "--output", directory]

    def failures() -> int:
        return events(directory).count("worker_failed")

    with started(*command, cwd=tmp_path, env=cluster.environment) as job:
        for attempt in range(1, 9):  # a save of a toy takes a blink: the kill may come after its end
            wait_for(lambda: len(cluster.workers()) == 2, job)
            victim = min(cluster.workers().items(), key=lambda item: item[1].address)[0]  # rank 0, which ends the save
            wait_for(lambda: list((directory / "checkpoints").glob(".step-*.partial")), job, pause=0.001)
            victim.kill()
            wait_for(lambda n=attempt: failures() == n, job)
            half = [path.name for path in (directory / "checkpoints").glob(".step-*.partial")]
            wait_for(lambda n=attempt: events(directory).count("resumed") == n, job)
            if half:
                break
        assert half, "no kill met a save"
        assert job.wait(900) == 0
    assert_same_run(directory, undisturbed_on_nodes)


@pytest.mark.timeout(1800)
def test_disk_full_for_a_while(cluster: LoopbackCluster, undisturbed_on_nodes: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "none", disk], check=False).returncode:
        pytest.skip("a disk of 400 MB needs the right to mount")
    directory, checkpoints = disk / "run", disk / "run" / "checkpoints"
    command: list[str | Path] = [*TRAIN, undisturbed_on_nodes.parent / "toy.yaml", "--output", directory]
    try:
        with started(*command, cwd=tmp_path, env=cluster.environment) as job:
            wait_for(lambda: "checkpoint_saved" in events(directory), job)
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:  # nothing is left for the logs either
                    file.write(bytes(2**12))

            def failed() -> int:
                now = Telemetry.read(directory)
                return now.unwritten.get("checkpoint_failed", 0) if now else 0

            wait_for(lambda: failed() >= 2, job)
            kept = list(checkpoints.glob("step-*"))
            assert kept, "the newest good one stays"
            filler.unlink()
            saved = events(directory).count("checkpoint_saved")
            wait_for(lambda: events(directory).count("checkpoint_saved") > saved, job)
            assert job.wait(900) == 0
        assert events(directory).count("checkpoint_failed") >= 2, "written once there was room"
        assert "worker_failed" not in events(directory), "training goes on"
        assert_same_run(directory, undisturbed_on_nodes)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.timeout(1800)
def test_shards_damaged_on_the_way(
    cluster: LoopbackCluster, undisturbed_on_nodes: Path, toy_shards: Path, tmp_path: Path
) -> None:
    """The run stops with the shard's name before a step is trained on it, and goes on once it is whole again."""
    directory, shards = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(toy_shards, shards)
    command: list[str | Path] = [*TRAIN, undisturbed_on_nodes.parent / "toy.yaml", "--output", directory]
    command += [f"data.sources.0.shards={shards}"]

    def invert() -> None:
        for path in shards.glob("*.tar"):
            content = np.fromfile(path, dtype=np.uint8)
            with path.open("r+b") as file:  # in place: the workers have it open
                file.write((~content).tobytes())

    with started(*command, cwd=tmp_path, env=cluster.environment) as job:
        wait_for(lambda: 3 in steps(directory), job)
        invert()
        assert job.wait(300) == 2
    message = (tmp_path / "output.txt").read_text()
    assert re.search(r"shard \S+/\d+\.tar, document \d+: ", message), message
    assert "Traceback" not in message
    assert steps(directory)[-1] < sum(STEPS)
    invert()
    with started(*command, cwd=tmp_path, env=cluster.environment) as job:
        assert job.wait(900) == 0
    assert_same_run(directory, undisturbed_on_nodes)


@pytest.mark.timeout(1800)
def test_poisoned_batch(toy_shards: Path, tmp_path: Path) -> None:
    """A step without a finite loss is left out, and again after the worker that left it out was killed."""
    tree = recipe(toy_shards, cluster={"nodes": 2, "workers_per_node": 1}, checkpoint={"every": "30 steps"})
    tree["phases"][0]["steps"] = 50
    runs = tmp_path / "undisturbed", tmp_path / "killed"
    with LoopbackCluster(2, path=Path(__file__).parent / "poison") as cluster:
        for directory in runs:
            command = [*TRAIN, write(tmp_path / "toy.yaml", tree), "--output", directory]
            with started(*command, cwd=tmp_path, env=cluster.environment) as job:
                wait_for(lambda d=directory: "step_skipped" in events(d), job)
                if directory.name == "killed":
                    next(iter(cluster.workers())).kill()
                assert job.wait(900) == 0
    undisturbed, killed = runs
    assert events(undisturbed).count("step_skipped") == 1
    assert events(killed).count("step_skipped") == 2, "before the kill, and after it: there was no checkpoint yet"
    assert [line["step"] for line in lines(killed / "metrics.jsonl") if line["loss"] is None] == [4]
    assert_same_run(killed, undisturbed)


def test_more_nodes_than_the_cluster_has(cluster: LoopbackCluster, undisturbed_on_nodes: Path, tmp_path: Path) -> None:
    overrides = ["cluster.start_timeout=3", "data.streams=8", "batch.micro=1"]
    command: list[str | Path] = [*TRAIN, undisturbed_on_nodes.parent / "toy.yaml", "--nodes", "8", *overrides]
    result = subprocess.run(command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stderr
    assert re.search(
        r"cluster\.nodes: asked for 8 nodes with 1 CPU each.*waited 3 s.*The cluster has \d nodes: 127\.0\.0\.\d",
        result.stderr,
    ), result.stderr
    assert "Traceback" not in result.stderr
