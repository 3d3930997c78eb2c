"""The directory of a checkpoint: where it lies, whether it is whole, and its tensors.

A checkpoint is a directory `step-00000500`. It holds Megatron-Core's distributed format and detour.json. That file is a
`CheckpointMeta`: everything that is not a tensor, and the size and sha256 of every other file. A checkpoint is written
under a hidden name and renamed when it is complete. Tensors are stored by their position in the whole model, so any
tensor-, pipeline- and data-parallel layout can load them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from configs.errors import InputError
from configs.files import file_sha256, partial_path
from engine.checkpoint.meta import CheckpointMeta
from engine.modernbert.config import CONFIG_FILE


def step_directory(checkpoints: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` completed steps."""
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the completed steps of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints, newest first."""
    return sorted(checkpoints.glob("step-????????"), reverse=True)


def latest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and one complaint per newer, damaged one."""
    complaints = []
    for path in list_checkpoints(checkpoints):
        try:
            verify(path)
        except InputError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    return None, complaints


def describe(checkpoint: Path) -> CheckpointMeta:
    """Read a checkpoint's detour.json. No tensor is read.

    Raises:
        InputError: The directory is not a checkpoint of this format, or its detour.json is damaged.
    """
    path = checkpoint / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{checkpoint} is not a Detour checkpoint: it has no {CONFIG_FILE}", code="not-a-checkpoint"
        ) from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(f"{path} is damaged ({error})") from None
    return CheckpointMeta.from_json(content, path)


def verify(checkpoint: Path) -> CheckpointMeta:
    """Read detour.json and check every file's size and sha256.

    Raises:
        InputError: A file is damaged or not trusted; the message names it.
    """
    meta = describe(checkpoint)
    for name, (size, sha256) in meta.files.items():
        path = checkpoint / name
        try:
            actual_size = path.stat().st_size if path.is_file() else None
            if actual_size != size:
                present = "nothing" if actual_size is None else f"{actual_size} bytes"
                raise _damaged(f"{path} is damaged: {size} bytes were written, {present} found")
            if file_sha256(path) != sha256:
                raise _damaged(f"{path} is damaged: its sha256 is not the one written")
        except OSError as error:
            raise _damaged(f"{path} cannot be read ({error.strerror})") from None
    _refuse_foreign_pickles(checkpoint)
    return meta


def load(checkpoint: Path, model: Any, optimizer: Any | None) -> None:
    """Fill model and optimizer from a verified checkpoint, whatever layout wrote it.

    Args:
        checkpoint: A verified checkpoint.
        model: This rank's bare model.
        optimizer: The distributed optimizer; None loads the weights alone.

    Raises:
        InputError: The checkpoint does not fit the model.
    """
    from megatron.core import dist_checkpointing

    wanted: dict[str, Any] = {"model": sharded_weights(model)}
    if optimizer is not None:
        wanted["optimizer"] = optimizer.sharded_state_dict(wanted["model"], is_loading=True, metadata=_sharding())
    with _without_pickled_code():
        state = dist_checkpointing.load(wanted, str(checkpoint))
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    if unexpected or any(not key.endswith("_extra_state") for key in missing):
        raise InputError(
            f"{checkpoint} does not fit the model: missing {missing}, unexpected {unexpected}",
            code="checkpoint-does-not-fit",
        )
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


def read_tensors(checkpoint: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Read whole tensors of a checkpoint by Megatron name, in this process alone.

    Raises:
        InputError: The checkpoint holds no tensor of one of these names.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint import load as read
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    stored = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    absent = [name for name in names if name not in stored]
    if absent:
        raise InputError(
            f"{checkpoint} holds no {', '.join(absent[:3])}; its architecture is not the one it names",
            code="checkpoint-does-not-fit",
        )
    tensors = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
    with _without_pickled_code():
        read(tensors, storage_reader=reader, no_dist=True)
    return tensors


def prune(checkpoints: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete expired checkpoints and what interrupted saves left behind.

    Args:
        checkpoints: Folder of the checkpoints.
        keep: Number of newest checkpoints that stay.
        keep_every: Checkpoints at a multiple of this many steps stay as well.
    """
    for path in expired(list_checkpoints(checkpoints), keep, keep_every):
        hidden = partial_path(path)
        path.rename(hidden)  # because a half-deleted checkpoint must not look like a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)
    clear_partial(checkpoints)


def expired(newest_first: Sequence[Path], keep: int, keep_every: int | None) -> list[Path]:
    """Return the checkpoints beyond the newest `keep`, except those at a multiple of `keep_every` steps."""
    return [path for path in newest_first[keep:] if not keep_every or step_of(path) % keep_every]


def clear_partial(checkpoints: Path) -> None:
    """Delete what interrupted saves left behind."""
    for path in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(checkpoint: Path) -> None:
    """Hide a damaged checkpoint, so that its step can be saved again and retention does not count it."""
    aside = checkpoint.with_name(f".{checkpoint.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def sharded_weights(model: Any) -> dict[str, Any]:
    """Return this rank's parameters with their positions in the whole model."""
    sharded = model.sharded_state_dict(metadata=_sharding())
    return {name: entry for name, entry in sharded.items() if not name.endswith("_extra_state")}


def _sharding() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _damaged(message: str) -> InputError:
    return InputError(f"{message}; use an older checkpoint", code="checkpoint-damaged")


class _IndexUnpickler(pickle.Unpickler):
    """Torch stores a checkpoint's index as a pickle. It names these classes and no others.

    Each is listed by its whole name: an allowed module would lend everything it imports, since a pickle may ask for
    `filesystem`'s `os.system`.
    """

    _names = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            *(
                ("torch.distributed.checkpoint.planner", name)
                for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._names:
            return super().find_class(module, name)
        raise InputError(f"the checkpoint's index names {module}.{name}, which no checkpoint needs: it is not trusted")


@contextmanager
def _without_pickled_code() -> Iterator[None]:
    """Torch's planner unpickles what the index says is not a tensor, and asks for no restriction: this does."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # what Megatron 0.19 wraps its common state in
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _refuse_foreign_pickles(checkpoint: Path) -> None:
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            entries = _IndexUnpickler(file).load().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); use an older checkpoint") from None
    for name, entry in entries.items():
        # From 0.19 on Megatron keeps what is no tensor under this name; anything else pickled has no business here.
        if type(entry).__name__ != "TensorStorageMetadata" and not name.startswith("common_state/"):
            raise InputError(f"the checkpoint's index says {name} is no tensor: it is not trusted")
