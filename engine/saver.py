"""Writes checkpoints behind the training steps.

`begin` plans the save with all ranks and copies the tensors; a thread writes them; once every rank has written its
part, `complete` makes the checkpoint visible. A rank learns of the others' threads through the all-reduce it makes
every step, so no extra synchronisation is paid for.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from engine.checkpoint import FORMAT, file_digest, prune, sharded_state
from engine.device import device
from engine.modernbert.config import CONFIG_FILE

MARGIN = 64 * 2**20
"""Bytes that stay free on the disk after a save."""


class SaveFailedError(Exception):
    """A checkpoint could not be written, on this or another rank; older ones are untouched."""


class Saver:
    """Saves into one folder, one checkpoint at a time; all ranks call its methods together."""

    def __init__(self, folder: Path, keep: int, keep_every: int | None = None) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._target: Path | None = None
        self._meta: dict[str, Any] = {}
        self._request: Any = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._files: dict[str, tuple[int, str]] = {}
        self._started = 0.0
        self._validated = False
        """Whether Megatron has checked that the parts of all ranks make wholes: once is enough, they do not change."""
        self.stall = 0.0
        """Seconds the training stood still for the save under way or last done."""

    @property
    def pending(self) -> bool:
        """Whether a save was begun and not completed; the same on every rank."""
        return self._target is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, checkpoint: Path, model: Any, optimizer: Any | None, meta: dict[str, Any]) -> None:
        """Copy everything and start writing. `meta` (rank 0's counts) is the JSON kept beside the tensors.

        Raises SaveFailedError on every rank where the disk has no room for it.
        """
        self._started = time.perf_counter()
        state = sharded_state(model, optimizer, loading=False)
        hidden = checkpoint.parent / f".{checkpoint.name}.partial"
        self._make_room(hidden, model, optimizer)
        # Megatron's own queue of results is made by a spawned process, which imports torch and Megatron again: seconds
        # for a save of milliseconds. The results stay in this process, so a local queue will do.
        filesystem_async._results_queue = queue.Queue()
        named = inspect.signature(dist_checkpointing.save).parameters
        local = {"async_strategy": "mcore"} if "async_strategy" in named else {}  # 0.19 prefers another package's
        self._request = dist_checkpointing.save(
            state, str(hidden), async_sharded_save=True, validate_access_integrity=not self._validated, **local
        )
        self._validated = True
        self._target, self._meta = checkpoint, {**meta, "optimizer": optimizer is not None}
        self._error, self._files = None, {}
        buckets = self._copied_buckets()
        self._thread = threading.Thread(target=self._write, args=(hidden, buckets), name="detour-checkpoint")
        self._thread.start()
        self.stall = time.perf_counter() - self._started

    @property
    def failed(self) -> bool:
        """Whether this rank's thread has failed."""
        return self._error is not None

    def complete(self, failed: bool) -> tuple[Path, float]:
        """Make the written checkpoint visible and drop old ones; its path and the seconds since `begin`.

        Called when no rank is writing any more; `failed`: whether one of them failed. Raises SaveFailedError then.
        """
        started = time.perf_counter()
        assert self._target is not None and self._thread is not None
        target, self._target = self._target, None
        self._thread.join()
        hidden = target.parent / f".{target.name}.partial"
        if failed:
            if dist.get_rank() == 0:
                shutil.rmtree(hidden, ignore_errors=True)
            raise SaveFailedError(f"{target} was not saved: {self._error or 'another rank could not write its part'}")
        for finalize in self._request.finalize_fns:
            finalize()
        gathered: list[dict[str, tuple[int, str]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, self._files)
        if dist.get_rank() == 0:
            files = {name: entry for part in gathered for name, entry in part.items()}
            files |= {path.name: file_digest(path) for path in hidden.iterdir() if path.name not in files}
            _write_json(hidden / CONFIG_FILE, {"format": FORMAT, **self._meta, "files": dict(sorted(files.items()))})
            shutil.rmtree(target, ignore_errors=True)  # only a damaged one can stand there
            hidden.rename(target)
            prune(self._folder, self._keep, self._keep_every)
        dist.barrier()
        self._request = None
        self.stall += time.perf_counter() - started
        return target, time.perf_counter() - self._started

    def wait(self) -> tuple[Path, float]:
        """`complete` at once, waiting for the threads of all ranks."""
        assert self._thread is not None
        self._thread.join()
        flag = torch.tensor([float(self.failed)], device=device())
        dist.all_reduce(flag)
        return self.complete(failed=bool(flag.item()))

    def _make_room(self, hidden: Path, model: Any, optimizer: Any | None) -> None:
        """Clear the hidden folder and see that the disk can take the checkpoint; one decision for all ranks."""
        verdict: list[str | None] = [None]
        size = torch.tensor([float(_state_bytes(model, optimizer))], device=device())
        dist.all_reduce(size)
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(hidden, ignore_errors=True)
                hidden.mkdir(parents=True)
                free = shutil.disk_usage(hidden).free
                if free < size.item() + MARGIN:
                    verdict = [f"{hidden.parent}: {free / 1e9:.2f} GB are free, {size.item() / 1e9:.2f} GB are needed"]
                    hidden.rmdir()
            except OSError as error:
                verdict = [f"{hidden}: {error.strerror}"]
        dist.broadcast_object_list(verdict)
        if verdict[0]:
            raise SaveFailedError(verdict[0])

    def _copied_buckets(self) -> list[Any]:
        """Megatron's write plan with its own copy of every tensor, so that training may go on changing them."""
        if self._request.async_fn is None:
            return []
        return [
            (name, key, (data, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors]))
            for name, key, (data, tensors) in self._request.async_fn_args[1]
        ]

    def _write(self, hidden: Path, buckets: list[Any]) -> None:
        try:
            results: dict[int, Any] = {}
            for number, bucket in enumerate(buckets):
                written: queue.Queue[tuple[int, Any]] = queue.Queue()
                count: queue.Queue[int] = queue.Queue()
                count.put(number)
                # Megatron 0.16 would fork a process a file here, which a process with threads had better not.
                filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                    self._request.async_fn.args[0], number, bucket, written, count, True
                )
                _, results[number] = written.get()
                if isinstance(results[number], Exception):
                    raise results[number]
            if buckets:
                self._request.async_fn_args[2].put(results)
            self._files = {path.name: file_digest(path) for path in _written_here(hidden)}
        except Exception as error:
            logging.getLogger(__name__).warning("checkpoint %s: %s", hidden, error)
            self._error = error


def save_now(checkpoint: Path, model: Any, optimizer: Any | None, meta: dict[str, Any]) -> None:
    """Write one checkpoint and wait for it; all ranks together. Raises SaveFailedError."""
    saver = Saver(checkpoint.parent, keep=2**31)
    saver.begin(checkpoint, model, optimizer, meta)
    saver.wait()


def _state_bytes(model: Any, optimizer: Any | None) -> int:
    """An upper bound of what this rank writes."""
    tensors = list(model.parameters())
    for part in getattr(optimizer, "chained_optimizers", []):
        for state in part.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)] * 2
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _written_here(folder: Path) -> Iterator[Path]:
    """The tensor files of this rank."""
    yield from folder.glob(f"__{dist.get_rank()}_*")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
