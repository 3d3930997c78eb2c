"""The Ray cluster of a job: joined if the process belongs to a cluster, else started on this machine."""

from __future__ import annotations

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

REACH_SECONDS = 2.0
"""Seconds after which a node that does not answer counts as lost."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Object store of a local cluster; the workers exchange only the configuration through it."""
START_ATTEMPTS = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """An alive node of the cluster, with its total resources, in use or not."""

    id: str
    address: str
    port: int
    """Port of the node's raylet."""
    cpus: int
    gpus: int


def is_joined() -> bool:
    """Return whether this process belongs to a cluster: `RAY_ADDRESS` is set, which `ray job submit` does too."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def connect(local_workers: int) -> Iterator[None]:
    """Join the cluster this process belongs to, or start a local cluster.

    A local cluster has no dashboard and ends with the context; a joined cluster is only left.

    Args:
        local_workers: A local cluster has a CPU for each of them, at least.

    Raises:
        InputError: The cluster of RAY_ADDRESS cannot be joined.
        RunFailedError: A local cluster could not be started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not is_joined():
        cpus = max(len(os.sched_getaffinity(0)), local_workers)
        options |= {"address": "local", "include_dashboard": False, "num_cpus": cpus}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    _initialise(options)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray has installed a handler with another exit code
    try:
        yield
    finally:
        ray.shutdown()


def _initialise(options: dict[str, Any]) -> None:
    """Call `ray.init`, and once more if it fails, because a busy machine may not start Ray in time."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if is_joined() and isinstance(error, ConnectionError | ValueError):
                address = os.environ["RAY_ADDRESS"]
                raise InputError(
                    f"RAY_ADDRESS: the Ray cluster at {address} cannot be joined: {error}",
                    key="RAY_ADDRESS",
                    code="ray-unreachable",
                ) from None
            if attempt == START_ATTEMPTS:
                message = f"Ray could not be started: {error}; `detour doctor` checks this machine"
                raise RunFailedError(message) from None
            logger.warning("Ray could not be started (%s); trying once more", error)
        else:
            return


def alive_nodes() -> list[Node]:
    """List the nodes that may be given work, this process's own first; nodes being drained are left out."""
    own_id, draining = ray.get_runtime_context().get_node_id(), draining_nodes()
    nodes = [
        Node(
            id=entry["NodeID"],
            address=entry["NodeManagerAddress"],
            port=entry["NodeManagerPort"],
            cpus=int(entry["Resources"].get("CPU", 0)),
            gpus=int(entry["Resources"].get("GPU", 0)),
        )
        for entry in ray.nodes()
        if entry["Alive"] and entry["NodeID"] not in draining
    ]
    return sorted(nodes, key=lambda node: (node.id != own_id, node.address, node.id))


def is_reachable(node: Node) -> bool:
    """Return whether the node's raylet accepts connections; Ray's own list keeps a lost node for many seconds."""
    try:
        with socket.create_connection((node.address, node.port), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False


def draining_nodes() -> dict[str, int]:
    """Map the id of each node about to be taken away to its deadline in milliseconds since the epoch; 0: no deadline.

    Ray has no public call for it outside Ray Train's workers. Where the private call fails, no node counts as draining:
    a preemption then costs the steps since the newest checkpoint, not the run.
    """
    global _has_warned
    try:
        return dict(_ask_ray_for_draining_nodes())
    except Exception as error:  # another version of Ray may fail in any way
        if not _has_warned:
            logger.warning("Ray %s gives no notice of nodes that are drained (%r)", ray.__version__, error)
            _has_warned = True
        return {}


_has_warned = False


def _ask_ray_for_draining_nodes() -> dict[str, int]:
    """Call the function that Ray Train and Ray Serve use; written for Ray 2.60."""
    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()  # noqa: TID251, SLF001 - no public call exists
    return draining
