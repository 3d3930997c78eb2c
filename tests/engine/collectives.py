"""Counts the collectives of code that runs under torch's fake process group."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = {
    "allreduce_": "all-reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "send": "send",
}
Counted = tuple[str, str, int, int, int]
"""Kind of parallelism, operation, elements of the whole tensor, bytes of an element, ranks."""


class CollectiveCounter(TorchDispatchMode):
    """Counts calls by `Counted`, of tensors with at least `smallest` elements in groups of more than one rank."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.calls: Counter[Counted] = Counter()
        self._smallest = smallest
        self._kinds = {
            group.group_name: kind
            for kind, group in (
                ("embedding", parallel_state.get_embedding_group(check_initialized=False)),
                ("pipeline", parallel_state.get_pipeline_model_parallel_group()),
                ("tensor", parallel_state.get_tensor_model_parallel_group()),
                ("data", parallel_state.get_data_parallel_group()),
                ("data", parallel_state.get_data_parallel_group(with_context_parallel=True)),
            )
            if isinstance(group, dist.ProcessGroup)
        }

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        operation = OPERATIONS.get(name.removeprefix("c10d::").partition(".")[0]) if name.startswith("c10d::") else None
        if operation:
            tensors = [tensor for arg in args for tensor in _tensors(arg)]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            largest = max(tensors, key=lambda tensor: tensor.numel())
            if largest.numel() >= self._smallest and group.size() > 1:
                kind = self._kinds.get(group.group_name, "other")
                self.calls[kind, operation, largest.numel(), largest.element_size(), group.size()] += 1
        return function(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []
