"""The shards that one rank writes to a checkpoint: of weights, fp32 main weights and Adam's moments.

The format is Megatron's `fully_reshardable`: tensors with the shapes of the whole model. Megatron's own way there
gathers the state of all data-parallel ranks on each of them at each save, and rank 0 writes weights that have to be
gathered first. Both cost more than writing.

A rank owns a range of a parameter's flattened elements. Such a range is at most three rectangular tiles of a matrix.
torch's checkpoint format accepts tiles of any size, and a reader asks for whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica


def local_shards(weights: dict[str, Any], optimizer: Any | None) -> list[ShardedTensor]:
    """Return every tensor that only this rank writes, as views of the live tensors that training changes in place.

    Written for Megatron 0.16.1 and 0.19.2: the data of a model's sharded state are its parameters themselves,
    `is_main_replica(replica_id)` chooses the rank that writes, and `ShardedTensorFactory.build()` gives the tensors of
    a parameter that holds two.

    Args:
        weights: the model's sharded state dict, flat.
        optimizer: Megatron's chained optimizer, or None for the weights alone.
    """
    if optimizer is None:
        shards, ranged = [], set()
    else:
        shards, ranged = list(_ranges(weights, optimizer)), _ranged_parameters(optimizer)
    for entry in weights.values():
        if id(entry.data) not in ranged:
            shards += _tensors_of(replace(entry, data=entry.data.detach()))
    return [shard for shard in shards if is_main_replica(shard.replica_id)]


def common_state(optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state that is not a tensor: step count and learning rate, equal on every rank.

    Written for Megatron 0.16.1 and 0.19.2: `state_dict()` leaves the tensors out, and a reader takes
    `param_state_sharding_type` for the format of the tensors.
    """
    (member,) = optimizer.chained_optimizers
    return {**member.state_dict(), "param_state_sharding_type": "fully_reshardable"}


def _ranged_parameters(optimizer: Any) -> set[int]:
    """Return the ids of the parameters that the optimizer splits into ranges, on this or another rank.

    Written for Megatron 0.16.1 and 0.19.2: the parameters of a gradient buffer are in `params`.
    """
    (member,) = optimizer.chained_optimizers
    return {id(parameter) for buffer in member.buffers for parameter in buffer.params}


def _ranges(weights: dict[str, Any], optimizer: Any) -> Iterator[ShardedTensor]:
    """Yield this rank's ranges of weights, main weights and moments.

    Written for Megatron 0.16.1 and 0.19.2: `gbuf_ranges` has, per buffer and data type, a list of buckets, whose
    `param_map` gives a parameter's range `param` on this rank; `_get_main_param_and_optimizer_states` gives the tensors
    of the range, named as in the format.
    """
    (member,) = optimizer.chained_optimizers
    entries = {id(entry.data): entry for entry in weights.values()}
    buckets = (bucket for buffer in member.gbuf_ranges for buckets in buffer.values() for bucket in buckets)
    for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
        start, stop = ranges["param"].start, ranges["param"].end
        # Only this range of the weights is up to date here between the optimizer's step and the next forward pass.
        tensors = {"": parameter.view(-1)[start:stop]}
        states = member._get_main_param_and_optimizer_states(parameter)
        tensors |= {f"optimizer.state.{name}.": state for name, state in states.items()}
        for prefix, tensor in tensors.items():
            yield from _tiles_of(entries[id(parameter)], prefix, tensor.detach(), start, stop)


def _tiles_of(entry: Any, prefix: str, values: torch.Tensor, start: int, stop: int) -> Iterator[ShardedTensor]:
    """Yield elements start..stop-1 of a parameter, `values`, as tiles of the whole model's tensors."""
    blank = torch.empty_like(entry.data, device="meta")
    for tensor in _tensors_of(replace(entry, key=prefix + entry.key, data=blank)):
        first = tensor.data.storage_offset()  # tensors of one parameter are views of `blank`
        low, high = max(start, first), min(stop, first + tensor.data.numel())
        for offset, shape in tile_range(tensor.local_shape, low - first, high - first):
            size = math.prod(shape)
            yield ShardedTensor(
                key=tensor.key,
                data=values[low - start : low - start + size].view(shape),
                dtype=values.dtype,
                local_shape=shape,
                global_shape=tensor.global_shape,
                global_offset=tuple(a + b for a, b in zip(tensor.global_offset, offset, strict=True)),
                axis_fragmentations=None,  # not a regular grid
                replica_id=(*tensor.replica_id[:-1], 0),  # the last number counts data-parallel ranks: ranges differ
            )
            low += size


def _tensors_of(entry: Any) -> list[ShardedTensor]:
    """Return the tensors of a sharded parameter: two slices for a gated MLP, else the parameter itself."""
    return list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]


def tile_range(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and shape of the tiles that cover elements start..stop-1 of a tensor, in row-major order."""
    if len(shape) == 1:
        if start < stop:
            yield (start,), (stop - start,)
        return
    row_size = math.prod(shape[1:])
    while start < stop:
        row, column = divmod(start, row_size)
        if column == 0 and stop - start >= row_size:
            count = (stop - start) // row_size
            yield (row, *(0 for _ in shape[1:])), (count, *shape[1:])
            start += count * row_size
        else:
            end = min(row_size, column + stop - start)
            for offset, size in tile_range(shape[1:], column, end):
                yield (row, *offset), (1, *size)
            start += end - column
