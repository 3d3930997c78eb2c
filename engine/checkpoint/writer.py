"""Writes checkpoints behind the training steps.

`begin` copies the tensors; the rest happens in one thread per rank. The threads meet in a process group of their own:
rank 0's thread makes room, every thread writes its rank's part, and rank 0's thread makes the checkpoint visible. At
the end each rank knows of every rank's failure. The all-reduce of each training step tells whether all threads have
ended, so training pays for no synchronisation of its own.
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

from configs.files import file_sha256, partial_path, sync_directory
from engine.checkpoint.format import sharded_weights
from engine.checkpoint_meta import CheckpointMeta
from engine.megatron.fp8_state import sharded_fp8_state
from engine.megatron.optimizer_shards import common_state, local_shards
from engine.megatron.torch_index import INDEX_FILE, StoredShard, encode_index
from engine.modernbert.config import CONFIG_FILE

FREE_BYTES = 64 * 2**20
"""Bytes that stay free on the disk after a save."""
LONGEST_SAVE = timedelta(days=1)
"""Time that the threads wait for the slowest one. The next save notices a rank that does not write at all."""

logger = logging.getLogger(__name__)


class SaveFailedError(Exception):
    """A checkpoint could not be written, on this or another rank; older checkpoints are untouched."""


@dataclass(frozen=True)
class _Part:
    """A box of one of the whole model's tensors, which this rank writes."""

    key: str
    offset: tuple[int, ...]
    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    live: torch.Tensor
    """The tensor that training changes in place."""
    copy: torch.Tensor
    """`live` when the save began. Every save uses the same memory, pinned where a GPU copies to it."""


@dataclass(frozen=True)
class _Written:
    """One rank's contribution to a checkpoint."""

    parts: list[StoredShard]
    files: dict[str, tuple[int, str]]
    data: dict[str, Any]


