"""The claim of a job on its run directory: one job at a time, and one run per directory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from configs.errors import InputError
from configs.files import exclusive_lock, write_atomically
from configs.load import changes_of_run, dump_config, load_config
from configs.schema import RunConfig
from launcher.same_inputs import spelt_as_before
from monitoring.run_directory import RunDirectory


@contextmanager
def claim(directory: Path, config: RunConfig) -> Iterator[RunConfig]:
    """Hold `directory` for one run, and write its config.yaml.

    Yields:
        The configuration. A branch keeps its origin, whether or not `--from` is given again.

    Raises:
        InputError: The directory cannot be written, is in use, or holds something other than this run.
    """
    run = RunDirectory(directory)
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"--output {directory}: Ray takes no directory whose name is not UTF-8; choose another",
            key="--output",
            code="output-not-utf-8",
        ) from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        run.lock.touch()
    except OSError as error:
        raise _unwritable(directory, error) from None
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(exclusive_lock(run.lock, wait=False))
        except BlockingIOError:
            raise InputError(
                f"--output {directory} is in use by another detour-train; wait for it or choose another",
                key="--output",
                code="output-in-use",
            ) from None
        except OSError as error:
            raise InputError(
                f"--output {directory}: its file system locks no files ({error.strerror}), so two jobs could write "
                "there at once; choose one that does (NFS 4, or Lustre mounted with -o flock)",
                key="--output",
                code="output-without-locks",
            ) from None
        config = _same_run(run, config)
        try:
            _write_token(lock)
            write_atomically(run.config, dump_config(config))
        except OSError as error:
            raise _unwritable(directory, error) from None
        yield config


def token_of(directory: Path) -> str | None:
    """Token that the job wrote into its run directory: equal on every node that sees the same directory."""
    try:
        return RunDirectory(directory).lock.read_text(encoding="ascii")
    except OSError:
        return None


def _write_token(lock: BinaryIO) -> None:
    lock.truncate(0)
    lock.write(secrets.token_hex(16).encode())
    lock.flush()
    os.fsync(lock.fileno())


def _same_run(run: RunDirectory, config: RunConfig) -> RunConfig:
    """Return the configuration with the origin that the directory holds, if both are of the same run."""
    if not run.config.exists():
        others = sorted(entry.name for entry in run.path.iterdir() if entry != run.lock)
        if others:
            raise InputError(
                f"--output {run.path} holds {', '.join(others[:3])} but no {run.config.name}, so it is no run; "
                "choose another",
                key="--output",
                code="output-is-no-run",
            )
        return config
    if not run.events.exists() and not run.checkpoints.exists():  # nothing was done with that configuration
        return config
    before = load_config(str(run.config))
    if config.origin is None:
        config = config.model_copy(update={"origin": before.origin})
    if changed := changes_of_run(before, spelt_as_before(run.path, before, config)):
        raise InputError(
            f"--output {run.path} holds a different run\n  "
            + "\n  ".join(changed)
            + "\nrestore these keys to continue that run, choose another --output for a new run, or branch off: "
            f"detour-train RECIPE --from {run.path} --output ANOTHER keeps the optimizer and the data position, and "
            "lets later phases differ",
            key="--output",
            code="output-of-another-run",
        )
    return config


def _unwritable(directory: Path, error: OSError) -> InputError:
    return InputError(
        f"--output {directory} cannot be written: {error.strerror}; choose another",
        key="--output",
        code="output-unwritable",
    )
