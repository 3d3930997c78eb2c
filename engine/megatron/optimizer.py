"""Megatron's distributed AdamW with the paper's weight decay; frozen and new weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from configs.schema import Optimizer
from engine.device import device
from engine.megatron import adam
from engine.megatron.names import global_name


def build_optimizer(ddp_models: list[Any], settings: Optimizer, dtype: torch.dtype) -> Any:
    """Build distributed AdamW over DDP models, with fp32 main weights where the models compute in bf16.

    Written for Megatron 0.16.1 and 0.19.2: a chained optimizer has its members in `chained_optimizers`, and a member
    creates its moments by `init_state_fn`.
    """
    adam.install()
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        weight_decay=0.0,  # `set_learning_rate` sets it at each step
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
    )
    optimizer = get_megatron_optimizer(config, ddp_models)
    for member in members(optimizer):
        # Megatron creates moments at the first gradient: a parameter frozen from the start would have none to save.
        member.init_state_fn(member.optimizer, member.config)
    return optimizer


def set_learning_rate(optimizer: Any, learning_rate: float, peak: float, settings: Optimizer) -> None:
    """Set the learning rate and the weight decay of the coming step.

    AdamW shrinks a weight by lr * weight_decay per step. The paper's fully decoupled decay shrinks it by
    weight_decay * lr / peak lr, which is AdamW's with weight_decay / peak lr.

    Args:
        optimizer: The distributed optimizer.
        learning_rate: Learning rate of the step.
        peak: Peak learning rate of the phase.
        settings: The configuration's optimizer section.
    """
    decay = settings.weight_decay / peak if settings.decoupled else settings.weight_decay
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = decay * group["wd_mult"]  # Megatron's multiplier is 0 on biases and norms


def prepare_gradients(optimizer: Any, losses: torch.Tensor | None = None) -> None:
    """Make the gradients of this rank's ranges of the parameters, divided by the label positions, ready for `update`.

    Args:
        optimizer: Result of `build_optimizer`.
        losses: fp32, this rank's losses of the step, or None. A loss that is not finite makes a gradient NaN, since the
            gradients of such a loss may be finite.
    """
    optimizer.prepare_grads()
    if losses is not None and len(losses):
        zero_or_nan = losses.sum() * 0.0  # stays on the device, because the host would wait for the losses
        for member in members(optimizer):
            for parameter in member.get_parameters()[:1]:
                parameter.grad.view(-1)[:1].add_(zero_or_nan)


def update(optimizer: Any) -> torch.Tensor:
    """Clip the prepared gradients and change the weights.

    A step whose norm is not finite, or 0, leaves weights and moments as they are. All ranks agree, because the norm is
    global. A norm is 0 if no token of the step carries a label; weight decay and momentum alone would move the weights.
    The host does not wait for the norm. When it knows of a skipped step, it calls `undo_step_count`.

    Written for Megatron 0.16.1 and 0.19.2: `prepare_grads`, `get_grad_norm` and `step_with_ready_grads` are the parts
    of its own `step`, which waits for the norm in their middle.

    Returns:
        [] fp32 on the device, the global gradient norm before clipping; NaN for 0.
    """
    norm = torch.as_tensor(optimizer.get_grad_norm(), dtype=torch.float32, device=device()).view(())
    norm = torch.where(norm == 0, math.nan, norm)
    for member in members(optimizer):
        member.optimizer.found_inf = 1.0 - norm.isfinite().float()
        clip = member.config.clip_grad
        member.optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1.0) if clip > 0 else None
    optimizer.step_with_ready_grads()
    return norm


def undo_step_count(optimizer: Any) -> None:
    """Take a skipped step out of Adam's step count; before the next save at the latest."""
    for member in members(optimizer):
        member.optimizer.undo_step_count()


PARTS = {
    "embeddings": ("embedding.word_embeddings.", "embedding_norm.", "output_layer.weight"),
    "head": ("lm_head.", "output_layer.bias"),
}
"""Starts of the names of the parts outside the layers. Where the last pipeline stage is not the first one too, it holds
its own copy of the token embeddings, `output_layer.weight`."""


class FrozenWeights:
    """Keeps parts of the model as they are: no gradient, no weight decay, no change of their Adam moments.

    The backward pass still computes their gradients. Megatron lays out its gradient buckets once per run, and a change
    of phase must not rebuild the optimizer, because its state crosses the change.

    Written for Megatron 0.16.1 and 0.19.2: a parameter's gradient is in `main_grad`, and an optimizer's
    `model_param_group_index_map` maps a parameter to the group and position of its main parameter.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any) -> None:
        self._model = model
        self._optimizer = optimizer
        self._frozen: list[torch.nn.Parameter] = []
        for member in members(optimizer):
            member.optimizer.register_step_pre_hook(self._drop_gradients)

    def freeze(self, parts: Collection[int | str]) -> None:
        """Freeze exactly these parts from the next step on.

        Args:
            parts: Layers, counted over the whole model, and names in PARTS.
        """
        starts = (PARTS[part] if isinstance(part, str) else (f"decoder.layers.{part}.",) for part in parts)
        names = tuple(chain.from_iterable(starts))
        self._frozen = [
            parameter
            for name, parameter in self._model.named_parameters()
            if names and global_name(self._model, name).startswith(names)
        ]

    def clear_gradients(self) -> None:
        """Zero the gradients of frozen weights, so that the gradient norm leaves them out. Call after backward."""
        for parameter in self._frozen:
            gradient: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
            gradient.zero_()

    def _drop_gradients(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        """Remove the gradients of frozen weights, because Adam skips parameters without a gradient only."""
        frozen = set(self._frozen)
        for member in members(self._optimizer):
            if member.optimizer is inner:
                for parameter, (group, position) in member.model_param_group_index_map.items():
                    if parameter in frozen:
                        inner.param_groups[group]["params"][position].grad = None


@torch.no_grad()
def replace_weights(optimizer: Any, values: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
    """Give parameters new values on every rank, and zero Adam's moments of them. The step count is kept.

    Written for Megatron 0.16.1 and 0.19.2: `gbuf_ranges` and `_get_main_param_and_optimizer_states` as in
    `optimizer_shards`. A rank's range of a parameter has its fp32 main weights and moments there.

    Args:
        optimizer: Result of `build_optimizer`.
        values: Whole values of this rank's parameters.
    """
    for parameter, value in values.items():
        parameter.copy_(value)
    for member in members(optimizer):
        buckets = [bucket for buffer in member.gbuf_ranges for parts in buffer.values() for bucket in parts]
        for parameter, ranges in [item for bucket in buckets for item in bucket["param_map"].items()]:
            if parameter not in values:
                continue
            states, own = member._get_main_param_and_optimizer_states(parameter), ranges["param"]
            states["param"].copy_(values[parameter].reshape(-1)[own.start : own.end])
            states["exp_avg"].zero_()
            states["exp_avg_sq"].zero_()


def members(optimizer: Any) -> list[Any]:
    """Return the distributed optimizers that Megatron's chained optimizer holds: one, for a dense model."""
    members: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return members