class Writer:
    """Writes one checkpoint at a time; all ranks call its methods together.

    Args:
        on_published: Called on rank 0 in its thread, once a checkpoint is on the disk.
    """

    def __init__(self, on_published: Callable[[], None] = lambda: None) -> None:
        self._on_published = on_published
        self._group = dist.new_group(backend="gloo", timeout=LONGEST_SAVE)
        self._parts: list[_Part] | None = None
        self._target: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        """The exception that ended this rank's thread before the ranks could agree."""
        self._problem: str | None = None
        """The reason why the checkpoint could not be saved, as all ranks know it."""
        self._started = self._ended = 0.0
        self.stall = 0.0
        """Seconds that training stood still for the current or last save."""

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
        meta: CheckpointMeta | None,
        data: dict[str, Any] | None = None,
        started: float | None = None,
    ) -> None:
        """Copy everything and start writing.

        Args:
            checkpoint: Directory to write.
            model: This rank's bare model.
            optimizer: The distributed optimizer; None saves the weights alone.
            meta: On rank 0, the record beside the tensors, without files and data. Other ranks' records are ignored.
            data: Positions of the data streams that this rank serves. The record gets those of all ranks.
            started: Time by `time.perf_counter` at which training was interrupted for the save; default now.
        """
        self._started = time.perf_counter() if started is None else started
        if self._parts is None:  # only once, because parameters and moments stay where they are in memory
            tensors = {**sharded_weights(model), **sharded_fp8_state(model)}
            self._parts = [_part(tensor) for tensor in local_shards(tensors, optimizer)]
        for part in self._parts:
            part.copy.copy_(part.live, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        common = io.BytesIO()
        if dist.get_rank() == 0:
            torch.save({"optimizer": common_state(optimizer)} if optimizer is not None else {}, common)
        self._target, self._error, self._problem = checkpoint, None, None
        self._thread = threading.Thread(
            target=self._save, args=(checkpoint, meta, common.getvalue(), data or {}), name="detour-checkpoint"
        )
        self._thread.start()
        self.stall = time.perf_counter() - self._started

    def wait(self) -> tuple[Path, float]:
        """Wait for the threads of all ranks, then `complete`."""
        assert self._thread is not None
        started = time.perf_counter()
        self._thread.join()
        self.stall += time.perf_counter() - started
        return self.complete()

    def complete(self) -> tuple[Path, float]:
        """Return the checkpoint that was begun, visible by now, and the seconds it took.

        Called when no rank is writing any more.

        Raises:
            SaveFailedError: The checkpoint could not be written; raised on every rank.
        """
        assert self._target is not None and self._thread is not None
        self._thread.join()
        target, self._target = self._target, None
        if self._error:
            raise self._error
        if self._problem:
            raise SaveFailedError(f"{target} was not saved: {self._problem}")
        return target, self._ended - self._started

    def write_part(self, hidden: Path) -> tuple[list[StoredShard], dict[str, tuple[int, str]]]:
        """Write this rank's file in the format of torch's own writer; runs in the thread.

        Returns:
            The positions of the tensors, and the size and sha256 of each file.
        """
        if not self._parts:
            return [], {}
        path = hidden / f"__{dist.get_rank()}_0.distcp"
        stored = []
        with path.open("wb") as file:
            for part in self._parts:
                start = file.tell()
                torch.save(part.copy, file)
                position = (path.name, start, file.tell() - start)
                shape = tuple(part.copy.shape)
                stored.append(StoredShard(part.key, part.offset, shape, part.whole, part.copy.dtype, *position))
            file.flush()
            os.fsync(file.fileno())
        return stored, {path.name: _size_and_sha256(path)}

    def write_file(self, path: Path, content: bytes) -> None:
        """Write one of the small files that rank 0 adds, and force it onto the disk; runs in the thread."""
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _save(self, target: Path, meta: CheckpointMeta | None, common: bytes, data: dict[str, Any]) -> None:
        try:
            self._problem = self._try_to_save(target, meta, common, data)
        except Exception as error:  # another rank has died, or there is a bug here
            self._error = error
        self._ended = time.perf_counter()

    def _try_to_save(
        self, target: Path, meta: CheckpointMeta | None, common: bytes, data: dict[str, Any]
    ) -> str | None:
        hidden = partial_path(target)
        assert self._parts is not None
        size = torch.tensor([float(sum(part.copy.nbytes for part in self._parts))], dtype=torch.float64)
        dist.all_reduce(size, group=self._group)
        if problem := self._on_rank_0(hidden, lambda: _make_room(hidden, size.item())):
            return problem
        written: _Written | str
        try:
            written = _Written(*self.write_part(hidden), data)
        except Exception as error:
            written = f"rank {dist.get_rank()}: {error}"
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(written, gathered if dist.get_rank() == 0 else None, group=self._group)
        return self._on_rank_0(hidden, lambda: self._publish(hidden, target, meta, common, gathered))

    def _on_rank_0(self, hidden: Path, work: Callable[[], None]) -> str | None:
        """Run `work` on rank 0 alone; return its failure on every rank."""
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

    def _publish(
        self, hidden: Path, target: Path, meta: CheckpointMeta | None, common: bytes, gathered: list[_Written | str]
    ) -> None:
        """Add the files that exist once, check that every file is present, and make the checkpoint visible."""
        assert meta is not None
        failures = [written for written in gathered if isinstance(written, str)]
        if failures:
            raise SaveFailedError("; ".join(failures))
        ranks = [written for written in gathered if isinstance(written, _Written)]
        shared = {
            INDEX_FILE: encode_index(part for rank in ranks for part in rank.parts),
            "metadata.json": json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode(),
            "common.pt": common,
        }
        for name, content in shared.items():
            self.write_file(hidden / name, content)
        files = {name: entry for rank in ranks for name, entry in rank.files.items()}
        for name, (size, _) in files.items():
            _require_size(hidden / name, size)
        files |= {name: _size_and_sha256(hidden / name) for name in shared}
        data = {stream: state for rank in ranks for stream, state in rank.data.items()}
        meta = meta.model_copy(update={"files": dict(sorted(files.items())), "data": data or meta.data})
        self.write_file(hidden / CONFIG_FILE, json.dumps(meta.to_json(), indent=1).encode())
        sync_directory(hidden)
        hidden.rename(target)
        sync_directory(target.parent)  # before older checkpoints are deleted
        try:
            self._on_published()
        except OSError as error:
            logger.warning("old checkpoints beside %s were not deleted: %s", target, error)


def _require_size(path: Path, size: int) -> None:
    if not path.is_file() or path.stat().st_size != size:
        raise SaveFailedError(
            f"{path} is not what its rank has written; the run directory must lie on storage that all nodes share"
        )


def save_now(checkpoint: Path, model: Any, optimizer: Any | None, meta: CheckpointMeta) -> None:
    """Write one checkpoint and wait for it; all ranks together.

    Raises:
        SaveFailedError: The checkpoint could not be written.
    """
    writer = Writer()
    writer.begin(checkpoint, model, optimizer, meta)
    writer.wait()


def _part(tensor: Any) -> _Part:
    live = tensor.data
    copy = torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda)
    return _Part(tensor.key, tuple(tensor.global_offset), tuple(tensor.global_shape), live, copy)


def _make_room(hidden: Path, size: float) -> None:
    """Clear the hidden folder and check that the disk has room for the checkpoint."""
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    free = shutil.disk_usage(hidden).free
    if free < size + FREE_BYTES:
        raise SaveFailedError(f"{free / 1e9:.2f} GB are free, {size / 1e9:.2f} GB are needed")


def _size_and_sha256(path: Path) -> tuple[int, str]:
    return path.stat().st_size, file_sha256(path)
