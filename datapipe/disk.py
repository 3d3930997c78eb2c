"""The directory that is written: one process at a time, and what the disk refuses is told."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import InputError


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Wait for whoever prepares the same directory."""
    output = output.absolute()  # it may be given as `.`, which has no name
    path = output.with_name(f".{output.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}; choose another directory") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into an InputError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space and run the same command again: it continues" if full else "check its permissions"
        raise InputError(f"{path} cannot be written: {error.strerror}; {remedy}") from None
