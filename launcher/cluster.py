"""The Ray cluster a job runs in: joined where there is one, started on this machine otherwise."""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from configs.errors import InputError, RunFailedError

GUARD = "detour_train.guard"
"""Called in each worker process before it imports anything of ours: a user's files may have our packages' names."""
REACH_SECONDS = 2.0
"""A node that does not answer for so long is lost."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local cluster: workers exchange nothing through it but the configuration."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """An alive node of the cluster, with all that it has, in use or not."""

    id: str
    address: str
    port: int
    """Of its raylet."""
    cpus: int
    gpus: int


def is_joined() -> bool:
    """Whether this process belongs to a cluster: `RAY_ADDRESS` is set, which `ray job submit` does too."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def connect(local_workers: int) -> Iterator[None]:
    """Join the cluster this process belongs to, or start one here with a CPU for each of `local_workers`.

    A local cluster has no dashboard and ends with the context; a joined one is only left. Raises InputError where the
    cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    options["runtime_env"] = {"worker_process_setup_hook": GUARD}
    if not is_joined():
        cpus = max(len(os.sched_getaffinity(0)), local_workers)
        options |= {"address": "local", "include_dashboard": False, "num_cpus": cpus}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    _start(options)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in its place, with another exit code
    try:
        yield
    finally:
        ray.shutdown()


def _start(options: dict[str, Any]) -> None:
    """Call `ray.init`; a start that fails on this machine, for instance because it is too busy, is tried once more."""
    for attempts_left in (1, 0):
        try:
            ray.init(**options)
        except (ConnectionError, ValueError) as error:
            address = os.environ.get("RAY_ADDRESS")
            raise InputError(
                f"RAY_ADDRESS: the Ray cluster at {address} cannot be joined: {error}",
                key="RAY_ADDRESS",
                code="ray-unreachable",
            ) from None
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            if not attempts_left:
                raise RunFailedError(
                    f"Ray could not be started: {error}; `detour doctor` checks this machine"
                ) from None
            logger.warning("Ray could not be started (%s); trying once more", error)
        else:
            return


def alive_nodes() -> list[Node]:
    """Nodes that may be given work, this process's own first; a node that is being drained is not among them."""
    here, leaving = ray.get_runtime_context().get_node_id(), draining_nodes()
    nodes = [
        Node(
            id=entry["NodeID"],
            address=entry["NodeManagerAddress"],
            port=entry["NodeManagerPort"],
            cpus=int(entry["Resources"].get("CPU", 0)),
            gpus=int(entry["Resources"].get("GPU", 0)),
        )
        for entry in ray.nodes()
        if entry["Alive"] and entry["NodeID"] not in leaving
    ]
    return sorted(nodes, key=lambda node: (node.id != here, node.address, node.id))


def is_reachable(node: Node) -> bool:
    """Whether its raylet takes connections; the cluster's own list keeps a lost node for many seconds."""
    try:
        with socket.create_connection((node.address, node.port), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False


def draining_nodes() -> dict[str, int]:
    """Nodes about to be taken away: id -> deadline in milliseconds since the epoch, 0 where there is no deadline.

    Ray has no public call for it outside Ray Train's workers. Where another version of Ray has no such private call
    either, no node counts as draining: a preemption then costs the steps since the newest checkpoint, not the run.
    """
    try:
        return dict(_ask_ray_for_draining_nodes())
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        _warn_of_no_notice(f"{type(error).__name__}: {error}")
        return {}


def _ask_ray_for_draining_nodes() -> dict[str, int]:
    """Call what Ray Train and Serve use; written for Ray 2.60."""
    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()  # noqa: SLF001
    return draining


@functools.cache
def _warn_of_no_notice(reason: str) -> None:
    logger.warning("Ray %s gives no notice of nodes that are drained (%s)", ray.__version__, reason)
