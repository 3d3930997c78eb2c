"""The history of delayed FP8 scaling in a checkpoint, as plain tensors; the other recipes have none.

Transformer Engine keeps it in its modules' extra state, a pickle, which no checkpoint of ours may hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from engine.checkpoint import read_tensors
from engine.modernbert.convert import global_name

PREFIX = "scaling."


def sharded_scaling(model: Any) -> dict[str, ShardedTensor]:
    """Scales and histories of this pipeline stage. They are the same on all its tensor- and data-parallel ranks, over
    which Transformer Engine reduces them every step.
    """
    replica = (
        0,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return {key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica) for key, tensor in _scaling_of(model)}


def load_scaling(checkpoint: Path, model: Any) -> None:
    """Take up what a verified checkpoint holds, before the first step; nothing where its run was not in FP8."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    if names := [name for name in stored if name.startswith(PREFIX)]:
        restore_scaling(model, get_fp8_recipe(model.config), read_tensors(checkpoint, names))


@torch.no_grad()
def restore_scaling(model: Any, recipe: Any, stored: dict[str, Tensor]) -> None:
    """`stored`: a checkpoint's scaling tensors by name; recipe: Transformer Engine's, of the coming steps."""
    for name, module in model.named_modules():
        if hasattr(module, "init_fp8_meta_tensors") and f"{_key(model, name)}scaling_fwd.scale" in stored:
            module.fp8_meta["num_gemms"] = 1  # what a first forward would set
            module.init_fp8_meta_tensors(recipe)
    for key, tensor in _scaling_of(model):
        if key in stored:
            tensor.copy_(stored[key])


@contextmanager
@torch.no_grad()
def kept_scaling(model: Any) -> Iterator[None]:
    """What is computed meanwhile leaves no trace in the history, which may not exist before."""
    before = {key: tensor.clone() for key, tensor in _scaling_of(model)}
    yield
    for key, tensor in _scaling_of(model):
        if key in before:
            tensor.copy_(before[key])
        else:
            tensor.fill_(1.0 if key.endswith(".scale") else 0.0)


def _scaling_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        for direction in ("scaling_fwd", "scaling_bwd"):
            state = getattr(module, "fp8_meta", {}).get(direction)
            if state is not None and hasattr(state, "amax_history"):  # only delayed scaling has one
                yield f"{_key(model, name)}{direction}.scale", state.scale
                yield f"{_key(model, name)}{direction}.amax_history", state.amax_history


def _key(model: Any, module: str) -> str:
    return f"{PREFIX}{global_name(model, module + '.')}"
