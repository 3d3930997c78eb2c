"""The workers of one attempt: placed so that a node holds whole tensor-parallel groups, started, awaited, ended.

They are plain Ray actors in a placement group. Ray Train would start four more processes that import in sequence, and
its resize ends the workers before they can save.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import detour_train
from configs.errors import InputError, RunFailedError
from configs.schema import RunConfig
from launcher.claim import token_of
from launcher.failures import WorkerError, root_cause
from launcher.nodes import alive_nodes, lost_nodes
from launcher.same_code import check_same_code
from launcher.spares import Spares
from launcher.stacks import collect_stacks, culprit
from launcher.topology import Topology, check_tensor_groups, threads_per_worker
from launcher.worker import STOP, RankAssignment, RunResult, WorkerInfo

POLL_SECONDS = 0.5
GATHER_SECONDS = 3.0
"""Seconds to wait after the first failure for the failures of other ranks, to find their common cause."""
QUICK_SECONDS = 15.0
"""Seconds to wait for a topology if a smaller one remains: nodes that have become free are given at once."""
CONNECT_SECONDS = 10.0
FATAL_ERRORS = (InputError, RunFailedError)
"""Errors that another attempt would meet again."""
CAUSE_CHARACTERS = 300
"""Longest account of a failure that is kept of Ray's."""
NODE_ID = "ray.io/node-id"
"""Ray's label of each node with its id."""

Watch = Callable[[], object]
"""Called about twice per second while workers are awaited; it may raise."""


class NoRoomError(InputError):
    """The cluster lacks the nodes that were asked for."""


