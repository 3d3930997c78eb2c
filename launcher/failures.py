"""The failures that a run survives."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import RunFailedError
from monitoring.events import Reason
from monitoring.run_directory import RunDirectory

LONGEST_PAUSE = 60.0
"""Most seconds between two attempts."""
ADDRESS = re.compile(r"\[?[0-9a-f.:]*[.:][0-9a-f.:]*\]?:\d+|\b(\d+\.){3}\d+\b|0x[0-9a-f]+", re.I)
"""Parts in which two messages of one failure differ: hosts with ports, and memory addresses."""
PEER_LEFT = re.compile(r"(connection|socket).*(closed|reset|refused|aborted)|broken pipe|peer|timed? ?out", re.I)
"""Message of an exception that another rank's end has caused."""
LIKELIEST_CAUSE_FIRST = ("node_lost", "out_of_memory", "died", "exception")


class WorkerError(Exception):
    """Workers ended before the training did.

    Args:
        reason: `died`, `out_of_memory`, `node_lost`, `exception` or `hung`.
        rank: Rank at fault, where it is known.
        detail: Message for people.
        address: Address of the rank's node, where it is known.
        cause: Ray's account of the failure.
        collective: On a hang, the collective in which the other ranks wait.
    """

    def __init__(
        self,
        reason: Reason,
        rank: int | None,
        detail: str,
        address: str | None = None,
        cause: str | None = None,
        collective: str | None = None,
    ) -> None:
        who = "" if rank is None else f"rank {rank}{f' on {address}' if address else ''}: "
        super().__init__(f"{who}{detail}{f' (Ray: {cause})' if cause else ''}")
        self.reason = reason
        self.rank = rank
        self.detail = detail
        self.address = address
        self.cause = cause
        self.collective = collective


def root_cause(failures: Sequence[WorkerError], first_rank: int) -> WorkerError:
    """Return the failure that most likely caused the others.

    Args:
        failures: One per failed rank.
        first_rank: Rank whose failure was seen first.
    """

    def blame_key(failure: WorkerError) -> tuple[int, bool, bool]:
        order = LIKELIEST_CAUSE_FIRST.index(failure.reason)
        return order, bool(PEER_LEFT.search(failure.detail)), failure.rank != first_rank

    return min(failures, key=blame_key)


@dataclass
class FailureBudget:
    """Counts the failures of one job. A failure that repeats before a checkpoint was saved ends the job early."""

    allowed: int
    used: int = 0
    _last: tuple[int, str, str] | None = None
    _repeats: int = field(default=0)

    def spend(self, failure: WorkerError, saved: int) -> float:
        """Count a failure and return the seconds to wait before the next attempt.

        Args:
            failure: The failure that ended an attempt.
            saved: Completed steps in the newest checkpoint.

        Raises:
            RunFailedError: The budget is spent, or another attempt would fail alike; the message is a diagnosis.
        """
        self.used += 1
        current = (saved, failure.reason, ADDRESS.sub("", failure.detail))
        self._repeats = self._repeats + 1 if current == self._last else 1
        self._last = current
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
    """Finds workers that are alive but make no progress: suspended workers, and workers that wait for each other.

    Rank 0 rewrites telemetry.json about once per second while steps complete. An old file is therefore the symptom.

    Args:
        directory: The run directory.
        timeout: Seconds without a write after which the workers count as hung.
    """

    def __init__(self, directory: Path, timeout: float) -> None:
        self._path, self._timeout = RunDirectory(directory).telemetry, timeout
        self._last_write, self._since = self._written_at(), time.monotonic()

    def check(self) -> None:
        """Raise WorkerError if nothing has been written for longer than the timeout."""
        if (written_at := self._written_at()) != self._last_write:
            self._last_write, self._since = written_at, time.monotonic()
        elif time.monotonic() - self._since > self._timeout:
            raise WorkerError("hung", None, f"no step completed in {self._timeout:.0f} s (cluster.hang_timeout)")

    def _written_at(self) -> int:
        try:
            with self._path.open("rb") as file:  # because NFS answers a plain stat from a cache, for up to a minute
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return 0
