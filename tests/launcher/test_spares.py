"""Spare workers on a real Ray of one node: who takes over, who does not, and what a spare holds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from configs.load import load_config
from launcher.claim import claim
from launcher.cluster import connect
from launcher.nodes import Node, alive_nodes
from launcher.spares import Spares
from launcher.topology import Topology
from launcher.worker import WorkerInfo
from launcher.worker_group import WorkerGroup
from tests.launcher.toy import until

VARIES = {"RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_CLIENT_MODE", "PWD", "OLDPWD"}
"""Variables of a process that no library of the trainer reads."""


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    """The only node of a local Ray with two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connect(local_workers=2):
            yield alive_nodes()[0]


def ask(actor: Any, question: Any) -> Any:
    """Answer a question about an actor in its process."""
    return ray.get(actor.__ray_call__.remote(question), timeout=300)


def state(_: Any) -> tuple[dict[str, str], int, bool]:
    import torch

    return dict(os.environ), torch.get_num_threads(), "engine.trainer" in sys.modules


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


def test_a_lost_worker_is_replaced_by_a_spare_that_is_like_it(here: Node, tmp_path: Path) -> None:
    config, one = load_config("demo"), Topology(1, 1, gpu=False)
    with closing(Spares()) as spares, claim(tmp_path / "run", config):

        def start() -> WorkerGroup:
            return WorkerGroup(one, config, tmp_path / "run", tmp_path, spares, lambda: None)

        with start() as group:
            assert group.spares == 0
            free = free_cpus()
            spares.start(group.workers, [here])
            ((spare, warm_up),) = spares._by_node[here.id]
            pid = ask(spare, lambda _: os.getpid())
            ray.get(warm_up)
            assert free_cpus() == free, "a spare holds no CPU of Ray's"
            fresh = state_of(group)
            psutil.Process(group.workers[0].pid).kill()
        with start() as group:
            assert group.spares == 1 and group.workers[0].pid == pid
            environment, threads, imported = state_of(group)
            differing = {key for key, value in fresh[0].items() ^ environment.items()}
            assert not differing - VARIES
            assert (threads, imported) == fresh[1:] and imported
    until(lambda: not psutil.pid_exists(pid))


def state_of(group: WorkerGroup) -> tuple[dict[str, str], int, bool]:
    answer: tuple[dict[str, str], int, bool] = ask(group._actors[0], state)
    return answer


def test_a_spare_that_died_or_has_other_code_is_not_used(here: Node) -> None:
    """These spares are those of a node with a GPU, which import torch only."""
    with_gpu = Node(here.id, here.address, here.port, here.cpus, gpus=2)
    workers = [WorkerInfo(here.id, here.address, (gpu,)) for gpu in ("0", "1")]
    with closing(Spares()) as spares:
        spares.start(workers, [with_gpu])
        started = spares._by_node[here.id]
        (dead, _), (alive, _) = started
        ray.get([warm_up for _, warm_up in started])
        pids = [ask(actor, lambda _: os.getpid()) for actor, _ in started]
        assert not ask(alive, lambda _: sys.modules["torch"].cuda.is_initialized()), "it holds no memory of a GPU"
        assert not ask(alive, state)[2], "other packages may open a GPU"
        psutil.Process(pids[0]).kill()
        until(lambda: not psutil.pid_exists(pids[0]))
        assert spares.take([here.id], 1, "/") == {here.id: [alive]} and dead is not alive
        spares._by_node = {here.id: [started[1]]}
        ask(alive, lambda spare: spare._worker._code_before[0].update({"engine/step.py": "of yesterday"}))
        assert spares.take([here.id], 1, "/") == {}
        until(lambda: not psutil.pid_exists(pids[1]))


def test_a_node_whose_gpus_are_not_all_the_runs_gets_no_spare(here: Node) -> None:
    shared = Node(here.id, here.address, here.port, here.cpus, gpus=8)
    with closing(Spares()) as spares:
        spares.start([WorkerInfo(here.id, here.address, ("0",))], [shared])
        assert not spares._by_node
