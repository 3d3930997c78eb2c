"""Runs on eight nodes, and the story that their logs tell of every fault."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from monitoring.discovery import live_targets
from monitoring.run_directory import RunDirectory
from tests.chaos.loopback import LoopbackCluster, LoopbackNode
from tests.chaos.seed import drawn
from tests.launcher.toy import ROOT, TRAIN, events, lines, recipe, run, started, steps, until, wait_for, write

pytestmark = pytest.mark.chaos
STEPS = (70, 10)
LOSS_DIFFERENCE = 1e-5
"""Largest relative difference of a loss between two data-parallel sizes."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LoopbackCluster]:
    with LoopbackCluster(8) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def namesakes(cluster: LoopbackCluster, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two undisturbed runs of one recipe at once, on two nodes each, with what both endpoints served meanwhile."""
    home = tmp_path_factory.mktemp("namesakes")
    path = write(home / "toy.yaml", eight_recipe(toy_shards, home))
    runs = [home / name for name in ("first", "second")]
    commands = [[*TRAIN, path, "--nodes", "2", "--output", directory] for directory in runs]
    with (
        started(*commands[0], cwd=home, env=cluster.environment) as one,
        started(*commands[1], cwd=home, env=cluster.environment) as other,
    ):
        wait_for(lambda: all(steps(directory) for directory in runs), one)
        for number, group in enumerate(live_targets(home / "targets")):
            metrics = urlopen(f"http://{group['targets'][0]}/metrics", timeout=30).read()
            (home / f"metrics-{number}.txt").write_bytes(metrics)
        assert one.wait(900) == other.wait(900) == 0
    return runs


def eight_recipe(shards: Path, home: Path) -> dict[str, object]:
    """Eight nodes at most, four at least, a pipeline of two."""
    tree = recipe(
        shards,
        cluster={"nodes": [4, 8], "workers_per_node": 1, "grow_every": 0},
        parallel={"pipeline": 2},
        data={"streams": 12},
        batch={"sequences": 12, "micro": 1},
        checkpoint={"every": "5 steps"},
        monitoring={"targets": str(home / "targets")},
    )
    for phase, length in zip(tree["phases"], STEPS, strict=True):
        phase["steps"] = length
    return tree


def test_namesakes_are_two_runs_to_prometheus(namesakes: list[Path]) -> None:
    metrics = [path.read_text() for path in sorted(namesakes[0].parent.glob("metrics-*.txt"))]
    assert len(metrics) == 2
    found = [re.findall(r'^detour_train_step\{id="(\w+)",run="(\w+)"\}', page, re.MULTILINE) for page in metrics]
    assert {one[0] for one in found} == {(RunDirectory(directory).id, "toy") for directory in namesakes}


@pytest.mark.timeout(2400)
def test_submitted_job_tells_the_story_of_every_fault(
    cluster: LoopbackCluster, namesakes: list[Path], tmp_path: Path
) -> None:
    directory, draw = tmp_path / "run", drawn()

    def submit(name: str) -> None:
        train = Path(sys.executable).parent / "detour-train"
        words = ["--submission-id", name, "--no-wait", "--", train, namesakes[0].parent / "toy.yaml"]
        cluster.job("submit", *words, "--output", directory)

    def advance() -> None:
        step = max([0, *steps(directory)]) + draw.randint(1, 6)
        until(lambda: max([0, *steps(directory)]) >= step, timeout=900)

    def sizes() -> list[int]:
        return [
            len(line["workers"]) for line in lines(directory / "events.jsonl") if line["event"] == "workers_started"
        ]

    def last_member() -> tuple[psutil.Process, LoopbackNode]:
        return max(cluster.workers().items(), key=lambda item: int(item[1].address.rpartition(".")[2]))

    submit("first")
    advance()
    lost = last_member()[1]
    cluster.kill_node(lost)
    until(lambda: sizes() == [8, 6], timeout=900)
    advance()
    cluster.add_node()
    until(lambda: sizes() == [8, 6, 8], timeout=900)
    advance()
    cluster.job("stop", "first")
    submit("second")
    until(lambda: sizes() == [8, 6, 8, 8], timeout=900)
    advance()
    cluster.drain_node(last_member()[1], seconds=600)
    until(lambda: "finished" in events(directory), timeout=900)
    until(lambda: "is complete" in cluster.job("logs", "second"))

    assert sizes() == [8, 6, 8, 8, 6]
    first, second = cluster.job("logs", "first"), cluster.job("logs", "second")
    expect(
        first,
        r"8 workers started on 8 nodes, ready after ",
        rf"worker failed after step \d+: node lost, rank \d on {lost.address}: ",
        r"6 workers started on 6 nodes, ",
        r"resumed at step \d+, \d+ steps? lost, ",
        r"resized: nodes have become free; everything is saved at step \d+",
        r"8 workers started on 8 nodes, ",
        r"resumed at step \d+, in ",
        r"stopped early \(signal\); everything is saved at step \d+",
        r"the run was interrupted 2 times \(1 node lost, 1 resized\); \d+ steps? trained again",
    )
    expect(
        second,
        r"8 workers started on 8 nodes, ",
        r"resumed at step \d+, in ",
        r"preempted: a node is about to go; everything is saved at step \d+",
        r"6 workers started on 6 nodes, ",
        r"resumed at step \d+, in ",
        r"the run was interrupted 3 times \(1 node lost, 1 preempted, 1 resized\); ",
    )
    assert steps(directory) == list(range(1, sum(STEPS) + 1))
    for mine, theirs in zip(lines(directory / "metrics.jsonl"), lines(namesakes[0] / "metrics.jsonl"), strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=LOSS_DIFFERENCE)


def expect(log: str, *sentences: str) -> None:
    """The log has a line with the time of day for each of the sentences, in this order."""
    told = [line for line in log.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    position = 0
    for sentence in sentences:
        hits = [number for number, line in enumerate(told) if number >= position and re.match(r"\S+ " + sentence, line)]
        assert hits, f"no line {sentence!r} after {told[position - 1] if position else 'the start'!r}:\n{log}"
        position = hits[0] + 1


@pytest.mark.timeout(1200)
def test_head_is_killed_and_the_same_command_resumes(toy_shards: Path, tmp_path: Path) -> None:
    tree = recipe(toy_shards, cluster={"nodes": 2, "workers_per_node": 1}, checkpoint={"every": "2 steps"})
    tree["phases"][0]["steps"] = 60
    directory = tmp_path / "run"
    command = [*TRAIN, write(tmp_path / "toy.yaml", tree), "--output", directory]
    with (
        LoopbackCluster(2) as cluster,
        started(*command, cwd=tmp_path, env=cluster.environment) as job,
    ):
        wait_for(lambda: 3 in steps(directory), job)
        (head,) = [one for one in cluster.nodes[0].process.children(recursive=True) if one.name() == "gcs_server"]
        head.kill()
        assert job.wait(90) == 75
    assert events(directory)[-1] == "failed" and RunDirectory(directory).report.exists()
    expect(
        (tmp_path / "output.txt").read_text(), r"2 workers started on 2 nodes, ", r"given up after step \d+: the Ray"
    )
    with LoopbackCluster(2) as cluster, started(*command, cwd=tmp_path, env=cluster.environment) as job:
        assert job.wait(900) == 0
    assert "resumed" in events(directory) and steps(directory) == list(range(1, 64))


@pytest.mark.timeout(1800)  # the default of 600 s does not suffice on a busy machine
def test_node_without_the_package_and_node_with_another_version(toy_shards: Path, tmp_path: Path) -> None:
    """Each ends the run with exit code 2, and the message names the node and what is wrong with it."""
    absent, other = tmp_path / "absent", tmp_path / "other"
    absent.mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'detour_train'\")\n"
    (absent / "detour_train.py").write_text(missing)
    for package in ("configs", "datapipe", "engine", "launcher", "monitoring", "studies"):
        shutil.copytree(ROOT / package, other / package)
    shutil.copy(ROOT / "detour_train.py", other)
    with (other / "engine" / "step.py").open("a") as file:
        file.write("# another version\n")
    tree = recipe(toy_shards, cluster={"nodes": 2, "workers_per_node": 1})
    path = write(tmp_path / "toy.yaml", tree)
    with LoopbackCluster(1) as cluster:
        for folder, fault in ((absent, "No module named 'detour_train'"), (other, r"engine/step\.py \(\w+ instead of")):
            node = cluster.add_node(path=folder)
            # The script, because Ray gives workers the folder of the driver's first argument, here the source tree.
            command = [Path(sys.executable).parent / "detour-train", path, "--output", tmp_path / folder.name / "run"]
            refused = run(*command, cwd=tmp_path, env=cluster.environment)
            assert refused.returncode == 2, refused.stdout + refused.stderr
            assert re.search(rf"cluster\.nodes: the node {node.address} .*{fault}", refused.stderr), refused.stderr
            assert "Traceback" not in refused.stderr
            cluster.kill_node(node)
            until(lambda gone=node: gone.address not in cluster.addresses())
