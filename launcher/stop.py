"""Asking the workers of a run to save and return."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from configs.errors import RunFailedError

SIGNAL = "signal"
PREEMPTED = "preempted"
RESIZED = "resized"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While open, SIGTERM and Ctrl-C ask the workers to save and return; a second one ends the job at once.

    Open it after `ray.init`, which installs a handler of its own. Main thread only.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._asked: str | None = None
        self._before: dict[int, Any] = {}

    def ask(self, reason: str) -> None:
        self._asked = self._asked or reason

    @property
    def reason(self) -> str | None:
        """Why the workers are to stop. A signal outlasts every attempt, and comes before any other reason."""
        return SIGNAL if self._signalled else self._asked

    def clear(self) -> None:
        """For the next attempt."""
        self._asked = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise RunFailedError("ended at once by a second signal; steps after the newest checkpoint are lost")
        self._signalled = True
