"""Writing a file atomically, naming a file by its content, and locking one: each is done here and nowhere else."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHECKPOINT_RECORD = "detour.json"
"""File of a checkpoint that holds everything but the tensors."""
RUN_TOKENIZER = "tokenizer"
"""Folder of a run directory with the run's own copy of its tokenizer."""


def partial_path(path: Path) -> Path:
    """The hidden name beside `path` under which it is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


def write_atomically(path: Path, content: str | bytes, *, sync: bool = False) -> None:
    """Replace `path` by a file with this content; a reader sees the old file or the new one, never a part.

    Args:
        path: File to write; its folder exists.
        content: Text is written as UTF-8.
        sync: Force the content onto the disk before it becomes visible, so that it survives a loss of power.

    Raises:
        OSError: The old file is untouched then, and nothing partial is left behind.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of an indented JSON document."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sync_directory(path: Path) -> None:
    """Force the names in a directory onto the disk, after a file in it was renamed."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive_lock(path: Path, *, wait: bool = True) -> Iterator[BinaryIO]:
    """Hold the only exclusive `flock` on `path`, which is created where it is missing; yields the open file.

    Raises:
        BlockingIOError: Another process holds it, and `wait` is false.
        OSError: The file cannot be opened, or its file system has no locks.
    """
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
