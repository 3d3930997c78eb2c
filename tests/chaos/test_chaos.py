"""One run on a real cluster of several nodes, to which everything happens: it ends as if nothing had."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.chaos.loopback import LoopbackCluster, LoopbackNode
from tests.launcher.toy import TRAIN, assert_same_run, events, lines, recipe, started, steps, wait_for

STEPS = (30, 10)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LoopbackCluster]:
    with LoopbackCluster(3) as cluster:
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

    with started(*command, cwd=tmp_path, env=cluster.environment) as job:
        wait_for(lambda: 3 in steps(directory), job)
        member(0)[0].kill()
        wait_for(lambda: "died" in failures(), job)

        wait_for(lambda: 7 in steps(directory), job)
        member(-1)[0].suspend()
        wait_for(lambda: "hung" in failures(), job)

        wait_for(lambda: 12 in steps(directory), job)
        before = len(failures())
        cluster.kill_node(member(-1)[1])
        wait_for(lambda: len(failures()) > before, job)
        assert failures()[before] in ("node_lost", "died")

        wait_for(lambda: 17 in steps(directory), job)
        cluster.add_node()
        cluster.drain_node(member(-1)[1], seconds=600)
        preempted = wait_for(lambda: [e for e in lines(directory / "events.jsonl") if e["event"] == "preempted"], job)
        assert preempted[0]["step"] == steps(directory)[-1], "saved before it left"

        wait_for(lambda: 22 in steps(directory), job)
        job.kill()
        job.wait()

    with started(*command, cwd=tmp_path, env=cluster.environment) as job:
        wait_for(lambda: 27 in steps(directory), job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(200) == 75
    newest = max((directory / "checkpoints").glob("step-*/*.distcp"))
    newest.write_bytes(newest.read_bytes()[:-1])

    with started(*command, cwd=tmp_path, env=cluster.environment) as job:
        assert job.wait(900) == 0
    assert "checkpoint_damaged" in events(directory)
    assert_same_run(directory, undisturbed_on_nodes)
