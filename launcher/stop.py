"""Requests to the workers of a run to save and return."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from configs.errors import RunFailedError

SIGNAL = "signal"
PREEMPTED = "preempted"
RESIZED = "resized"
HEAD_LOST = "the Ray head was lost"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While open, SIGTERM and Ctrl-C ask the workers to save and return; a second signal ends the job at once.

    Open it after `ray.init`, because Ray installs a signal handler. Main thread only.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._asked: str | None = None
        self._handlers_before: dict[int, Any] = {}
        self._relay: Callable[[str], object] | None = None

    @contextmanager
    def relayed_by(self, relay: Callable[[str], object]) -> Iterator[None]:
        """Have `relay` carry reasons to the workers while the context is open."""
        self._relay = relay
        try:
            yield
        finally:
            self._relay = None

    def relay(self, reason: str) -> None:
        """Tell the workers to save and return, from any thread and without Ray. Without workers nothing happens."""
        if relay := self._relay:
            relay(reason)

    def ask(self, reason: str) -> None:
        """Ask the workers to stop; the first reason counts."""
        self._asked = self._asked or reason

    @property
    def reason(self) -> str | None:
        """Why the workers are to stop. A signal outlasts every attempt, and overrides any other reason."""
        return SIGNAL if self._signalled else self._asked

    def clear(self) -> None:
        """Forget every reason but a signal, before the next attempt."""
        self._asked = None

    def __enter__(self) -> Self:
        self._handlers_before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise RunFailedError("ended at once by a second signal; steps after the newest checkpoint are lost")
        self._signalled = True


def stop_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent ends, as a killed study cannot."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
