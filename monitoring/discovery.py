"""How Prometheus finds the runs of this machine: one file a run, and the same list over HTTP.

Both formats are Prometheus' own: https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from configs.errors import InputError

CLOCK_SECONDS = 60.0
"""By which the time at which a process was created may seem to move, as the machine's clock is set."""


@contextmanager
def announced(targets: Path, target: str) -> Iterator[None]:
    """While open, `targets` holds a file that names `target` (host:port) as a Detour run.

    A directory that cannot be written is a warning: the run goes on unannounced.
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
    """The target groups of every run that is alive; files that killed runs of this machine left are removed."""
    groups: list[dict[str, Any]] = []
    for path in sorted(targets.glob("*.json")):
        if _is_dead(path.stem):
            with suppress(OSError):  # of another user
                path.unlink()
            continue
        try:
            groups += json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # gone or foreign since it was listed
    return groups


def _is_dead(name: str) -> bool:
    """Whether a file HOST-PORT-PROCESS-CREATED is of a process of this machine that is no more.

    A number is given to another process later, so the time of its creation counts too.
    """
    host, _, numbers = name.partition(f"{socket.gethostname()}-")
    parts = numbers.split("-")
    if host or len(parts) != 3 or not all(part.isdigit() for part in parts):
        return False
    process, created = int(parts[1]), int(parts[2])
    try:
        return abs(psutil.Process(process).create_time() - created) > CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True


def serve_targets(targets: Path, address: str, port: int) -> ThreadingHTTPServer:
    """A server for Prometheus' `http_sd_configs` that answers every path with the live target groups.

    Call `serve_forever()` on it. Raises InputError where the address cannot be listened on.
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
        raise InputError(f"cannot listen on {address}:{port}: {error.strerror or error}; choose another port") from None


def _announce(targets: Path, target: str) -> Path:
    if not targets.exists():
        targets.mkdir(parents=True, exist_ok=True)
        targets.chmod(0o1777)  # shared by the users of the machine, as /tmp is; each removes only their own
    live_targets(targets)
    port = target.rpartition(":")[2]
    path = targets / f"{socket.gethostname()}-{port}-{os.getpid()}-{psutil.Process().create_time():.0f}.json"
    with tempfile.NamedTemporaryFile("w", dir=targets, prefix=".", delete=False, encoding="utf-8") as file:
        json.dump([{"targets": [target], "labels": {"job": "detour"}}], file)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
    return path
