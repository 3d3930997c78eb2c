"""The Ray cluster of a job: joined if the process belongs to a cluster, else started on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import ray

from configs.errors import InputError, RunFailedError

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


def is_joined() -> bool:
    """Return whether this process belongs to a cluster: `RAY_ADDRESS` is set, which `ray job submit` does too."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def require_cluster() -> None:
    """Raise InputError within seconds if Ray's token is none, or the cluster of RAY_ADDRESS cannot be joined.

    Ray itself tries for minutes, and does not say why.
    """
    _require_sound_token()
    if is_joined():
        _require_answer(os.environ["RAY_ADDRESS"])


def _require_sound_token() -> None:
    """Raise InputError if Ray would take a token that cannot be sent, because Ray then aborts this process or waits."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    token, path = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    place, key = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN"
    if not token:
        place, key = path or str(Path.home() / ".ray/auth_token"), "RAY_AUTH_TOKEN_PATH" if path else "RAY_AUTH_TOKEN"
        try:
            token = Path(place).read_text(encoding="ascii", errors="replace")
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not path:
                return  # Ray makes one for a local cluster, and a joined cluster may need none
            raise _unsound_token(key, f"{place} cannot be read: {error.strerror}") from None
    if not token.strip() or not all(" " < character <= "~" for character in token.strip()):
        raise _unsound_token(key, f"the token in {place} is {'not in printable ASCII' if token.strip() else 'empty'}")


def _unsound_token(key: str, fault: str) -> InputError:
    remedy = "copy it from a node of the cluster, or make a new one by `ray get-auth-token --generate`"
    return InputError(f"{key}: {fault}; {remedy}", key=key, code="ray-token")


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
