"""Guards around a directory that is written: a lock, and messages for what the disk refuses."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from configs.errors import InputError
from configs.files import exclusive_lock

CONTINUES = "free some space and run the same command again: it continues"


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Let one process at a time write `output`; wait for the process that writes it now.

    Raises:
        InputError: The lock beside `output` cannot be made.
    """
    output = output.absolute()  # because `.` has no name to call the lock by
    path = output.with_name(f".{output.name}.lock")
    with ExitStack() as stack:
        with disk_errors_as_input_errors(output, remedy="choose another directory"):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive_lock(path))
        yield


@contextmanager
def disk_errors_as_input_errors(
    path: Path, *, key: str | None = None, if_full: str = CONTINUES, remedy: str = "check its permissions"
) -> Iterator[None]:
    """Turn an OSError into an InputError with a remedy, of code `disk-full` or `not-writable`.

    Args:
        path: What is written, for the message.
        key: The configuration key that names `path`, if there is one.
        if_full: What to do about a full disk.
        remedy: What to do about any other error.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise InputError(
            f"{f'{key}: ' if key else ''}{path} cannot be written: {error.strerror}; {if_full if full else remedy}",
            key=key,
            code="disk-full" if full else "not-writable",
        ) from None
