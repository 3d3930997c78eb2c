"""The state of delayed FP8 scaling as plain tensors of a checkpoint; the other FP8 recipes keep no state.

Transformer Engine stores it as a pickle in its modules' extra state. No checkpoint of Detour holds a pickle of modules.

Written for Transformer Engine 2.20: a module with FP8 weights has `fp8_meta`, whose entries `scaling_fwd` and
`scaling_bwd` hold `scale` and, under delayed scaling, `amax_history`. `init_fp8_meta_tensors(recipe)` creates them for
`fp8_meta["num_gemms"]` matrix products.
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

from engine.megatron.names import global_name
from engine.megatron.torch_index import read_tensors, tensor_names

PREFIX = "scaling."
"""Start of the state's tensor names in a checkpoint."""
DIRECTIONS = ("scaling_fwd", "scaling_bwd")


def sharded_fp8_state(model: Any) -> dict[str, ShardedTensor]:
    """Return the scales and amax histories of this pipeline stage, by name in a checkpoint.

    One rank of the stage writes them, since Transformer Engine reduces them over its tensor- and data-parallel ranks at
    each step.
    """
    replica_id = (
        0,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return {
        key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica_id) for key, tensor in _tensors_of(model)
    }


def load_fp8_state(checkpoint: Path, model: Any) -> None:
    """Fill the state from a verified checkpoint, before the first step. Does nothing if its run was not in FP8."""
    from megatron.core.fp8_utils import get_fp8_recipe

    if names := [name for name in tensor_names(checkpoint) if name.startswith(PREFIX)]:
        restore_fp8_state(model, get_fp8_recipe(model.config), read_tensors(checkpoint, names))


@torch.no_grad()
def restore_fp8_state(model: Any, recipe: Any, stored: dict[str, Tensor]) -> None:
    """Create the state that the first forward pass would create, and fill it.

    Args:
        model: this rank's pipeline stage.
        recipe: Transformer Engine's recipe of the coming steps.
        stored: a checkpoint's FP8 state by name.
    """
    for name, module in model.named_modules():
        if hasattr(module, "init_fp8_meta_tensors") and f"{_key(model, name)}scaling_fwd.scale" in stored:
            module.fp8_meta["num_gemms"] = 1
            module.init_fp8_meta_tensors(recipe)
    for key, tensor in _tensors_of(model):
        if key in stored:
            tensor.copy_(stored[key])


@contextmanager
@torch.no_grad()
def preserve_fp8_state(model: Any) -> Iterator[None]:
    """Undo what the block does to the state. State that the block creates is reset to its initial values."""
    before = {key: tensor.clone() for key, tensor in _tensors_of(model)}
    yield
    for key, tensor in _tensors_of(model):
        if key in before:
            tensor.copy_(before[key])
        else:
            tensor.fill_(1.0 if key.endswith(".scale") else 0.0)


def _tensors_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        for direction in DIRECTIONS:
            state = getattr(module, "fp8_meta", {}).get(direction)
            if state is not None and hasattr(state, "amax_history"):  # only delayed scaling has a history
                yield f"{_key(model, name)}{direction}.scale", state.scale
                yield f"{_key(model, name)}{direction}.amax_history", state.amax_history


def _key(model: Any, module: str) -> str:
    return f"{PREFIX}{global_name(model, module + '.')}"
