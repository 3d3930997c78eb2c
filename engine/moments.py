"""What a rank writes of a checkpoint: its own part of the weights, the fp32 main weights and Adam's moments.

The format is Megatron's `fully_reshardable`: tensors of the whole model's shapes. Its own way there gathers the state
of all data-parallel ranks on every one of them at each save, and has rank 0 write the weights, which first have to be
gathered too: both cost more than writing. A rank keeps a range of a parameter's flattened elements: at most three boxes
of a matrix. torch's checkpoints take boxes as they come, and whoever loads asks for whole tensors.
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


def own_parts(weights: dict[str, Any], optimizer: Any | None) -> list[ShardedTensor]:
    """Every tensor that this rank alone writes: views of what training changes in place, not copies.

    weights: the model's sharded state, whose entries hold the parameters themselves.
    """
    parts = list(_kept(weights, optimizer)) if optimizer is not None else []
    trained = _trained(optimizer) if optimizer is not None else set()
    rest = [whole for whole in weights.values() if id(whole.data) not in trained]
    parts += [part for whole in rest for part in _tensors_of(replace(whole, data=whole.data.detach()))]
    return [part for part in parts if is_main_replica(part.replica_id)]


def common_state(optimizer: Any) -> dict[str, Any]:
    """What of the optimizer is no tensor: step count, learning rate. The same on every rank."""
    (part,) = optimizer.chained_optimizers
    return {**part.state_dict(), "param_state_sharding_type": "fully_reshardable"}


def _trained(optimizer: Any) -> set[int]:
    """The parameters that the optimizer keeps in ranges, on this rank or another."""
    (part,) = optimizer.chained_optimizers
    return {id(parameter) for buffer in part.buffers for parameter in buffer.params}


def _kept(weights: dict[str, Any], optimizer: Any) -> Iterator[ShardedTensor]:
    (part,) = optimizer.chained_optimizers
    places = {id(whole.data): whole for whole in weights.values()}
    for buckets in (maps for buffer in part.gbuf_ranges for maps in buffer.values()):
        for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
            start, stop = ranges["param"].start, ranges["param"].end
            # After the optimizer's step only this range of the weights is new here, until the ranks exchange theirs.
            kept = {"": parameter.view(-1)[start:stop]}
            states = part._get_main_param_and_optimizer_states(parameter)
            kept |= {f"optimizer.state.{name}.": state for name, state in states.items()}
            for prefix, tensor in kept.items():
                yield from _boxes_of(places[id(parameter)], prefix, tensor.detach(), start, stop)


def _boxes_of(whole: Any, prefix: str, kept: torch.Tensor, start: int, stop: int) -> Iterator[ShardedTensor]:
    """Elements start..stop-1 of a parameter, `kept`, as boxes of the whole model's tensors."""
    blank = torch.empty_like(whole.data, device="meta")
    for part in _tensors_of(replace(whole, key=prefix + whole.key, data=blank)):
        begin = part.data.storage_offset()
        low, high = max(start, begin), min(stop, begin + part.data.numel())
        for offset, shape in boxes(part.local_shape, low - begin, high - begin):
            size = math.prod(shape)
            yield ShardedTensor(
                key=part.key,
                data=kept[low - start : low - start + size].view(shape),
                dtype=kept.dtype,
                local_shape=shape,
                global_shape=part.global_shape,
                global_offset=tuple(a + b for a, b in zip(part.global_offset, offset, strict=True)),
                axis_fragmentations=None,  # no regular grid
                replica_id=(*part.replica_id[:-1], 0),  # the last counts data-parallel ranks, each of which has its own
            )
            low += size


def _tensors_of(whole: Any) -> Any:
    """A gated MLP's parameter is a factory of two tensors, each a slice of it; views tell which."""
    return nested_values(whole.build()) if isinstance(whole, ShardedTensorFactory) else [whole]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and shapes of the boxes that tile elements start..stop-1 of a tensor, in row-major order."""
    if len(shape) == 1:
        if start < stop:
            yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    while start < stop:
        number, within = divmod(start, row)
        if within == 0 and stop - start >= row:
            count = (stop - start) // row
            yield (number, *(0 for _ in shape[1:])), (count, *shape[1:])
            start += count * row
        else:
            end = min(row, within + stop - start)
            for offset, size in boxes(shape[1:], within, end):
                yield (number, *offset), (1, *size)
            start += end - within
