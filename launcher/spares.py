"""Spare workers: processes that have imported the trainer and wait for the next attempt.

The import takes most of a restart. It happens while the run trains, so that a failure does not wait for it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import detour_train
from launcher.nodes import Node
from launcher.topology import threads_per_worker
from launcher.worker import WorkerInfo

ANSWER_SECONDS = 3.0
"""Seconds that spares may take to answer before they are used."""


class Spares:
    """The spare workers of a run, which end with its driver. They hold no resources of Ray and no memory of a GPU."""

    def __init__(self) -> None:
        self._by_node: dict[str, list[tuple[Any, Any]]] = {}
        """Actor and the reference of its warm-up, by Ray's id of the node."""

    def start(self, workers: Sequence[WorkerInfo], nodes: Sequence[Node]) -> None:
        """Start a spare for each worker, on its node.

        A spare takes the GPUs of the present workers. Therefore a node gets spares only if the run uses all its GPUs.

        Args:
            workers: The present workers.
            nodes: The nodes of the cluster.
        """
        self.close()
        for node in nodes:
            present = [worker for worker in workers if worker.node == node.id]
            if sum(len(worker.gpus) for worker in present) not in (0, node.gpus):
                continue
            pids = tuple(worker.pid for worker in present)
            strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
            for worker in present:
                threads = threads_per_worker(node.cpus, len(present))
                actor = ray.remote(num_cpus=0, scheduling_strategy=strategy)(detour_train.Worker).remote()
                warm_up = actor.warm_up.remote(worker.gpus, threads, pids)
                self._by_node.setdefault(node.id, []).append((actor, warm_up))

    def take(self, nodes: Collection[str], per_node: int, working_directory: str) -> dict[str, list[Any]]:
        """Hand over the spares of each node that has `per_node` that answer, and end all others.

        A spare does not answer if it has died, or if code of its node has changed since it was started.

        Args:
            nodes: Ray's ids of the nodes.
            per_node: Workers per node.
            working_directory: Argument of `Worker.locate`, the call that a spare has to answer.
        """
        waiting, self._by_node = self._by_node, {}
        calls = {
            actor: actor.locate.remote(working_directory)
            for node in nodes
            for actor, warm_up in waiting.get(node, ())
            if _has_succeeded(warm_up)
        }
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWER_SECONDS)
        ready = {actor for actor, call in calls.items() if _has_succeeded(call)}
        taken: dict[str, list[Any]] = {}
        for node, spares in waiting.items():
            actors = [actor for actor, _ in spares if actor in ready]
            if node in nodes and len(actors) >= per_node:
                taken[node] = actors[:per_node]
            for actor in {actor for actor, _ in spares} - set(taken.get(node, ())):
                ray.kill(actor)
        return taken

    def close(self) -> None:
        """End every spare."""
        for spares in self._by_node.values():
            for actor, _ in spares:
                ray.kill(actor)
        self._by_node = {}


def _has_succeeded(call: Any) -> bool:
    if not ray.wait([call], timeout=0)[0]:
        return False
    try:
        ray.get(call)
    except ray.exceptions.RayError:
        return False
    return True
