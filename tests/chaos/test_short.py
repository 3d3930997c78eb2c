"""The part of the chaos suite that every check runs: two faults to a job on a real cluster of three nodes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.chaos.loopback import LoopbackCluster
from tests.chaos.seed import drawn
from tests.launcher.toy import assert_same_run, events, lines, recipe, steps, until, write


@pytest.mark.timeout(1800)  # a minute and a half on two idle cores
def test_submitted_job_loses_a_worker_and_then_a_node(toy_shards: Path, tmp_path: Path) -> None:
    tree = recipe(toy_shards, cluster={"nodes": 2, "workers_per_node": 1}, checkpoint={"every": "5 steps"})
    tree["phases"][0]["steps"] = 24
    path = write(tmp_path / "toy.yaml", tree)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    draw = drawn()
    with LoopbackCluster(3) as cluster:

        def submit(directory: Path) -> None:
            train = Path(sys.executable).parent / "detour-train"
            words = ["--submission-id", directory.name, "--no-wait", "--", train, path, "--output", directory]
            cluster.job("submit", *words)

        def reach(step: int) -> None:
            until(lambda: max([0, *steps(disturbed)]) >= step)

        submit(undisturbed)
        until(lambda: "finished" in events(undisturbed))
        submit(disturbed)
        reach(draw.randint(1, 8))
        next(iter(cluster.workers())).kill()
        until(lambda: "worker_failed" in events(disturbed))
        reach(max(steps(disturbed)) + draw.randint(1, 8))
        cluster.kill_node(max(cluster.workers().values(), key=lambda node: node.address))  # never the head
        until(lambda: "finished" in events(disturbed))
        until(lambda: "is complete" in cluster.job("logs", disturbed.name))
        log = cluster.job("logs", disturbed.name)
    told = re.findall(r"^\d\d:\d\d:\d\d (worker failed|2 workers started|resumed|checkpoint saved)", log, re.MULTILINE)
    assert told.count("worker failed") == told.count("resumed") == 2, log
    assert {"2 workers started", "checkpoint saved"} <= set(told) and "interrupted 2 times" in log
    reasons = [event["reason"] for event in lines(disturbed / "events.jsonl") if event["event"] == "worker_failed"]
    assert reasons[0] == "died" and len(reasons) == 2
    assert_same_run(disturbed, undisturbed)
