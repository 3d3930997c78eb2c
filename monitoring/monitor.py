"""`detour monitor`: the live state of a run in the terminal, from its directory or from its endpoint."""

from __future__ import annotations

import json
import math
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode
from urllib.request import urlopen

from rich.console import Console
from rich.live import Live

from configs.errors import InputError
from monitoring.exporter import STATE_PATH, RunReader
from monitoring.log import Follower
from monitoring.monitor_view import View, draw
from monitoring.run_directory import RunDirectory, require_run
from monitoring.run_state import RunState

REFRESH_SECONDS = 1.0
TIMEOUT_SECONDS = 3.0
"""Longest wait for one answer."""
SILENCE_SECONDS = 30.0
"""Time without an answer after which the run counts as ended. A single late answer is no end."""
TAIL_BYTES = 2**20
"""End of metrics.jsonl that is read, some thousands of steps, because the curve has few characters."""
PROMETHEUS = "http://127.0.0.1:9090"

UNREADABLE = (OSError, HTTPException, ValueError)
"""Errors of a source that does not answer or is not a run."""


class Source(Protocol):
    """A place where the state of a run is read."""

    def read(self) -> View:
        """Read the state now; raises one of `UNREADABLE`."""


class DirectorySource:
    """The files of a run directory."""

    def __init__(self, directory: Path) -> None:
        self._reader = RunReader(directory, directory.name)
        self._lines = Follower(RunDirectory(directory).metrics, tail=TAIL_BYTES)

    def read(self) -> View:
        """Read the files now."""
        run, lines = self._reader.read(), self._lines.read()
        now = run.telemetry
        losses = {line["step"]: line["loss"] for line in lines if now and line["phase"] == now.phase}
        return View(run, [loss for loss in losses.values() if loss is not None])


@dataclass
class EndpointSource:
    """The `/telemetry.json` of a run's exporter. Its losses are those seen since watching began."""

    url: str
    _phase: int = -1
    _losses: dict[int, float] = field(default_factory=dict)

    def read(self) -> View:
        """Ask the exporter now."""
        with urlopen(self.url, timeout=TIMEOUT_SECONDS) as answer:
            run = RunState.model_validate_json(answer.read())
        if (now := run.telemetry) is None:
            return View(run)
        if now.phase != self._phase:
            self._phase, self._losses = now.phase, {}
        if math.isfinite(loss := now.loss.get(now.objective, math.nan)):
            self._losses[now.step] = loss
        return View(run, list(self._losses.values()))


def watch(
    target: str,
    prometheus: str = PROMETHEUS,
    once: bool = False,
    console: Console | None = None,
    source: Source | None = None,
    refresh_seconds: float = REFRESH_SECONDS,
    silence_seconds: float = SILENCE_SECONDS,
) -> None:
    """Show a run until it ends. Ctrl-C stops the watching, not the run.

    Args:
        target: Run directory, `http://host:port[/metrics]` or `host:port`.
        prometheus: Server that is asked for the alerts that fire. If it does not answer, the screen says so.
        once: Print the state once and return. An output that is no terminal implies it.
        console: Where the state is drawn.
        source: Read in place of the target.
        refresh_seconds: Pause between two readings.
        silence_seconds: Time without an answer after which the run counts as ended.

    Raises:
        InputError: There is no run at the target.
    """
    console = console or Console()
    source = source or open_source(target)
    view = _first_view(source, target)
    if once or not console.is_terminal:
        console.print(draw(view, _alerts(prometheus, view.run)))
        return
    try:
        with Live(draw(view, None), console=console, auto_refresh=False) as live:
            answered = time.monotonic()
            while time.monotonic() - answered < silence_seconds:
                live.update(draw(view, _alerts(prometheus, view.run)), refresh=True)
                if view.ended:
                    return
                time.sleep(refresh_seconds)
                with suppress(*UNREADABLE):
                    view, answered = source.read(), time.monotonic()
        console.print(f"{target} has not answered for {silence_seconds:.0f} s: the run has ended")
    except KeyboardInterrupt:
        return


def open_source(target: str) -> Source:
    """Find what a target names.

    Raises:
        InputError: The target is neither a run directory nor a URL.
    """
    if Path(target).is_dir():
        require_run(Path(target))
        return DirectorySource(Path(target))
    if re.fullmatch(r"[\w.\-\[\]:]+:\d+", target):
        target = f"http://{target}"
    if not target.startswith(("http://", "https://")):
        raise InputError(
            f"{target}: neither a run directory nor a metrics URL such as http://127.0.0.1:9464", code="not-a-run"
        )
    return EndpointSource(target.rstrip("/").removesuffix("/metrics").removesuffix(STATE_PATH) + STATE_PATH)


def _first_view(source: Source, target: str) -> View:
    try:
        return source.read()
    except OSError as error:
        raise InputError(
            f"{target}: no answer ({error}); is the run alive, and its monitoring.address reachable?",
            code="run-unreachable",
        ) from None
    except UNREADABLE:
        raise InputError(
            f"{target}: answers, but not with the {STATE_PATH} of a run; if an older version of Detour runs there, "
            "watch its run directory instead (a run prints its URL at its start)",
            code="not-a-run",
        ) from None


def _alerts(prometheus: str, run: RunState) -> list[str] | None:
    """Names of the run's firing alerts; None if Prometheus does not answer."""
    if run.telemetry is None:
        return None
    identity = f"run={json.dumps(run.telemetry.run)}" + (f',id="{run.id}"' if run.id else "")
    query = f'ALERTS{{alertstate="firing",{identity}}}'
    try:
        with urlopen(f"{prometheus}/api/v1/query?{urlencode({'query': query})}", timeout=TIMEOUT_SECONDS) as answer:
            result = json.load(answer)["data"]["result"]
    except (*UNREADABLE, KeyError):
        return None
    return sorted({sample["metric"]["alertname"] for sample in result})
