"""The JSON-lines files of a run directory: metrics.jsonl and events.jsonl.

Numbers that are not finite are written as null, so that every line is strict JSON.
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

from pydantic_core import from_json

from monitoring.run_directory import RunDirectory

_STEP_KEYS = {"step", "phase", "objective", "loss", "tokens", "learning_rate", "grad_norm", "packing_ratio"}
_STEP_KEYS |= {"step_seconds", "data_wait_seconds", "tokens_per_second", "mfu"}
"""Keys of each line of metrics.jsonl (contract). Readers rely on them."""
_held_lines: dict[Path, bytes] = {}
"""Lines that a full disk has not taken yet, by file."""
_lock = threading.Lock()


@contextmanager
def surviving_full_disk(path: Path) -> Iterator[None]:
    """Warn where the disk is full and raise any other error, because training is worth more than its log."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        logging.getLogger(__name__).warning("%s: %s", path, error.strerror)


class LineWriter:
    """Appends JSON lines to a file. Lines that a full disk refuses are held in memory and written later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._held = b""

    def append(self, record: dict[str, Any]) -> None:
        """Write one line."""
        self._held += _encode(record)
        self._write_held()

    def sync(self) -> None:
        """Force the lines onto the disk, so that they survive a loss of power."""
        self._write_held()
        os.fsync(self._file)

    def close(self) -> None:
        """Write the held lines, then close the file."""
        self._write_held()
        os.close(self._file)

    def _write_held(self) -> None:
        with surviving_full_disk(self._path):
            while self._held:
                self._held = self._held[os.write(self._file, self._held) :]


def append_event(directory: Path, kind: str, **fields: Any) -> None:
    """Append `{"time": ISO 8601 with zone, "event": kind, **fields}` to the run's events.jsonl.

    Product code calls `monitoring.events.record` instead. Several processes may append at once, because each append is
    one O_APPEND write. Lines that a full disk refuses are held and written with the next event of this process.
    """
    path = RunDirectory(directory).events
    line = _encode({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **fields})
    with _lock:
        _held_lines[path] = lines = _held_lines.get(path, b"") + line
        with surviving_full_disk(path):
            file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(file).st_size
                torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
                written = os.write(file, b"\n" + lines if torn else lines)
                complete = lines.rfind(b"\n", 0, max(0, written - torn)) + 1
                _held_lines[path] = lines[complete:]
                if _held_lines[path] and os.fstat(file).st_size == size + written:  # no other process wrote after it
                    os.ftruncate(file, size + torn + complete)
            finally:
                os.close(file)


def held_events(directory: Path) -> Counter[str]:
    """Count the events of this process that a full disk has not taken yet, by kind."""
    with _lock:
        held = _held_lines.get(RunDirectory(directory).events, b"")
    return Counter(json.loads(line)["event"] for line in held.splitlines())


def read_events(directory: Path) -> list[dict[str, Any]]:
    """Read every event of the run, oldest first."""
    return list(_read(RunDirectory(directory).events))


class Follower:
    """Reads a growing file of JSON lines, each line once, from any thread.

    A file that became shorter is read again from its start. A file that cannot be read now is tried again next time.

    Args:
        path: The file.
        tail: Bytes at the end of the file to begin with; None: the whole file.
    """

    def __init__(self, path: Path, tail: int | None = None) -> None:
        self._path, self._holds_events = path, _holds_events(path)
        self._offset = 0
        if tail is not None:
            with suppress(OSError):
                self._offset = max(0, path.stat().st_size - tail)
        self._records: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """Return every line so far, oldest first."""
        with self._lock:
            with suppress(OSError), self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset, self._records = 0, []
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    if (record := _decode(line, self._holds_events)) is not None:
                        self._records.append(record)
            return list(self._records)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Read every logged step of the run, in order."""
    return list(_read(RunDirectory(directory).metrics))


def iterate_metrics(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield every logged step of the run, in order, without holding all of them."""
    return _read(RunDirectory(directory).metrics)


def count_metrics(directory: Path) -> int:
    """Count the lines of metrics.jsonl."""
    try:
        with RunDirectory(directory).metrics.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    except OSError:
        return 0


def rewind_metrics(directory: Path, step: int) -> None:
    """Cut metrics.jsonl back to the lines of the steps up to `step`, and drop a torn last line.

    A run that resumes at `step` logs the later steps again. Damaged lines before them stay where they are.
    """
    path = RunDirectory(directory).metrics
    if not path.exists():
        return
    keep = offset = 0
    with path.open("rb+") as file:
        for line in file:
            offset += len(line)
            record = _decode(line, is_event=False)
            if record is None:
                continue
            if record["step"] > step:
                break
            keep = offset
        file.truncate(keep)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    damaged, holds_events = 0, _holds_events(path)
    try:
        with path.open("rb") as file:
            for line in file:
                record = _decode(line, holds_events)
                if record is not None:
                    yield record
                else:
                    damaged += line.endswith(b"\n")  # else torn
        if damaged:
            logging.getLogger(__name__).warning(
                "%s: %d damaged %s not used", path, damaged, "line is" if damaged == 1 else "lines are"
            )
    except FileNotFoundError:
        return
    except OSError as error:
        logging.getLogger(__name__).warning("%s: %s; only the lines before this error are used", path, error.strerror)


def _encode(record: dict[str, Any]) -> bytes:
    return (json.dumps(_finite(record), allow_nan=False, ensure_ascii=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """Replace each number that is not finite by None."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _holds_events(path: Path) -> bool:
    return path == RunDirectory(path.parent).events


def _decode(line: bytes, is_event: bool) -> dict[str, Any] | None:
    """Decode a complete line; None for a damaged one, or a torn one, which a killed process leaves behind."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = from_json(line, allow_inf_nan=False)  # several times as fast as json, which counts in a long log
        if is_event:
            return record if record["event"] and datetime.fromisoformat(record["time"]).tzinfo else None
        return record if type(record["step"]) is int and record.keys() >= _STEP_KEYS else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
