"""Progress lines of a preparation."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from configs.units import format_count
from datapipe.encode import WrittenShard

Progress = Callable[[str], None]
"""Receives a line about the progress, about once per second."""


class ProgressMeter:
    """Sends a progress line per second, by the text that the processes have tokenized."""

    def __init__(self, progress: Progress | None, total: int, encoded: Any) -> None:
        self._progress, self._total, self._encoded = progress, total, encoded
        self._position = self._text = self._skipped = 0
        self._start = self._shown = time.monotonic()

    def read(self, position: int, text: int) -> None:
        """Count bytes of text that were read, up to a position of the input."""
        self._position = position
        self._text += text

    def skip(self, text: int) -> None:
        """Count bytes of text that were tokenized before."""
        self._skipped += text

    def wait(self, future: Future[WrittenShard]) -> WrittenShard:
        """Wait for a shard, and show the progress meanwhile."""
        while not future.done() and not wait([future], timeout=1).done:
            self.show()
        return future.result()

    def show(self, last: bool = False) -> None:
        """Send a line if one is due, or if it is the last."""
        now = time.monotonic()
        if self._progress is None or (now < self._shown + 1 and not last):
            return
        self._shown = now
        # Estimated, because the text of compressed input is known only as far as the input has been read.
        total_text = self._text * self._total / max(self._position, 1)
        share = min((self._encoded.value + self._skipped) / total_text, 1.0)
        speed = self._encoded.value / (now - self._start)
        left = f", {total_text * (1 - share) / speed:,.0f} s left" if speed else ""
        self._progress(f"prepared {share:.0%} of {total_text / 1e6:,.1f} MB of text, {format_count(speed)}B/s{left}")
