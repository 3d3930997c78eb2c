"""The workers of one attempt: placed so that a node holds whole tensor-parallel groups, started, waited for, ended.

Plain Ray actors in a placement group rather than Ray Train: its controller and helpers are four more processes that
import in sequence, which doubles the cold start, and its resize ends the workers before they can save.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.errors import InputError, RunFailedError
from configs.schema import RunConfig
from launcher.cluster import Node, alive_nodes, is_reachable
from launcher.directory import token_of
from launcher.worker import STOP, Ending, Place, Seat, Worker
from monitoring.events import Reason

POLL_SECONDS = 0.5
GATHER_SECONDS = 3.0
"""After the first failure: how long the others' are waited for, to find the one that caused them."""
QUICK_SECONDS = 15.0
"""How long a shape that is not the last resort is waited for: nodes that have come free are given at once."""
CONNECT_SECONDS = 10.0
PEER_LEFT = re.compile(r"(connection|socket).*(closed|reset|refused|aborted)|broken pipe|peer|timed? ?out", re.I)
"""What an exception says where another rank's end has caused it."""
VERDICTS = (InputError, RunFailedError)
"""Another attempt would come to the same one."""


@dataclass(frozen=True)
class Shape:
    """How many workers a run has, and what each one holds."""

    nodes: int
    per_node: int
    gpu: bool

    @property
    def workers(self) -> int:
        return self.nodes * self.per_node

    @property
    def bundle(self) -> dict[str, float]:
        """What the run reserves on each node."""
        return {"CPU": float(self.per_node)} | ({"GPU": float(self.per_node)} if self.gpu else {})

    def fits(self, node: Node) -> bool:
        return node.cpus >= self.per_node and (not self.gpu or node.gpus >= self.per_node)

    def fits_on(self, nodes: Sequence[Node]) -> bool:
        """Whether there are enough nodes of the size, in use or not."""
        return sum(map(self.fits, nodes)) >= self.nodes

    def __str__(self) -> str:
        what = "GPU" if self.gpu else "CPU"
        return f"{self.nodes} node{'s' * (self.nodes > 1)} with {self.per_node} {what}{'s' * (self.per_node > 1)} each"


class NoRoomError(InputError):
    """The cluster has not the nodes that were asked for."""


class WorkerError(Exception):
    """Workers ended before their time."""

    def __init__(self, reason: Reason, rank: int | None, detail: str) -> None:
        super().__init__(detail if rank is None else f"rank {rank}: {detail}")
        self.reason = reason
        """`died`, `out_of_memory`, `node_lost`, `exception` or `hung`."""
        self.rank = rank
        """Where the cause is known to lie."""
        self.detail = detail


