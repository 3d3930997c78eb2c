"""Which failures a run survives."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import RunFailedError
from launcher.group import WorkerError
from monitoring.run_directory import RunDirectory

LONGEST_PAUSE = 60.0
"""Seconds between two attempts, at most."""
ADDRESS = re.compile(r"\[?[0-9a-f.:]*[.:][0-9a-f.:]*\]?:\d+|\b(\d+\.){3}\d+\b|0x[0-9a-f]+", re.I)
"""What differs between two messages of one failure: hosts with ports, and places in memory."""


@dataclass
class FailureBudget:
    """Counts failures of one job. One that comes again before a checkpoint was saved will come a third time too."""

    allowed: int
    used: int = 0
    _last: tuple[int, str, str] | None = None
    _repeats: int = field(default=0)

    def spend(self, failure: WorkerError, saved: int) -> float:
        """Take in a failure, with the step of the newest checkpoint; seconds to wait before the next attempt.

        Raises RunFailedError with a diagnosis where another attempt is pointless, or none is left.
        """
        self.used += 1
        this = (saved, failure.reason, ADDRESS.sub("", failure.detail))
        self._repeats = self._repeats + 1 if this == self._last else 1
        self._last = this
        if self._repeats >= (2 if failure.reason == "exception" else 3):
            raise RunFailedError(
                f"the same failure {self._repeats} times in a row and no checkpoint saved in between (the newest is of "
                f"step {saved}), so another attempt would fail too: {failure}"
            )
        if self.used > self.allowed:
            raise RunFailedError(
                f"{failure}; that is failure {self.used} and cluster.max_failures allows {self.allowed}. The newest "
                f"checkpoint is of step {saved}"
            )
        return min(LONGEST_PAUSE, 2.0 ** (self._repeats - 1) - 1)


class HangWatch:
    """Finds workers that are alive and get nowhere: stopped ones, and those that wait for each other.

    Rank 0 rewrites telemetry.json about once a second while steps complete, so its silence is the sign.
    """

    def __init__(self, directory: Path, timeout: float) -> None:
        self._path, self._timeout = RunDirectory(directory).telemetry, timeout
        self._seen, self._since = self._written(), time.monotonic()

    def check(self) -> None:
        """Raises WorkerError where nothing has been written for longer than the timeout."""
        if (now := self._written()) != self._seen:
            self._seen, self._since = now, time.monotonic()
        elif time.monotonic() - self._since > self._timeout:
            raise WorkerError("hung", None, f"no step completed in {self._timeout:.0f} s (cluster.hang_timeout)")

    def _written(self) -> int:
        return self._path.stat().st_mtime_ns if self._path.exists() else 0
