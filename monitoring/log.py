"""The JSON-lines files of a run directory: metrics.jsonl and events.jsonl.

A number that is not finite is written as null, so that every line is strict JSON.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
_held: dict[Path, bytes] = {}
_lock = threading.Lock()


@contextmanager
def surviving_full_disk(path: Path) -> Iterator[None]:
    """Training is worth more than its log: a full disk is a warning, any other error is raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        logging.getLogger(__name__).warning("%s: %s", path, error.strerror)


class LineWriter:
    """Appends JSON lines. A full disk never stops the run: what could not be written is held and written later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._held = b""

    def append(self, record: dict[str, Any]) -> None:
        self._held += _encode(record)
        self._write_held()

    def sync(self) -> None:
        """Force the lines onto the disk, so that they survive a loss of power."""
        self._write_held()
        os.fsync(self._file)

    def close(self) -> None:
        self._write_held()
        os.close(self._file)

    def _write_held(self) -> None:
        with surviving_full_disk(self._path):
            while self._held:
                self._held = self._held[os.write(self._file, self._held) :]


def append_event(directory: Path, kind: str, **fields: Any) -> None:
    """Append `{"time": ISO 8601 with zone, "event": kind, **fields}` to the run's events.jsonl.

    One O_APPEND write, so several processes may do it at once. What a full disk does not take is held, and written
    with a later event of this process.
    """
    path = directory / EVENTS
    line = _encode({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **fields})
    with _lock:
        _held[path] = lines = _held.get(path, b"") + line
        with surviving_full_disk(path):
            file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(file).st_size
                torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
                written = os.write(file, b"\n" + lines if torn else lines)
                whole = lines.rfind(b"\n", 0, max(0, written - torn)) + 1
                _held[path] = lines[whole:]
                if _held[path] and os.fstat(file).st_size == size + written:  # nobody has written behind it
                    os.ftruncate(file, size + torn + whole)
            finally:
                os.close(file)


def held_events(directory: Path) -> Counter[str]:
    """Events of this process that a full disk has not taken yet, by kind."""
    with _lock:
        return Counter(json.loads(line)["event"] for line in _held.get(directory / EVENTS, b"").splitlines())


def read_events(directory: Path) -> list[dict[str, Any]]:
    """Every event of the run, oldest first."""
    return list(_read(directory / EVENTS))


class Follower:
    """Reads a file of JSON lines again and again, each line once, from any thread; a file cut back is read anew.

    What cannot be read now is read the next time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._records: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """Every line up to now, oldest first."""
        with self._lock:
            with suppress(OSError), self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset, self._records = 0, []
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    if (record := _decode(line)) is not None:
                        self._records.append(record)
            return list(self._records)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Every logged step of the run, in order."""
    return list(_read(directory / METRICS))


def rewind_metrics(directory: Path, step: int) -> None:
    """Cut metrics.jsonl back to the lines of completed steps up to `step`, dropping a torn last line.

    A run that resumes at `step` will log the later ones again.
    """
    path = directory / METRICS
    if not path.exists():
        return
    keep = 0
    with path.open("rb+") as file:
        for line in file:
            record = _decode(line)
            if record is None or record["step"] > step:
                break
            keep += len(line)
        file.truncate(keep)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for line in file:
                record = _decode(line)
                if record is not None:
                    yield record
    except FileNotFoundError:
        return
    except OSError as error:
        logging.getLogger(__name__).warning("%s: %s; what could be read of it counts", path, error.strerror)


def _encode(record: dict[str, Any]) -> bytes:
    return (json.dumps(_finite(record), allow_nan=False, ensure_ascii=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """The same JSON with null in the place of what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decode(line: bytes) -> dict[str, Any] | None:
    """The object of a complete line; None for a torn one, which a process killed while writing leaves behind."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
