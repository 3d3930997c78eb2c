"""Live progress of a run in the terminal that started it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from configs.units import format_count
from monitoring.events import EventLine, tell
from monitoring.formatting import format_seconds
from monitoring.log import Follower
from monitoring.run_directory import RunDirectory
from monitoring.run_state import interruptions_in_words, seconds_left
from monitoring.telemetry import Telemetry

REFRESH_SECONDS = 0.5
LINE_SECONDS = 10.0
"""Seconds between two lines where the output is no terminal."""


class Progress:
    """Prints where a run stands while the context is open.

    Each event gets a line. On a terminal a line below them shows the progress. Elsewhere it is printed every ten
    seconds, at each new phase and at the last step. The last line says how often and why the run was interrupted.
    """

    def __init__(self, directory: Path, console: Console | None = None) -> None:
        self._directory = directory
        self._console = console or Console()
        self._stale = Telemetry.read(directory)
        self._started = time.monotonic()
        self._note = "starting"
        self._events = Follower(RunDirectory(directory).events)
        self._told = len(self._events.read())
        self._telling = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def note(self, text: str) -> None:
        """Say what happens until the next step, for instance `starting 2 workers`."""
        self._note, self._stale = text, Telemetry.read(self._directory)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._console.print(
            Text(f"{_time_of_day()} the run was {interruptions_in_words(self._events.read())}"), soft_wrap=True
        )

    def tell_events(self) -> None:
        """Print the events that have no line yet, from any thread."""
        with self._telling:
            events = self._events.read()
            for event in events[self._told :]:
                self._console.print(Text(tell(event)), soft_wrap=True)
            self._told = len(events)

    def _watch(self) -> None:
        if self._console.is_terminal:
            with Live(self._text(), console=self._console, refresh_per_second=4) as live:
                while not self._stop.wait(REFRESH_SECONDS):
                    self.tell_events()
                    live.update(self._text())
                self.tell_events()
                live.update(self._text())
            return
        printed, shown, last = -math.inf, None, Text()
        stopping = False
        while not stopping:
            stopping = self._stop.wait(REFRESH_SECONDS)
            self.tell_events()
            now, text = self._current(), self._text()
            state = (now.phase, now.step == now.total_steps) if now else None
            if text != last and (stopping or state != shown or time.monotonic() - printed >= LINE_SECONDS):
                self._console.print(Text(f"{_time_of_day()} ").append(text), soft_wrap=True)
                printed, shown, last = time.monotonic(), state, text

    def _current(self) -> Telemetry | None:
        """The telemetry, if a step has ended since the latest note."""
        now = Telemetry.read(self._directory)
        if now is None or now.step_time is None:
            return None
        return None if self._stale and self._stale.step_time == now.step_time else now

    def _text(self) -> Text:
        now = self._current()
        if now is None:
            return Text(f"{self._note} · {format_seconds(time.monotonic() - self._started)}")
        return Text(describe(now, self._events.read()))


def _time_of_day() -> str:
    return time.strftime("%H:%M:%S")


def describe(now: Telemetry, events: Sequence[EventLine] = ()) -> str:
    """Say phase, objective, step, loss, throughput and time left in one line."""
    left = seconds_left(now, events, time.time())
    loss = now.loss.get(now.objective)
    return " · ".join(
        [
            f"phase {now.phase + 1}/{len(now.objectives)} {now.objective}",
            f"step {now.step}/{now.total_steps}",
            "no loss yet" if loss is None else f"loss {loss:.3f}",
            f"{format_count(now.tokens_per_second)} tokens/s",
            f"{format_seconds(left)} left" if now.step < now.total_steps else "done",
        ]
    )
