"""The index of torch's distributed checkpoints (`.metadata`, a pickle), written and read without running its code.

Written for torch 2.11 to 2.13. The index is a pickled `torch.distributed.checkpoint.metadata.Metadata` whose
`storage_data` maps a shard to a `_StorageInfo`: file, first byte and number of bytes. torch has no public writer for
shards that are not its own, and its reader unpickles without restriction.
"""

from __future__ import annotations

import enum
import io
import math
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_distributed
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.filesystem import _StorageInfo

from configs.errors import InputError

INDEX_FILE = ".metadata"
INDEX_NAMES = frozenset(
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
"""Module and name of every object that an index of torch's or Megatron's own writer may name, besides the data types.

Whole modules are not allowed: a pickle could reach whatever they import, for instance `filesystem`'s `os.system`.
"""


@dataclass(frozen=True)
class StoredShard:
    """A tile of one of the whole model's tensors, and where it is stored."""

    key: str
    """Name of the whole tensor."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int
    """First byte in the file."""
    length: int
    """Number of bytes."""


def encode_index(shards: Iterable[StoredShard]) -> bytes:
    """Return the content of `.metadata` for the shards of all ranks.

    Raises:
        ValueError: the shards of a tensor do not add up to the whole.
    """
    tensors: dict[str, index.TensorStorageMetadata] = {}
    storage: dict[index.MetadataIndex, _StorageInfo] = {}
    for shard in shards:
        properties = index.TensorProperties(dtype=shard.dtype)
        entry = index.TensorStorageMetadata(properties, torch.Size(shard.global_shape), [])
        offset, shape = torch.Size(shard.offset), torch.Size(shard.shape)
        tensors.setdefault(shard.key, entry).chunks.append(index.ChunkStorageMetadata(offset, shape))
        storage[index.MetadataIndex(shard.key, offset)] = _StorageInfo(shard.file, shard.start, shard.length)
    for name, entry in tensors.items():
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ValueError(f"the shards of {name} that the ranks wrote do not add up to the whole tensor")
    return _pickled(index.Metadata({**tensors}, storage_data=storage))


def verify_index(checkpoint: Path) -> None:
    """Refuse an index that names code, or that says a weight is a pickle. Raises InputError."""
    path = checkpoint / INDEX_FILE
    try:
        with path.open("rb") as file:
            entries = _IndexUnpickler(file).load().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); use an older checkpoint", code="checkpoint-damaged"
        ) from None
    for name, entry in entries.items():
        # Megatron 0.19.2 stores state that is not a tensor under this name. No other entry may be a pickle.
        if type(entry).__name__ != "TensorStorageMetadata" and not name.startswith("common_state/"):
            raise InputError(
                f"the checkpoint's index says {name} is no tensor: it is not trusted", code="checkpoint-not-trusted"
            )


def tensor_names(checkpoint: Path) -> set[str]:
    """Return Megatron's names of all tensors of a verified checkpoint."""
    return set(FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


def read_tensors(checkpoint: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Read whole tensors of a verified checkpoint by Megatron's names, in this process alone.

    Raises:
        InputError: the checkpoint lacks one of them.
    """
    reader = FileSystemReader(checkpoint)
    stored: Any = reader.read_metadata().state_dict_metadata
    absent = [name for name in names if name not in stored]
    if absent:
        raise InputError(
            f"{checkpoint} holds no {', '.join(absent[:3])}; its architecture is not the one it names",
            code="checkpoint-incomplete",
        )
    tensors = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
    with weights_only_loading():
        load_distributed(tensors, storage_reader=reader, no_dist=True)
    return tensors


@contextmanager
def weights_only_loading() -> Iterator[None]:
    """Make every `torch.load` of the process refuse pickled code, also where torch's planner asks for no restriction.

    torch reads TORCH_FORCE_WEIGHTS_ONLY_LOAD at each `torch.load`. The variable is set during the block alone, because
    a program that uses Detour as a library may load pickles of its own.
    """
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # Megatron 0.19.2 wraps its common state in it
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles an index, and refuses every name outside INDEX_NAMES."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in INDEX_NAMES:
            return super().find_class(module, name)
        raise InputError(
            f"the checkpoint's index names {module}.{name}, which no checkpoint needs: it is not trusted",
            code="checkpoint-not-trusted",
        )


class _IndexPickler(pickle.Pickler):
    """Pickles an enumeration's member by its value.

    Python 3.11.0 to 3.11.3 pickles it by `builtins.getattr`, a name that no index may hold.
    """

    def reducer_override(self, value: Any) -> Any:
        return (type(value), (value.value,)) if isinstance(value, enum.Enum) else NotImplemented


def _pickled(metadata: index.Metadata) -> bytes:
    file = io.BytesIO()
    _IndexPickler(file).dump(metadata)
    return file.getvalue()
