"""Which failures a run survives."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.errors import RunFailedError
from launcher.group import WorkerError

LONGEST_PAUSE = 60.0
"""Seconds between two attempts, at most."""


@dataclass
class FailureBudget:
    """Counts failures of one job. An error the program raises twice at the same step will come a third time too."""

    allowed: int
    used: int = 0
    _last: tuple[int, str, str] | None = None
    _repeats: int = field(default=0)

    def spend(self, failure: WorkerError, step: int) -> float:
        """Take in a failure after `step` completed steps; seconds to wait before the next attempt.

        Raises RunFailedError with a diagnosis where another attempt is pointless, or none is left.
        """
        self.used += 1
        this = (step, failure.reason, failure.detail)
        self._repeats = self._repeats + 1 if this == self._last else 1
        self._last = this
        if self._repeats >= (2 if failure.reason == "exception" else 3):
            raise RunFailedError(
                f"the same failure {self._repeats} times in a row at step {step + 1}, so another attempt would fail "
                f"too: {failure}"
            )
        if self.used > self.allowed:
            raise RunFailedError(
                f"{failure}, after step {step}; that is failure {self.used} and cluster.max_failures allows "
                f"{self.allowed}"
            )
        return min(LONGEST_PAUSE, 2.0 ** (self._repeats - 1) - 1)
