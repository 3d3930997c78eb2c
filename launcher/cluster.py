"""The Ray cluster of a job: joined if the process belongs to a cluster, else started on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import ray

from configs.errors import InputError, RunFailedError

REACH_SECONDS = 2.0
"""Seconds after which a node that does not answer counts as lost."""
ANSWER_SECONDS = 4.0
"""Seconds that RAY_ADDRESS may take to accept a connection, and again to answer as Ray does."""
CHECK_SECONDS = 60.0
"""Most seconds of Ray's own health check. It starts a Python process, which a busy machine delays."""
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""First bytes of a gRPC client. A gRPC server, such as a Ray head, answers them at once."""
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
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def require_cluster() -> None:
    """Raise InputError within seconds if RAY_ADDRESS is set and its cluster cannot be joined.

    Ray itself tries for minutes, and does not say why.
    """
    if is_joined():
        _require_answer(os.environ["RAY_ADDRESS"])


@cache
def _require_answer(address: str) -> None:
    if "://" in address:
        raise _unreachable(
            address,
            "it must be HOST:PORT of the head, such as 10.0.0.1:6379; a job reaches the cluster "
            "of a job server (http://) by `ray job submit`, and Ray's client (ray://) cannot start a run",
        )
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise _unreachable(address, "it must be HOST:PORT of the head, such as 10.0.0.1:6379")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as connection:
                speaks = os.environ.get("RAY_USE_TLS") == "1" or _speaks_http2(connection)
        except (OSError, OverflowError) as error:
            raise _unreachable(address, f"no answer ({error}); is its head alive, and the port open?") from None
        if not speaks:
            raise _unreachable(address, "something else than Ray's head listens there")
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        check = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _unreachable(address, f"no answer to `ray health-check` in {CHECK_SECONDS:.0f} s") from None
    if check.returncode == 0:
        return
    if "AuthToken" in check.stderr or "authentication token" in check.stderr:
        state = "is set" if os.environ.get("RAY_AUTH_TOKEN") else "is not set"
        raise InputError(
            f"RAY_AUTH_TOKEN: the Ray cluster at {address} asks for a token, and this process has none or another one "
            f"(RAY_AUTH_MODE is {os.environ.get('RAY_AUTH_MODE', 'not set')}, RAY_AUTH_TOKEN {state}); set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token as on the nodes of the cluster",
            key="RAY_AUTH_TOKEN",
            code="ray-token",
        )
    lines = [line for line in check.stderr.splitlines() if line.strip()]
    raise _unreachable(address, lines[-1] if lines else f"`ray health-check` ended with {check.returncode}")


def _speaks_http2(connection: socket.socket) -> bool:
    connection.sendall(HTTP2_HELLO)
    try:
        answer = connection.recv(9, socket.MSG_WAITALL)
    except TimeoutError:
        return False
    return len(answer) == 9 and answer[3] == 4  # a SETTINGS frame


def _unreachable(address: str, reason: object) -> InputError:
    return InputError(
        f"RAY_ADDRESS: the Ray cluster at {address} cannot be joined: {reason}",
        key="RAY_ADDRESS",
        code="ray-unreachable",
    )


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
    require_cluster()
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
                raise _unreachable(os.environ["RAY_ADDRESS"], error) from None
            if attempt == START_ATTEMPTS:
                message = f"Ray could not be started: {error}; `detour doctor` checks this machine"
                raise RunFailedError(message) from None
            logger.warning("Ray could not be started (%s); trying once more", error)
        else:
            return


def alive_nodes(drained: bool = False) -> list[Node]:
    """List the nodes that may be given work, this process's own first.

    Args:
        drained: List nodes that are being drained too.
    """
    own_id, draining = ray.get_runtime_context().get_node_id(), () if drained else draining_nodes()
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


def silent_nodes(nodes: Collection[Node]) -> set[str]:
    """Return the ids of the nodes whose raylet does not answer, because Ray lists a lost node for many seconds."""
    if not nodes:
        return set()
    with ThreadPoolExecutor(min(len(nodes), 64)) as pool:  # because each lost node takes REACH_SECONDS
        answers = pool.map(lambda node: accepts_connections(node.address, node.port), nodes)
        return {node.id for node, answered in zip(nodes, answers, strict=True) if not answered}


def accepts_connections(host: str, port: int) -> bool:
    """Return whether something listens at an address, within REACH_SECONDS."""
    try:
        with socket.create_connection((host, port), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False


def free_nodes(nodes: Collection[Node]) -> list[Node]:
    """Return the nodes with the CPUs and GPUs that no job holds now.

    Where Ray's call for it fails, every node counts as free: a run that asks for one in use then waits in vain, once
    per `cluster.grow_every`.
    """
    try:
        free = dict(_ask_ray_for_free_resources())
    except Exception as error:  # another version of Ray may fail in any way
        logger.warning("Ray %s does not tell which nodes are free (%r)", ray.__version__, error)
        return list(nodes)
    return [
        replace(node, cpus=int(free[node.id].get("CPU", 0)), gpus=int(free[node.id].get("GPU", 0)))
        for node in nodes
        if node.id in free
    ]


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


def _ask_ray_for_free_resources() -> dict[str, dict[str, float]]:
    """Call the function behind `ray.available_resources`, which gives the sum only; written for Ray 2.60."""
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()  # noqa: TID251, SLF001 - no public call exists
    return free


def _ask_ray_for_draining_nodes() -> dict[str, int]:
    """Call the function that Ray Train and Ray Serve use; written for Ray 2.60."""
    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()  # noqa: TID251, SLF001 - no public call exists
    return draining
