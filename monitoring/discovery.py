"""How Prometheus finds the runs of this machine: one file per run, and the same list over HTTP.

Both formats are defined by Prometheus: https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from configs.errors import InputError
from configs.files import write_atomically

CLOCK_SECONDS = 60.0
"""Largest apparent change of a process' creation time, because the machine's clock may be set."""


@contextmanager
def announced(targets: Path, target: str) -> Iterator[None]:
    """Name a run to Prometheus while the context is open, by a file in `targets`.

    A directory that cannot be written gives a warning, and the run goes on unannounced.

    Args:
        targets: Directory of the files, shared by all runs of the machine.
        target: `host:port` of the run's endpoint.
    """
    try:
        path = _announce(targets, target)
    except OSError as error:
        logging.getLogger(__name__).warning(
            "monitoring.targets: %s; Prometheus will not find this run by itself", error
        )
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def live_targets(targets: Path) -> list[dict[str, Any]]:
    """Read the target groups of the runs that are alive. Files of killed runs of this machine are removed."""
    groups: list[dict[str, Any]] = []
    for path in sorted(targets.glob("*.json")):
        if _is_dead(path.stem):
            with suppress(OSError):  # the file belongs to another user
                path.unlink()
            continue
        try:
            groups += json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # removed since it was listed, or not one of our files
    return groups


def _is_dead(name: str) -> bool:
    """Return whether a file HOST-PORT-PROCESS-CREATED names a process of this machine that has ended.

    The creation time is compared too, because process numbers are used again.
    """
    other_host, _, numbers = name.partition(f"{socket.gethostname()}-")
    parts = numbers.split("-")
    if other_host or len(parts) != 3 or not all(part.isdigit() for part in parts):
        return False
    process, created = int(parts[1]), int(parts[2])
    try:
        return abs(psutil.Process(process).create_time() - created) > CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True


def serve_targets(targets: Path, address: str, port: int) -> ThreadingHTTPServer:
    """Make a server for Prometheus' `http_sd_configs`, which answers every path with the live target groups.

    The caller runs its `serve_forever()`.

    Raises:
        InputError: The address cannot be listened on.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(live_targets(targets)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    try:
        return ThreadingHTTPServer((address, port), Handler)
    except OSError as error:
        raise InputError(
            f"cannot listen on {address}:{port}: {error.strerror or error}; choose another port", key="--port"
        ) from None


def _announce(targets: Path, target: str) -> Path:
    if not targets.exists():
        targets.mkdir(parents=True, exist_ok=True)
        targets.chmod(0o1777)  # every user of the machine writes here, as in /tmp, and removes only their own files
    live_targets(targets)
    port = target.rpartition(":")[2]
    path = targets / f"{socket.gethostname()}-{port}-{os.getpid()}-{psutil.Process().create_time():.0f}.json"
    write_atomically(path, json.dumps([{"targets": [target], "labels": {"job": "detour"}}]))
    path.chmod(0o644)  # Prometheus is another user
    return path