class WorkerGroup:
    """Context manager over the processes of one attempt; leaving it ends them."""

    def __init__(
        self,
        shape: Shape,
        config: RunConfig,
        directory: Path,
        home: Path,
        watch: Callable[[], None],
        patient: bool = True,
    ) -> None:
        """Place the workers and start them. Raises NoRoomError where the cluster lacks it, WorkerError where they hang.

        home: What relative paths of the configuration are relative to.
        watch: Called about twice a second, also while waiting.
        patient: False gives up soon, and at once if there are too few nodes; True waits for some to join.
        """
        self.shape, self._config, self._directory, self._watch = shape, config, directory, watch
        self._patience = max(config.cluster.start_timeout, config.cluster.hang_timeout)
        timeout = config.cluster.start_timeout if patient else min(config.cluster.start_timeout, QUICK_SECONDS)
        strategy = "STRICT_SPREAD" if shape.nodes > 1 else "STRICT_PACK"
        self._reserved = placement_group([shape.bundle] * shape.nodes, strategy=strategy)
        try:
            deadline = time.monotonic() + timeout
            while not self._reserved.wait(POLL_SECONDS):
                watch()
                if time.monotonic() > deadline or not (patient or shape.fits_on(alive_nodes())):
                    raise NoRoomError(_no_room(shape, timeout))
            self._start(shape, home)
        except BaseException:
            self.close()
            raise

    def _start(self, shape: Shape, home: Path) -> None:
        actors = []
        for bundle in range(shape.nodes):
            where = PlacementGroupSchedulingStrategy(self._reserved, bundle)
            kind = ray.remote(num_cpus=1, num_gpus=int(shape.gpu), scheduling_strategy=where)(Worker)
            actors += [kind.remote() for _ in range(shape.per_node)]
        places: list[Place] = self._all([actor.place.remote(str(home)) for actor in actors], self._patience)
        cpus = {node.id: node.cpus for node in alive_nodes()}
        here = ray.get_runtime_context().get_node_id()
        # Rank 0 writes the log that this process reads, so it sits on this node if any of them does.
        order = sorted(range(len(actors)), key=lambda i: (places[i].node != here, i // shape.per_node, i))
        self._actors, self.places = [actors[i] for i in order], [places[i] for i in order]
        check_tensor_groups(self.places, self._config.parallel.tensor)
        seats = [
            Seat(
                rank=rank,
                size=shape.workers,
                local_rank=rank % shape.per_node,
                local_size=shape.per_node,
                gpus=tuple(gpu for other in self.places if other.node == place.node for gpu in other.gpus),
                threads=max(1, cpus.get(place.node, shape.per_node) // shape.per_node),
            )
            for rank, place in enumerate(self.places)
        ]
        token = token_of(self._directory) or ""
        self._all(
            [actor.sit.remote(seat, self._directory, token) for actor, seat in zip(self._actors, seats, strict=True)],
            self._patience,
        )

    def train(self, watch: Callable[[], str | None]) -> Ending:
        """Train on every worker; how it ended, as rank 0 saw it.

        watch: Called about twice a second; a reason makes the workers save and return.
        Raises InputError or RunFailedError where a worker did, WorkerError where one failed otherwise.
        """
        from torch.distributed import TCPStore

        address = self.places[0].address
        (port,) = self._all([self._actors[0].open_store.remote(address)], self._patience)
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=CONNECT_SECONDS))
        said: str | None = None

        def pass_on() -> None:
            nonlocal said
            if (reason := watch()) and reason != said:
                said = reason
                with contextlib.suppress(RuntimeError):  # rank 0 has gone, as will be noticed
                    store.set(STOP, reason)

        self._watch = pass_on
        endings: list[Ending] = self._all(
            [actor.train.remote(self._config, self._directory, address, port) for actor in self._actors]
        )
        return endings[0]

    def _all(self, refs: Sequence[Any], patience: float | None = None) -> list[Any]:
        """Results of one call on every worker. Never waits for a survivor: the first failure ends the waiting.

        Raises WorkerError where it takes longer than `patience` seconds.
        """
        pending, began = list(refs), time.monotonic()
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
            try:
                ray.get(done)
            except (ray.exceptions.RayError, *VERDICTS) as error:
                raise self._cause(refs, refs.index(done[0]), error) from None
            self._watch()
            if pending and patience and time.monotonic() - began > patience:
                raise WorkerError("hung", None, f"no answer while it started, in {patience:.0f} s")
        return ray.get(list(refs))

    def _cause(self, refs: Sequence[Any], first_rank: int, first: Exception) -> Exception:
        """Of all failures the one that brought the others about: a verdict of ours, then a death, then an exception.

        Among equals it is one that does not speak of another rank's end, and the one that was seen first.
        """
        if not isinstance(first, VERDICTS):
            ray.wait(list(refs), num_returns=len(refs), timeout=GATHER_SECONDS)
        errors: dict[int, Exception] = {}
        for rank, ref in enumerate(refs):
            if ray.wait([ref], timeout=0)[0]:
                try:
                    ray.get(ref)
                except (ray.exceptions.RayError, *VERDICTS) as error:
                    errors[rank] = error
        for found in errors.values():
            for verdict in VERDICTS:
                if isinstance(found, verdict):  # Ray raises a class that is both the worker's and its own
                    return verdict(str(getattr(found, "cause", found)))
        mine = {place.node for place in getattr(self, "places", ())}
        alive = {node.id for node in alive_nodes() if node.id not in mine or is_reachable(node)}
        failures = [self._explain(rank, found, alive) for rank, found in errors.items()]
        return min(failures, key=lambda failure: _guilt(failure, first_rank))

    def _explain(self, rank: int, error: Exception, alive: set[str]) -> WorkerError:
        if isinstance(error, ray.exceptions.RayTaskError):
            cause = error.cause
            return WorkerError("exception", rank, f"{type(cause).__name__}: {cause}".strip().splitlines()[0])
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return WorkerError("out_of_memory", rank, "killed because its node ran out of memory")
        if hasattr(self, "places") and self.places[rank].node not in alive:
            return WorkerError("node_lost", rank, f"its node {self.places[rank].address} is gone")
        return WorkerError("died", rank, "its process ended (killed, or crashed)")

    def close(self) -> None:
        """End every worker and give the reserved room back."""
        for actor in getattr(self, "_actors", ()):
            ray.kill(actor)
        remove_placement_group(self._reserved)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _guilt(failure: WorkerError, first_rank: int) -> tuple[int, bool, bool]:
    """The smaller, the likelier is it the cause of the others."""
    order = ("node_lost", "out_of_memory", "died", "exception")
    return order.index(failure.reason), bool(PEER_LEFT.search(failure.detail)), failure.rank != first_rank


def check_tensor_groups(places: Sequence[Place], tensor: int) -> None:
    """Every tensor-parallel group (consecutive ranks) lies on one node, or InputError: its traffic needs NVLink."""
    for first in range(0, len(places), tensor):
        addresses = {place.address for place in places[first : first + tensor]}
        if len(addresses) > 1:
            raise InputError(
                f"parallel.tensor: ranks {first} to {first + tensor - 1} form a tensor-parallel group but lie on the "
                f"nodes {', '.join(sorted(addresses))}; make cluster.workers_per_node a multiple of {tensor}"
            )


def _no_room(shape: Shape, timeout: float) -> str:
    nodes = alive_nodes()
    there = ", ".join(f"{node.address} ({node.cpus} CPUs, {node.gpus} GPUs)" for node in nodes) or "none"
    remedy = "add nodes, lower --nodes or cluster.workers_per_node, or raise cluster.start_timeout"
    return (
        f"cluster.nodes: asked for {shape}, free for this run; waited {timeout:.0f} s. "
        f"The cluster has {len(nodes)} node{'s' * (len(nodes) != 1)}: {there}; "
        f"{sum(map(shape.fits, nodes))} of them would be large enough. {remedy[0].upper()}{remedy[1:]}"
    )
