"""CUDA graphs without a GPU: a graph records torch's operations, and a replay runs them again on the same memory.

As on a GPU, what Python decided while the graph was recorded stays decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, ...]] = []

    def pool(self) -> None: ...

    def replay(self) -> None:
        with torch.no_grad():
            for operation, args, kwargs, recorded in self.operations:
                for old, new in zip(recorded, tree_leaves(operation(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextmanager
def record(graph: RecordedGraph, pool: None = None, capture_error_mode: str = "global") -> Iterator[None]:
    """Stands in for torch.cuda.graph. As there, memory from before stays as it is while the graph is recorded."""
    with _Recorder(graph):
        yield


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.own: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = operation._schema.arguments
        given = dict(zip((declared.name for declared in schema), args, strict=False)) | kwargs
        targets = [declared.name for declared in schema if declared.alias_info and declared.alias_info.is_write]
        written = [given[name] for name in targets if name in given]
        if any(tensor.untyped_storage().data_ptr() not in self.own for tensor in written):
            result = written[0]
        else:
            result = operation(*args, **kwargs)
            self.own |= {x.untyped_storage().data_ptr() for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        self.graph.operations.append((operation, args, kwargs, tree_leaves(result)))
        return result
