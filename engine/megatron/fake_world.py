"""One rank of a world that does not exist, by torch's fake process group: collectives return at once and move nothing.

Written for torch 2.11 and 2.13: importing `fake_pg` registers the backend `fake`; under `FakeTensorMode` tensors have
shapes and no memory. Written for Megatron 0.16.1 and 0.19.2: every group is made by `torch.distributed.new_group`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


@contextmanager
def fake_world(size: int, rank: int) -> Iterator[None]:
    """Be a rank of a world of `size`. Megatron's groups of the world are destroyed at the end.

    Megatron's gloo groups are fake too, because no other rank would answer them.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake"})

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    dist.new_group = fake_group
    try:
        yield
    finally:
        dist.new_group = new_group
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def without_memory() -> AbstractContextManager[object]:
    """Return a context in which new tensors have shapes and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode: AbstractContextManager[object] = FakeTensorMode()
    return mode
