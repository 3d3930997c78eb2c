"""The directory of a run: whose it is, and how far it has come."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import InputError
from configs.load import changes_of_run, dump_config, load_config
from configs.schema import RunConfig

CONFIG = "config.yaml"
LOCK = ".lock"


@contextmanager
def claim(directory: Path, config: RunConfig) -> Iterator[None]:
    """Make `directory` this run's for as long as the context is open, and write its config.yaml.

    Raises InputError where it cannot be written, is in use, or holds something other than this run.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"--output {directory} cannot be written: {error.strerror}; choose another") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--output {directory} is in use by another detour-train; wait for it or choose another"
            ) from None
        except OSError as error:
            raise InputError(
                f"--output {directory}: its file system locks no files ({error.strerror}), so two jobs could write "
                "there at once; choose one that does (NFS 4, or Lustre mounted with -o flock)"
            ) from None
        _require_same_run(directory, config)
        _write_token(lock, directory)
        _replace(directory / CONFIG, dump_config(config))
        yield
    finally:
        os.close(lock)


def token_of(directory: Path) -> str | None:
    """What the job that has the directory wrote into it: the same seen from every node, where the directory is."""
    try:
        return (directory / LOCK).read_text(encoding="ascii")
    except OSError:
        return None


def _write_token(lock: int, directory: Path) -> None:
    try:
        os.ftruncate(lock, 0)
        os.write(lock, secrets.token_hex(16).encode())
        os.fsync(lock)
    except OSError as error:
        raise InputError(f"--output {directory} cannot be written: {error.strerror}; choose another") from None


def _require_same_run(directory: Path, config: RunConfig) -> None:
    path = directory / CONFIG
    if not path.exists():
        others = sorted(entry.name for entry in directory.iterdir() if entry.name != LOCK)
        if others:
            raise InputError(
                f"--output {directory} holds {', '.join(others[:3])} but no {CONFIG}, so it is no run; choose another"
            )
        return
    if changed := changes_of_run(load_config(str(path)), config):
        raise InputError(
            f"--output {directory} holds a different run\n  "
            + "\n  ".join(changed)
            + "\nchoose another --output for a new run, or restore these keys to continue that one"
        )


def _replace(path: Path, content: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
