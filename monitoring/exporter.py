"""The metrics endpoint of a run. It lives in the launcher's process, so it outlives the workers."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from socketserver import ThreadingMixIn
from threading import Event, Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from configs.errors import InputError
from monitoring.log import Follower
from monitoring.metrics import METRICS, Metric, Sample, collect
from monitoring.run_directory import RunDirectory
from monitoring.run_state import RunState
from monitoring.telemetry import Histogram, Telemetry

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

PORTS_TRIED = 200
CLOCK_SECONDS = 2.0
"""Difference of two clocks that is not corrected, because writing and reading take time."""
LONGEST_LINGER = 30.0
"""Most seconds that a closing exporter waits for the scrape that sees the end of its run."""
STATE_PATH = "/telemetry.json"
"""Path at which the exporter serves the `RunState`; every other path gives the metrics."""


class RunReader:
    """Reads the state of a run from its files. The latest telemetry stays while the file cannot be read."""

    def __init__(self, directory: Path, run: str) -> None:
        self._directory, self._run = directory, run
        self._events = Follower(RunDirectory(directory).events)
        self._latest = Telemetry.read(directory)
        self._read_at, self._shift = time.time(), 0.0
        self._lock = Lock()

    def read(self) -> RunState:
        """Read what the files hold now. Times are given by this machine's clock, which may differ from the writer's."""
        events = self._events.read()
        with self._lock:
            latest, now = Telemetry.read(self._directory) or self._latest, time.time()
            if latest and (self._latest is None or latest.time != self._latest.time):
                self._shift = clock_difference(latest.time, self._read_at, now)
            self._latest, self._read_at = latest, now
            shifted = latest.shifted(self._shift) if latest else None
        return RunState.of(self._run, shifted, events, RunDirectory(self._directory).id)


def clock_difference(written: float, earliest: float, latest: float) -> float:
    """Return the seconds by which this clock is ahead of a writer's.

    Args:
        written: Time of the writing, by the writer's clock.
        earliest: A time before the writing, by this clock.
        latest: A time after it, by this clock.

    Returns:
        The smallest difference that explains the three times: 0 if the clocks may agree.
    """
    low, high = earliest - written - CLOCK_SECONDS, latest - written + CLOCK_SECONDS
    return 0.0 if low <= 0 <= high else low + CLOCK_SECONDS if low > 0 else high - CLOCK_SECONDS


class RunCollector(Collector):
    """Gives Prometheus' client the metrics of a run, from its files, at every scrape."""

    def __init__(self, reader: RunReader, metrics: Sequence[Metric] = METRICS) -> None:
        self._reader, self._metrics = reader, metrics

    def collect(self) -> Iterator[Family]:
        """Yield the metrics of the run as they are now."""
        run = self._reader.read()
        for metric, samples in collect(run, self._metrics):
            yield _family(metric, samples, {"run": run.run, "id": run.id})


def _family(metric: Metric, samples: Sequence[Sample], identity: dict[str, str]) -> Family:
    name = metric.name
    family = Family(name.removesuffix("_total"), metric.help, metric.type)
    for labels, value in samples:
        labels = identity | labels
        if isinstance(value, Histogram):
            bounds = [*map(str, value.bounds), "+Inf"]
            for bound, count in zip(bounds, [*value.counts, value.count], strict=True):
                family.add_sample(f"{name}_bucket", labels | {"le": bound}, count)
            family.add_sample(f"{name}_count", labels, value.count)
            family.add_sample(f"{name}_sum", labels, value.sum)
        else:
            family.add_sample(name, labels, value)
    return family


class Exporter:
    """Serves `/metrics` and `/telemetry.json` of a run from threads.

    Args:
        directory: The run directory.
        name: Name of the run, the label `run` of every metric.
        address: Address to listen on.
        port: The exporter takes the first free port from this one on.
        metrics: The table of metrics.

    Raises:
        InputError: The address does not belong to this machine, or no port is free.
    """

    def __init__(
        self, directory: Path, name: str, address: str, port: int, metrics: Sequence[Metric] = METRICS
    ) -> None:
        reader = RunReader(directory, name)
        registry = CollectorRegistry()
        registry.register(RunCollector(reader, metrics))
        self._scrapes: deque[float] = deque(maxlen=2)
        self._scraped = Event()
        self._server = _listen(address, port, _application(reader, make_wsgi_app(registry), self._note_scrape))
        self._thread = Thread(target=self._server.serve_forever, name="exporter", daemon=True)
        self._thread.start()
        self.port = self._server.server_port
        self.target = f"{_reachable(address)}:{self.port}"
        """`host:port` at which Prometheus finds the exporter."""
        self.url = f"http://{self.target}/metrics"

    def _note_scrape(self) -> None:
        self._scrapes.append(time.monotonic())
        self._scraped.set()

    def _linger(self) -> None:
        """Wait for one more scrape if there is a scraper, because it would take a run that is complete for vanished."""
        if len(self._scrapes) < 2:
            return
        before, last = self._scrapes
        self._scraped.clear()
        patience = min(LONGEST_LINGER, 1.5 * (last - before) + 0.2)
        self._scraped.wait(max(0.0, patience - (time.monotonic() - last)))

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._linger()
        self.close()


Application = Callable[..., Any]
"""A WSGI application."""


def _application(reader: RunReader, metrics: Application, note_scrape: Callable[[], None]) -> Application:
    def application(environment: WSGIEnvironment, start_response: StartResponse) -> Any:
        if environment["PATH_INFO"] != STATE_PATH:
            answer = metrics(environment, start_response)
            note_scrape()
            return answer
        body = reader.read().model_dump_json().encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    return application


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _listen(address: str, port: int, application: Application) -> WSGIServer:
    """Listen on the first free port from `port` on."""
    for candidate in range(port, min(port + PORTS_TRIED, 65536)):
        try:
            family = socket.getaddrinfo(address, candidate)[0][0]
            server = _Server6 if family == socket.AF_INET6 else _Server
            return make_server(address, candidate, application, server, _SilentHandler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise InputError(
                    f"monitoring: cannot listen on {address}:{candidate}: {error.strerror or error}; "
                    "change monitoring.address or monitoring.port",
                    key="monitoring.address",
                ) from None
    raise InputError(f"monitoring.port: no free port from {port} on {address}; choose another", key="monitoring.port")


def _reachable(address: str) -> str:
    """The host part of a URL that reaches a listening address. For "all addresses" it is this machine's own address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if ip.is_unspecified:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # picks a route, sends nothing
                return str(probe.getsockname()[0])
            except OSError:
                return socket.gethostname()
    return f"[{address}]" if ip.version == 6 else address
