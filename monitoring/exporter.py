"""The run's metrics endpoint. It lives in the launcher's process, so it outlives the workers."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from configs.errors import InputError
from monitoring.log import EVENTS, Follower
from monitoring.metrics import Metric, run_metrics, seen_after
from monitoring.telemetry import Histogram, Telemetry

PORTS_TRIED = 200


class RunCollector(Collector):
    """Reads telemetry.json and events.jsonl of a run at every scrape. Telemetry stands while it cannot be read."""

    def __init__(self, directory: Path, run: str) -> None:
        self._directory, self._run = directory, run
        self._events = Follower(directory / EVENTS)
        self._latest: Telemetry | None = None

    def collect(self) -> Iterator[Family]:
        events = self._events.read()
        self._latest = Telemetry.read(self._directory) or self._latest
        for metric in run_metrics(seen_after(events, self._latest), events):
            yield self._family(metric)

    def _family(self, metric: Metric) -> Family:
        name = metric.name
        family = Family(name.removesuffix("_total"), metric.help, metric.kind)
        for labels, value in metric.samples:
            labels = {"run": self._run} | labels
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
    """Serves `/metrics` of one run from a thread, from the first free port at or after `port`.

    Raises InputError where the address is not one of this machine or no port is free.
    """

    def __init__(self, directory: Path, name: str, address: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(RunCollector(directory, name))
        for candidate in range(port, min(port + PORTS_TRIED, 65536)):
            try:
                self._server, self._thread = start_http_server(candidate, address, registry)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    reason = error.strerror or error
                    raise InputError(
                        f"monitoring: cannot listen on {address}:{candidate}: {reason}; "
                        "change monitoring.address or monitoring.port"
                    ) from None
            else:
                self.port = candidate
                break
        else:
            raise InputError(f"monitoring.port: no free port from {port} on {address}; choose another")
        self.target = f"{_reachable(address)}:{self.port}"
        """`host:port` under which Prometheus finds it."""
        self.url = f"http://{self.target}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reachable(address: str) -> str:
    """The host part of a URL that reaches a listening address; for "all addresses", this machine's own."""
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
