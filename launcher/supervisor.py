"""The attempts of a run: workers are started, watched, and started again after failures and preemptions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from configs.schema import RunConfig
from launcher.failures import FailureBudget, HangWatch, WorkerError
from launcher.growth import GrowthWatch
from launcher.nodes import alive_nodes, draining_nodes, silent_nodes
from launcher.spares import Spares
from launcher.stop import PREEMPTED, RESIZED, SIGNAL, StopRequest
from launcher.topology import Topology
from launcher.worker import RunResult
from launcher.worker_group import NoRoomError, WorkerGroup
from monitoring.events import Preempted, Resized, WorkerFailed, WorkersStarted, record
from monitoring.progress import Progress
from monitoring.run_directory import RunDirectory
from monitoring.telemetry import Telemetry

SPARES_AFTER = 60.0
"""Seconds of an attempt before spare workers start, so that they disturb no start and no short run."""


@dataclass(frozen=True)
class Run:
    """The facts that all attempts of a run share."""

    config: RunConfig
    directory: Path
    working_directory: Path
    """Base of relative paths in the configuration."""
    topologies: list[Topology]
    """Topologies that the run may take, the largest first."""
    spares: Spares = field(default_factory=Spares)
    """Processes that the next attempt finds ready."""


Attempt = Callable[[Run, StopRequest, Progress], RunResult]
"""Trains until the workers finish, are stopped or fail."""


def train_once(run: Run, stop: StopRequest, progress: Progress) -> RunResult:
    """Start workers and train until they finish or are stopped: one attempt.

    Raises:
        InputError: The workers found bad input, or the cluster has no room.
        WorkerError: A worker failed.
    """
    began = time.monotonic()
    with _open_group(run, stop, progress) as group, stop.relayed_by(group.ask_to_stop):
        seconds = round(time.monotonic() - began, 2)
        addresses = [worker.address for worker in group.workers]
        record(run.directory, WorkersStarted(workers=addresses, seconds=seconds, spares=group.spares))
        progress.note("loading the model")
        own_nodes = {worker.node for worker in group.workers}
        hang = HangWatch(run.directory, run.config.cluster.hang_timeout)
        larger = [topology for topology in run.topologies if topology.nodes > group.topology.nodes]
        growth = GrowthWatch(run.directory, larger, own_nodes, run.config.cluster.grow_every)

        spares_at = time.monotonic() + SPARES_AFTER if group.topology.nodes > 1 else math.inf

        def watch() -> str | None:
            nonlocal spares_at
            try:
                hang.check()
            except WorkerError as error:
                raise group.explain_hang(error) from None
            if time.monotonic() > spares_at:
                spares_at = math.inf
                run.spares.start(group.workers, alive_nodes())
            if own_nodes & draining_nodes().keys():  # save now, and continue on other nodes
                stop.ask(PREEMPTED)
            elif growth.has_room():
                stop.ask(RESIZED)
            return stop.reason

        return group.train(watch)


def supervise(run: Run, stop: StopRequest, progress: Progress, attempt: Attempt = train_once) -> RunResult:
    """Attempt the training again after each survivable failure, each preemption and each change of the nodes.

    Args:
        run: The run.
        stop: Requests to save and return.
        progress: Display of the run.
        attempt: Trains once; a test replaces it.
    """
    budget = FailureBudget(run.config.cluster.max_failures)
    preemptions = 0
    has_attempted = False
    while stop.reason != SIGNAL:
        stop.clear()
        try:
            result = attempt(run, stop, progress)
        except WorkerError as failure:
            step = last_step(run.directory)
            event = WorkerFailed(
                step=step,
                reason=failure.reason,
                rank=failure.rank,
                detail=failure.detail,
                address=failure.address,
                cause=failure.cause,
                collective=failure.collective,
            )
            record(run.directory, event)
            pause = budget.spend(failure, saved_step(run.directory))
            progress.note("starting again")
            _rest(pause, stop)
        except _StopWhileStartingError:
            break
        except NoRoomError:
            if not has_attempted:
                raise
            reason = "the nodes it lost were not replaced in time"
            return RunResult(saved_step(run.directory), finished=False, reason=reason)
        else:
            if result.finished or result.reason not in (PREEMPTED, RESIZED):
                return result
            if result.reason == RESIZED:
                record(run.directory, Resized(step=result.step))
            else:
                record(run.directory, Preempted(step=result.step))
                preemptions += 1
                if preemptions > run.config.cluster.max_preemptions:
                    reason = f"preemption {preemptions} and cluster.max_preemptions allows {preemptions - 1}"
                    return RunResult(result.step, finished=False, reason=reason)
        has_attempted = True
    return RunResult(saved_step(run.directory), finished=False, reason=SIGNAL)


class _StopWhileStartingError(Exception):
    """A signal came before a worker was there to save anything."""


def _rest(seconds: float, stop: StopRequest) -> None:
    """Sleep, unless a signal ends the job."""
    until = time.monotonic() + seconds
    while stop.reason != SIGNAL and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))


def _open_group(run: Run, stop: StopRequest, progress: Progress) -> WorkerGroup:
    """Start workers in the largest topology that finds room. Raises NoRoomError if even the smallest does not."""

    def watch() -> None:
        if stop.reason == SIGNAL:
            raise _StopWhileStartingError

    nodes = alive_nodes()
    silent = silent_nodes(nodes)  # asked for once: a node that was just lost stays on Ray's list for many seconds
    answering = [node for node in nodes if node.id not in silent]
    for topology in run.topologies:
        is_last = topology is run.topologies[-1]
        if not is_last and not topology.fits_on(answering):
            continue
        avoid = silent if topology.fits_on(answering) else ()  # else wait for them: a silent node may come back
        progress.note(f"starting {topology.workers} worker{'s' * (topology.workers > 1)}")
        try:
            return WorkerGroup(
                topology,
                run.config,
                run.directory,
                run.working_directory,
                run.spares,
                watch,
                patient=is_last,
                avoid=avoid,
            )
        except NoRoomError:
            if is_last:
                raise
    raise AssertionError("a run has at least one topology")


def saved_step(directory: Path) -> int:
    """Return the completed steps in the newest checkpoint; 0 without a checkpoint."""
    checkpoints = RunDirectory(directory).checkpoints
    if not checkpoints.exists():  # a new run: the import below takes seconds
        return 0
    from engine.checkpoint import list_checkpoints, step_of

    newest = list_checkpoints(checkpoints)[:1]
    return step_of(newest[0]) if newest else 0


def last_step(directory: Path) -> int:
    """Return the completed steps that the workers last reported."""
    telemetry = Telemetry.read(directory)
    return telemetry.step if telemetry else 0
