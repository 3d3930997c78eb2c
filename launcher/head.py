"""The watch over Ray's head. Without it Ray would block this process for a minute and then end it."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Thread
from types import TracebackType
from typing import Self

from launcher.nodes import refusal

PROBE_SECONDS = 2.0
"""Seconds between two connections to the head."""
LOST_SECONDS = 10.0
"""Seconds without an answer after which the head counts as lost."""


class HeadWatch:
    """Calls `lost` in a thread of its own when the head has not answered for LOST_SECONDS, while the context is open.

    Only a thread can act then, because the main thread is mostly inside a call of Ray that does not return.

    Args:
        address: `host:port` of the head's control service (GCS).
        lost: Called once, with a message.
        patience: Seconds without an answer.
    """

    def __init__(self, address: str, lost: Callable[[str], object], patience: float = LOST_SECONDS) -> None:
        self._address, self._lost, self._patience = address, lost, patience
        self._closed = Event()
        self._thread = Thread(target=self._watch, name="head-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        host, _, port = self._address.rpartition(":")
        answered = time.monotonic()
        while not self._closed.wait(min(PROBE_SECONDS, self._patience / 4)):
            if refusal(host.strip("[]"), int(port)) is None:
                answered = time.monotonic()
            elif time.monotonic() - answered >= self._patience and not self._closed.is_set():
                self._lost(f"the Ray head at {self._address} has not answered for {self._patience:.0f} s")
                return
