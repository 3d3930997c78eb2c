"""The optimizer's state as a checkpoint stores it: every data-parallel rank writes the part it keeps.

The format is Megatron's `fully_reshardable`: tensors of the whole model's shapes. Its own way there gathers the state
of all data-parallel ranks on every one of them at each save, which costs more than writing it. A rank keeps a range of
a parameter's flattened elements: at most three boxes of a matrix. torch's checkpoints take boxes as they come, and
whoever loads asks for whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory


def sharded_optimizer(optimizer: Any, model_state: dict[str, Any]) -> dict[str, Any]:
    """What `optimizer.sharded_state_dict` gives for a save, by this rank alone; views, not copies.

    model_state: the model's, whose entries hold the parameters themselves.
    """
    (part,) = optimizer.chained_optimizers
    places = {id(whole.data): whole for whole in model_state.values()}
    boxes: dict[str, list[ShardedTensor]] = {}
    for buckets in (maps for buffer in part.gbuf_ranges for maps in buffer.values()):
        for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
            start, stop = ranges["param"].start, ranges["param"].end
            for name, kept in part._get_main_param_and_optimizer_states(parameter).items():
                for box in _boxes_of(places[id(parameter)], f"optimizer.state.{name}.", kept.detach(), start, stop):
                    boxes.setdefault(box.key, []).append(box)
    return {**part.state_dict(), "param_state": boxes, "param_state_sharding_type": "fully_reshardable"}


def _boxes_of(whole: Any, prefix: str, kept: torch.Tensor, start: int, stop: int) -> Iterator[ShardedTensor]:
    """Elements start..stop-1 of a parameter, `kept`, as boxes of the whole model's tensors."""
    blank = torch.empty(whole.data.shape, device="meta")
    stored = replace(whole, key=prefix + whole.key, data=blank)
    # A gated MLP's parameter is a factory of two tensors, each a slice of it; views tell which.
    parts = nested_values(stored.build()) if isinstance(stored, ShardedTensorFactory) else [stored]
    for part in parts:
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
