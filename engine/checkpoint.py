"""Checkpoints: Megatron-Core's distributed format plus one JSON file, visible only when complete.

A checkpoint is a directory `step-00000500` with Megatron's files and `detour.json`, which holds what is not a tensor
(step, configuration, architecture, positions in the data) and the size and sha256 of every other file. It is written
under a hidden name and renamed when whole. Tensors are stored by their place in the whole model, so any tensor-,
pipeline- and data-parallel layout can load them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import InputError
from engine.modernbert.config import CONFIG_FILE

FORMAT = 1


def step_directory(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted(checkpoints.glob("step-????????"), reverse=True)


def latest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with each newer one."""
    damaged = []
    for path in list_checkpoints(checkpoints):
        try:
            verify(path)
        except InputError as error:
            damaged.append(str(error))
        else:
            return path, damaged
    return None, damaged


def describe(checkpoint: Path) -> dict[str, Any]:
    """The contents of a checkpoint's detour.json. InputError where it is no checkpoint of this format."""
    try:
        meta: dict[str, Any] = json.loads((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{checkpoint} is not a Detour checkpoint: it has no {CONFIG_FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{checkpoint / CONFIG_FILE} is damaged ({error}); use an older checkpoint") from None
    if meta.get("format") != FORMAT:
        raise InputError(f"{checkpoint} has checkpoint format {meta.get('format')}; this version reads {FORMAT}")
    return meta


def verify(checkpoint: Path) -> dict[str, Any]:
    """`describe`, after checking every file's size and sha256. InputError names the damaged file."""
    meta = describe(checkpoint)
    for name, (size, digest) in meta["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise InputError(f"{path} is damaged: {size} bytes were written, {found} found; use an older checkpoint")
        if _sha256(path) != digest:
            raise InputError(f"{path} is damaged: its sha256 is not the one written; use an older checkpoint")
    _refuse_foreign_pickles(checkpoint)
    return meta


def save(checkpoint: Path, model: Any, optimizer: Any | None, meta: dict[str, Any]) -> None:
    """Write a checkpoint from all ranks together. `meta` (rank 0's counts) is the JSON kept beside the tensors."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Megatron collects its writers' results in a queue made by a spawned process, which imports torch and Megatron
    # again: seconds for a save of milliseconds. The results are collected in this process, so a local queue will do.
    filesystem_async._results_queue = queue.Queue()
    hidden = checkpoint.parent / f".{checkpoint.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded_state(model, optimizer, loading=False), str(hidden))
    mine = {path.name: (path.stat().st_size, _sha256(path)) for path in _written_here(hidden)}
    gathered: list[dict[str, tuple[int, str]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if dist.get_rank() == 0:
        files = {name: entry for part in gathered for name, entry in sorted(part.items())}
        record = {"format": FORMAT, **meta, "optimizer": optimizer is not None, "files": files}
        with (hidden / CONFIG_FILE).open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(checkpoint, ignore_errors=True)  # only a damaged one can stand there
        hidden.rename(checkpoint)
    dist.barrier()


def load(checkpoint: Path, model: Any, optimizer: Any | None) -> None:
    """Fill model and optimizer from a verified checkpoint, whatever layout wrote it; weights only without optimizer."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(_sharded_state(model, optimizer, loading=True), str(checkpoint))
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    if unexpected or any(not key.endswith("_extra_state") for key in missing):
        raise InputError(f"{checkpoint} does not fit the model: missing {missing}, unexpected {unexpected}")
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


def read_tensors(checkpoint: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint by Megatron name, in this one process."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint import load as read

    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    absent = [name for name in names if name not in stored]
    if absent:
        raise InputError(f"{checkpoint} holds no {', '.join(absent[:3])}; its architecture is not the one it names")
    tensors = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
    read(tensors, storage_reader=reader, no_dist=True)
    return tensors


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what interrupted saves left behind."""
    for path in list_checkpoints(checkpoints)[keep:]:
        doomed = path.with_name(f".{path.name}.partial")
        path.rename(doomed)  # a half-deleted checkpoint must not look like one
        shutil.rmtree(doomed, ignore_errors=True)
    for path in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _sharded_state(model: Any, optimizer: Any | None, *, loading: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    sharded = model.sharded_state_dict(metadata=metadata)
    state: dict[str, Any] = {"model": {k: v for k, v in sharded.items() if not k.endswith("_extra_state")}}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=metadata)
    return state


def _written_here(folder: Path) -> Iterator[Path]:
    """The files this rank wrote: its own tensor files, and on rank 0 the common ones."""
    rank = dist.get_rank()
    for path in folder.iterdir():
        owner = path.name.removeprefix("__").partition("_")[0] if path.name.startswith("__") else "0"
        if int(owner) == rank:
            yield path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _MetadataUnpickler(pickle.Unpickler):
    """Torch stores a checkpoint's index as a pickle. It needs these modules and nothing that runs code."""

    _modules = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
    _names = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("collections", "defaultdict"),
            ("builtins", "dict"),
            ("builtins", "list"),
            ("builtins", "set"),
            ("pathlib", "PosixPath"),
            ("pathlib", "Path"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._names or module.startswith(self._modules):
            return super().find_class(module, name)
        raise InputError(f"the checkpoint's index names {module}.{name}, which no checkpoint needs: it is not trusted")


def _refuse_foreign_pickles(checkpoint: Path) -> None:
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise InputError(f"{path} cannot be read ({error}); use an older checkpoint") from None
