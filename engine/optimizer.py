"""Megatron's distributed AdamW with the paper's weight decay, and layers that stand still."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from configs.schema import Optimizer
from engine import adam
from engine.device import device
from engine.modernbert.convert import global_name
from engine.modernbert.model import ModernBert


def build_optimizer(models: list[Any], settings: Optimizer, dtype: torch.dtype) -> Any:
    """Distributed AdamW over Megatron's DDP-wrapped models; fp32 main weights where they compute in bf16."""
    adam.use()
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        weight_decay=0.0,  # set a step, with the learning rate
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
    )
    optimizer = get_megatron_optimizer(config, models)
    for part in _parts(optimizer):
        # Left to its first gradient, a parameter frozen from the start would have no moments to save.
        part.init_state_fn(part.optimizer, part.config)
    return optimizer


def set_learning_rate(optimizer: Any, learning_rate: float, settings: Optimizer) -> None:
    """Learning rate and weight decay of the coming step.

    AdamW shrinks a weight by lr * weight_decay a step. The paper's fully decoupled decay shrinks it by
    weight_decay * lr / peak lr, which is AdamW's with weight_decay / peak lr.
    """
    decay = settings.weight_decay / settings.lr if settings.decoupled else settings.weight_decay
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = decay * group["wd_mult"]  # Megatron's 0 on biases and norms


def step(optimizer: Any, losses: torch.Tensor | None = None) -> float:
    """One optimizer step; the global gradient norm before clipping.

    losses: this rank's, if it has any. A gradient may be finite where the loss is not; then a gradient is made NaN as
    well. Where the norm is not finite (a gradient on any rank: the norm is global), weights and moments stay as they
    are. A GPU is given all its work before the host waits for the norm.
    """
    optimizer.prepare_grads()
    if losses is not None and len(losses):
        zero_or_nan = losses.sum() * 0.0  # on the device: to look at the losses the host would wait for them
        for part in _parts(optimizer):
            for parameter in part.get_parameters()[:1]:
                parameter.grad.view(-1)[:1].add_(zero_or_nan)
    norm = torch.as_tensor(optimizer.get_grad_norm(), dtype=torch.float32, device=device()).view(())
    for part in _parts(optimizer):
        part.optimizer.found_inf = 1.0 - norm.isfinite().float()
        clip = part.config.clip_grad
        part.optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1.0) if clip > 0 else None
    optimizer.step_with_ready_grads()
    if not math.isfinite(found := norm.item()):
        for part in _parts(optimizer):
            part.optimizer.take_back()
    return found


class FrozenLayers:
    """Keeps layers as they are: no gradient, no decay, no change of their Adam moments.

    Their gradients are still computed: Megatron's gradient buckets are laid out once for the whole run, and a phase
    that changes what it freezes must not rebuild the optimizer, whose state crosses the switch.
    """

    def __init__(self, model: ModernBert, optimizer: Any) -> None:
        self._model = model
        self._optimizer = optimizer
        self._frozen: list[torch.nn.Parameter] = []
        for part in _parts(optimizer):
            part.optimizer.register_step_pre_hook(self._drop_gradients)

    def freeze(self, layers: Collection[int]) -> None:
        """From the next step on these layers (counted over the whole model) stand still, and no others."""
        names = tuple(f"decoder.layers.{layer}." for layer in layers)
        self._frozen = [
            parameter
            for name, parameter in self._model.named_parameters()
            if names and global_name(self._model, name).startswith(names)
        ]

    def clear_gradients(self) -> None:
        """Between backward and the optimizer's step: frozen layers count nothing in the gradient norm."""
        for parameter in self._frozen:
            parameter.main_grad.zero_()

    def _drop_gradients(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        """Adam skips a parameter without a gradient; with a zero one it would still decay its moments."""
        frozen = set(self._frozen)
        for part in _parts(self._optimizer):
            if part.optimizer is inner:
                for parameter, (group, place) in part.model_param_group_index_map.items():
                    if parameter in frozen:
                        inner.param_groups[group]["params"][place].grad = None


def _parts(optimizer: Any) -> list[Any]:
    """Megatron chains its optimizers, of which a dense model has one."""
    parts: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts
