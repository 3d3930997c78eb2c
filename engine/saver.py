"""Writes checkpoints behind the training steps.

`begin` copies the tensors; all that follows happens in a thread of each rank. The threads meet in a process group of
their own: rank 0's makes room, every one writes its part, and rank 0's makes the whole visible. What goes wrong on one
rank, each of them knows at the end. That all have ended, a rank learns through the all-reduce it makes every step, so
no synchronisation is paid for in training.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig

from engine.checkpoint import FORMAT, file_digest, partial_directory, prune, sharded_weights
from engine.megatron.fp8_state import sharded_fp8_state
from engine.megatron.optimizer_shards import common_state, local_shards
from engine.megatron.torch_index import INDEX_FILE, StoredShard, encode_index
from engine.modernbert.config import CONFIG_FILE

MARGIN = 64 * 2**20
"""Bytes that stay free on the disk after a save."""
LONGEST_SAVE = timedelta(days=1)
"""For which ranks wait for the slowest, behind the training. One that does not write at all is noticed at the next."""

logger = logging.getLogger(__name__)


class SaveFailedError(Exception):
    """A checkpoint could not be written, on this or another rank; older ones are untouched."""


@dataclass(frozen=True)
class _Part:
    """A box of one of the whole model's tensors, which this rank writes."""

    key: str
    offset: tuple[int, ...]
    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    live: torch.Tensor
    """What training changes in place."""
    copy: torch.Tensor
    """How it was when the save began. Every save uses the same memory, pinned where a GPU copies to it."""


@dataclass(frozen=True)
class _Written:
    """What one rank has done for a checkpoint."""

    parts: list[StoredShard]
    files: dict[str, tuple[int, str]]
    data: dict[str, Any]


class Saver:
    """Saves into one folder, one checkpoint at a time; all ranks call its methods together."""

    def __init__(self, folder: Path, keep: int, keep_every: int | None = None) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._group = dist.new_group(backend="gloo", timeout=LONGEST_SAVE)
        self._parts: list[_Part] | None = None
        self._target: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        """What ended this rank's thread before the ranks could agree."""
        self._problem: str | None = None
        """Why the checkpoint could not be saved, as all ranks know."""
        self._started = self._ended = 0.0
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

    def begin(
        self,
        checkpoint: Path,
        model: Any,
        optimizer: Any | None,
        meta: dict[str, Any],
        data: dict[str, Any] | None = None,
        started: float | None = None,
    ) -> None:
        """Copy everything and start writing.

        meta: the JSON kept beside the tensors; rank 0's counts.
        data: this rank's share of the positions in the data, which are put together.
        started: when training was interrupted for it, by `time.perf_counter`; default now.
        """
        self._started = time.perf_counter() if started is None else started
        if self._parts is None:  # parameters and moments stay where they are in memory, so one look is enough
            tensors = {**sharded_weights(model), **sharded_fp8_state(model)}
            self._parts = [_part(tensor) for tensor in local_shards(tensors, optimizer)]
        for part in self._parts:
            part.copy.copy_(part.live, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        common = io.BytesIO()
        if dist.get_rank() == 0:
            torch.save({"optimizer": common_state(optimizer)} if optimizer is not None else {}, common)
        meta = {**meta, "optimizer": optimizer is not None}
        self._target, self._error, self._problem = checkpoint, None, None
        self._thread = threading.Thread(
            target=self._save, args=(checkpoint, meta, common.getvalue(), data or {}), name="detour-checkpoint"
        )
        self._thread.start()
        self.stall = time.perf_counter() - self._started

    def wait(self) -> tuple[Path, float]:
        """`complete`, after waiting for the threads of all ranks."""
        assert self._thread is not None
        started = time.perf_counter()
        self._thread.join()
        self.stall += time.perf_counter() - started
        return self.complete()

    def complete(self) -> tuple[Path, float]:
        """The checkpoint that was begun, visible by now, and the seconds it took.

        Called when no rank is writing any more. Raises SaveFailedError on every rank where it could not be written.
        """
        assert self._target is not None and self._thread is not None
        self._thread.join()
        target, self._target = self._target, None
        if self._error:
            raise self._error
        if self._problem:
            raise SaveFailedError(f"{target} was not saved: {self._problem}")
        return target, self._ended - self._started

    def _save(self, target: Path, meta: dict[str, Any], common: bytes, data: dict[str, Any]) -> None:
        try:
            self._problem = self._try_to_save(target, meta, common, data)
        except Exception as error:  # another rank has gone, or a fault of ours
            self._error = error
        self._ended = time.perf_counter()

    def _try_to_save(self, target: Path, meta: dict[str, Any], common: bytes, data: dict[str, Any]) -> str | None:
        hidden = partial_directory(target)
        assert self._parts is not None
        size = torch.tensor([float(sum(part.copy.nbytes for part in self._parts))], dtype=torch.float64)
        dist.all_reduce(size, group=self._group)
        if problem := self._on_rank_0(hidden, lambda: _make_room(hidden, size.item())):
            return problem
        mine: _Written | str
        try:
            mine = self._write(hidden, data)
        except Exception as error:
            mine = f"rank {dist.get_rank()}: {error}"
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(mine, gathered if dist.get_rank() == 0 else None, group=self._group)
        return self._on_rank_0(hidden, lambda: self._publish(hidden, target, meta, common, gathered))

    def _on_rank_0(self, hidden: Path, work: Callable[[], None]) -> str | None:
        """Do it there alone; what went wrong, on every rank."""
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                work()
            except Exception as error:
                logger.warning("checkpoint %s: %s", hidden, error)
                problem = [str(error)]
                shutil.rmtree(hidden, ignore_errors=True)
        dist.broadcast_object_list(problem, group=self._group)
        return problem[0]

    def _write(self, hidden: Path, data: dict[str, Any]) -> _Written:
        """This rank's file, in the format of torch's own writer."""
        assert self._parts is not None
        if not self._parts:
            return _Written([], {}, data)
        path = hidden / f"__{dist.get_rank()}_0.distcp"
        stored = []
        with path.open("wb") as file:
            for part in self._parts:
                start = file.tell()
                torch.save(part.copy, file)
                where = (path.name, start, file.tell() - start)
                stored.append(
                    StoredShard(part.key, part.offset, tuple(part.copy.shape), part.whole, part.copy.dtype, *where)
                )
            file.flush()
            os.fsync(file.fileno())
        return _Written(stored, {path.name: file_digest(path)}, data)

    def _publish(
        self, hidden: Path, target: Path, meta: dict[str, Any], common: bytes, gathered: list[_Written | str]
    ) -> None:
        """Add what is written once, see that everything is there, and make it visible."""
        failures = [written for written in gathered if isinstance(written, str)]
        if failures:
            raise SaveFailedError("; ".join(failures))
        ranks = [written for written in gathered if isinstance(written, _Written)]
        whole = {
            INDEX_FILE: encode_index(part for rank in ranks for part in rank.parts),
            "metadata.json": json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode(),
            "common.pt": common,
        }
        for name, content in whole.items():
            _write_bytes(hidden / name, content)
        files = {name: entry for rank in ranks for name, entry in rank.files.items()}
        for name, (size, _) in files.items():
            path = hidden / name
            if not path.is_file() or path.stat().st_size != size:
                raise SaveFailedError(
                    f"{path} is not what its rank has written; the run directory must lie on storage that all nodes "
                    "share"
                )
        files |= {name: file_digest(hidden / name) for name in whole}
        if data := {stream: state for rank in ranks for stream, state in rank.data.items()}:
            meta = {**meta, "data": data}
        meta = {"format": FORMAT, **meta, "files": dict(sorted(files.items()))}
        _write_bytes(hidden / CONFIG_FILE, json.dumps(meta, indent=1).encode())
        _sync_directory(hidden)
        hidden.rename(target)
        _sync_directory(target.parent)  # on the disk before older ones are taken off it
        try:
            prune(self._folder, self._keep, self._keep_every)
        except OSError as error:
            logger.warning("old checkpoints in %s were not deleted: %s", self._folder, error)


def save_now(checkpoint: Path, model: Any, optimizer: Any | None, meta: dict[str, Any]) -> None:
    """Write one checkpoint and wait for it; all ranks together. Raises SaveFailedError."""
    saver = Saver(checkpoint.parent, keep=2**31)
    saver.begin(checkpoint, model, optimizer, meta)
    saver.wait()


def _part(tensor: Any) -> _Part:
    live = tensor.data
    copy = torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda)
    return _Part(tensor.key, tuple(tensor.global_offset), tuple(tensor.global_shape), live, copy)


def _make_room(hidden: Path, size: float) -> None:
    """Clear the hidden folder and see that the disk can take the checkpoint."""
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    free = shutil.disk_usage(hidden).free
    if free < size + MARGIN:
        raise SaveFailedError(f"{free / 1e9:.2f} GB are free, {size / 1e9:.2f} GB are needed")


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