class WorkerGroup:
    """Context manager over the processes of one attempt; leaving it ends them."""

    def __init__(
        self,
        topology: Topology,
        config: RunConfig,
        directory: Path,
        working_directory: Path,
        spares: Spares,
        watch: Watch,
        patient: bool = True,
        avoid: Collection[str] = (),
    ) -> None:
        """Place the workers and start them.

        Args:
            topology: Nodes and workers per node.
            config: Configuration of the run.
            directory: The run directory.
            working_directory: Base of relative paths in the configuration.
            spares: Processes that become workers on the nodes where they wait.
            watch: Called about twice per second, also while the workers start.
            patient: True waits for nodes to join; False gives up soon, and at once if there are too few nodes.
            avoid: Ids of nodes that get no worker, because they are lost and Ray does not know it yet.

        Raises:
            NoRoomError: The cluster lacks the nodes.
            WorkerError: A worker failed or hung while it started.
        """
        self.topology, self._config, self._directory, self._watch = topology, config, directory, watch
        self.workers: list[WorkerInfo] = []
        """One per rank, in order; empty until all have answered."""
        self.spares = 0
        """Workers that were spares."""
        self._actors: list[Any] = []
        self._store: Any = None
        self._start_patience = max(config.cluster.start_timeout, config.cluster.hang_timeout)
        timeout = config.cluster.start_timeout if patient else min(config.cluster.start_timeout, QUICK_SECONDS)
        strategy = "STRICT_SPREAD" if topology.nodes > 1 else "STRICT_PACK"
        elsewhere = [{NODE_ID: f"!in({','.join(sorted(avoid))})"}] * topology.nodes if avoid else None
        self._reservation = placement_group(
            [topology.bundle] * topology.nodes, strategy=strategy, bundle_label_selector=elsewhere
        )
        try:
            deadline = time.monotonic() + timeout
            while not self._reservation.wait(POLL_SECONDS):
                watch()
                if time.monotonic() > deadline or not (patient or topology.fits_on(alive_nodes())):
                    raise _no_room(topology, timeout)
            self._start(str(working_directory), spares)
        except BaseException:
            self.close()
            raise

    def _start(self, working_directory: str, spares: Spares) -> None:
        topology, actors = self.topology, []
        node_of = placement_group_table(self._reservation)["bundles_to_node_id"]
        taken = spares.take(node_of.values(), topology.per_node, working_directory)
        self.spares = sum(map(len, taken.values()))
        for bundle in range(topology.nodes):
            if node_of[bundle] in taken:
                actors += taken[node_of[bundle]]
                continue
            strategy = PlacementGroupSchedulingStrategy(self._reservation, bundle)
            actor = ray.remote(num_cpus=1, num_gpus=int(topology.gpu), scheduling_strategy=strategy)(
                detour_train.Worker
            )
            actors += [actor.remote() for _ in range(topology.per_node)]
        self._actors = actors
        located: list[WorkerInfo] = self._call("locate", working_directory, patience=self._start_patience)
        cpus = {node.id: node.cpus for node in alive_nodes()}
        own_node = ray.get_runtime_context().get_node_id()
        # Rank 0 writes the log that this process reads. Therefore it runs on this node if any worker does.
        order = sorted(range(len(actors)), key=lambda i: (located[i].node != own_node, i // topology.per_node, i))
        self._actors, self.workers = [actors[i] for i in order], [located[i] for i in order]
        check_same_code(self.workers)
        check_tensor_groups([worker.address for worker in self.workers], self._config.parallel.tensor)
        token = token_of(self._directory) or ""
        calls = [
            actor.setup.remote(
                RankAssignment(
                    rank=rank,
                    size=topology.workers,
                    local_rank=rank % topology.per_node,
                    local_size=topology.per_node,
                    gpus=tuple(gpu for other in self.workers if other.node == worker.node for gpu in other.gpus),
                    threads=threads_per_worker(cpus.get(worker.node, 1), topology.per_node),
                ),
                self._directory,
                token,
            )
            for rank, (actor, worker) in enumerate(zip(self._actors, self.workers, strict=True))
        ]
        wait_for_results(calls, self._watch, self._diagnose, self._start_patience)

    def train(self, watch: Callable[[], str | None]) -> RunResult:
        """Train on every worker, and return the result of rank 0.

        Args:
            watch: Called about twice per second; a reason makes the workers save and return.

        Raises:
            InputError, RunFailedError: A worker raised it.
            WorkerError: A worker failed otherwise.
        """
        from torch.distributed import TCPStore

        address = self.workers[0].address
        opened = [self._actors[0].open_store.remote(address)]
        (port,) = wait_for_results(opened, self._watch, self._diagnose, self._start_patience)
        self._store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=CONNECT_SECONDS))
        forwarded: str | None = None

        def forward_stop() -> None:
            nonlocal forwarded
            if (reason := watch()) and reason != forwarded:
                forwarded = reason
                self.ask_to_stop(reason)

        self._watch = forward_stop
        results: list[RunResult] = self._call("train", self._config, self._directory, address, port)
        return results[0]

    def ask_to_stop(self, reason: str) -> None:
        """Ask the workers to save and return, if they train. Any thread may call it, and Ray takes no part."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # rank 0 has gone, which the waiting will notice
                self._store.set(STOP, reason)

    def explain_hang(self, hang: WorkerError) -> WorkerError:
        """Return the hang with the rank that the others wait for. The stacks of all ranks are in the run directory."""
        if self._store is None:
            return hang
        stacks = collect_stacks(self._store, len(self.workers), self._directory)
        rank, collective, sentence = culprit(stacks, len(self.workers))
        address = None if rank is None else self.workers[rank].address
        detail = f"{hang.detail}; {sentence}" if sentence else hang.detail
        return WorkerError("hung", rank, detail, address, collective=collective)

    def _call(self, method: str, *arguments: object, patience: float | None = None) -> list[Any]:
        """Call a method on every worker and wait for the results."""
        calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        return wait_for_results(calls, self._watch, self._diagnose, patience)

    def _diagnose(self, calls: Sequence[Any], first_rank: int, first: Exception) -> Exception:
        """Return the failure that caused all others: a fatal error, else the root cause among the workers' failures."""
        own_nodes = {worker.node for worker in self.workers}
        lost = lost_nodes(own_nodes)  # a lost node explains everything; else the other failures are worth waiting for
        if not lost and not isinstance(first, FATAL_ERRORS):
            ray.wait(list(calls), num_returns=len(calls), timeout=GATHER_SECONDS)
            lost = lost_nodes(own_nodes)
        errors = {rank: error for rank, call in enumerate(calls) if (error := _error_of(call)) is not None}
        for error in errors.values():
            if isinstance(error, FATAL_ERRORS):  # Ray raises a class that is both the worker's and its own
                cause = getattr(error, "cause", error)
                assert isinstance(cause, Exception)
                return cause
            if failed_import := import_error(error):
                return failed_import
        failures = [self._explain(rank, error, lost) for rank, error in errors.items()]
        failures += [
            _node_lost(rank, worker.address, lost[worker.node])
            for rank, worker in enumerate(self.workers)
            if worker.node in lost and rank not in errors
        ]
        return root_cause(failures, first_rank)

    def _explain(self, rank: int, error: Exception, lost: Mapping[str, str | None]) -> WorkerError:
        address = self.workers[rank].address if self.workers else address_in(str(error))
        if isinstance(error, ray.exceptions.RayTaskError):
            cause = error.cause
            detail = f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
            return WorkerError("exception", rank, detail, address)
        account = rays_account(str(error))
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return WorkerError("out_of_memory", rank, "killed because its node ran out of memory", address, account)
        if self.workers and (node := self.workers[rank].node) in lost:
            return _node_lost(rank, address, lost[node] or account)
        return WorkerError("died", rank, "its process ended (killed, or crashed)", address, account)

    def close(self) -> None:
        """End every worker and release the reserved resources."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._reservation)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_for_results(
    calls: Sequence[Any],
    watch: Watch,
    diagnose: Callable[[Sequence[Any], int, Exception], Exception],
    patience: float | None = None,
) -> list[Any]:
    """Wait for one call per worker. The first failure ends the waiting, because a survivor may wait for ever.

    Args:
        calls: Ray's references, one per rank.
        watch: Called about twice per second.
        diagnose: Turns the references, the rank seen to fail first and its error into the error to raise.
        patience: Seconds after which the workers count as hung; None: no limit.

    Returns:
        The results, in order.

    Raises:
        WorkerError: A worker failed, or the calls take longer than `patience`.
    """
    pending, began = list(calls), time.monotonic()
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
        try:
            ray.get(done)
        except (ray.exceptions.RayError, *FATAL_ERRORS) as error:
            raise diagnose(calls, calls.index(done[0]), error) from None
        watch()
        if pending and patience and time.monotonic() - began > patience:
            raise WorkerError("hung", None, f"no answer while it started, in {patience:.0f} s")
    return list(ray.get(list(calls)))


def _node_lost(rank: int, address: str | None, account: str | None) -> WorkerError:
    return WorkerError("node_lost", rank, f"its node {address} is gone", address, account)


def import_error(error: Exception) -> InputError | None:
    """Return the verdict on a package that a node lacks, because another attempt would lack it too."""
    text = str(error)
    found = re.search(r"\b(?:ModuleNotFoundError|ImportError): .*", text)
    if not found or not (
        isinstance(getattr(error, "cause", None), ImportError) or isinstance(error, ray.exceptions.RayActorError)
    ):
        return None
    return InputError(
        f"cluster.nodes: the node {address_in(text) or 'of a worker'} cannot start a worker: {found[0].strip()}; "
        "install the same packages on every node",
        key="cluster.nodes",
        code="import-failed",
    )


def address_in(account: str) -> str | None:
    """Return the address of the node that Ray's account of a failure names."""
    found = re.search(r"\bip[=:]\s*([0-9a-fA-F.:]+[0-9a-fA-F])", account)
    return found[1] if found else None


def rays_account(text: str) -> str:
    """Return the sentences of Ray's account of a failure, without its list of ids and its stack."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not re.match(r"\s+\w+: \S+$", line)]
    return " ".join(lines)[:CAUSE_CHARACTERS]


def _error_of(call: Any) -> Exception | None:
    """Return the error of a call that has ended with one."""
    if ray.wait([call], timeout=0)[0]:
        try:
            ray.get(call)
        except (ray.exceptions.RayError, *FATAL_ERRORS) as error:
            return error
    return None


def _no_room(topology: Topology, timeout: float) -> NoRoomError:
    nodes = alive_nodes()
    present = ", ".join(f"{node.address} ({node.cpus} CPUs, {node.gpus} GPUs)" for node in nodes) or "none"
    return NoRoomError(
        f"cluster.nodes: asked for {topology}, free for this run; waited {timeout:.0f} s. "
        f"The cluster has {len(nodes)} node{'s' * (len(nodes) != 1)}: {present}; "
        f"{sum(map(topology.fits, nodes))} of them would be large enough. "
        "Add nodes, lower --nodes or cluster.workers_per_node, or raise cluster.start_timeout",
        key="cluster.nodes",
        code="no-room",
    )
