"""Asking the workers of a run to save and return."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from configs.errors import RunFailedError
from launcher.worker import STOP_FILE, stop_reason

SIGNAL = "signal"
PREEMPTED = "preempted"
RESIZED = "resized"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While open, SIGTERM and Ctrl-C ask the workers to save and return; a second one ends the job at once.

    Open it after `ray.init`, which installs a handler of its own. Main thread only.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._before: dict[int, Any] = {}

    def ask(self, reason: str) -> None:
        if self.reason is None:
            (self._directory / STOP_FILE).write_text(reason, encoding="utf-8")

    @property
    def reason(self) -> str | None:
        return stop_reason(self._directory)

    def clear(self) -> None:
        (self._directory / STOP_FILE).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.clear()
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason == SIGNAL:
            raise RunFailedError("ended at once by a second signal; steps after the newest checkpoint are lost")
        self.clear()
        self.ask(SIGNAL)
