"""One rank of a world that does not exist, by torch's fake process group: collectives return at once and move nothing.

Written for torch 2.11 and 2.13: importing `fake_pg` registers the backend `fake`, and Megatron makes every group by
`torch.distributed.new_group`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
