"""Linear layers for BF16 without tensor parallelism: torch's products, under Megatron's own checkpoint keys.

The host launches them with less Python than Transformer Engine's modules.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from engine.modernbert.ops import add_product_


def takes_plain_linears(config: TransformerConfig) -> bool:
    """Return whether the layers below serve a GPU: BF16 without FP8, and each rank holds whole weights."""
    return bool(config.bf16 and config.fp8 is None and config.tensor_model_parallel_size == 1)


class PlainColumnLinear(ColumnParallelLinear):
    """The product with a whole weight, [..., k] -> [..., n]."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=_without_apex(config), **kwargs)

    def forward(self, states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Return the product, and no bias."""
        return _Product.apply(states, self.weight), None


class PlainRowLinear(RowParallelLinear):
    """The product with a whole weight, [..., k] -> [..., n]."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=_without_apex(config), **kwargs)

    def forward(self, states: Tensor) -> tuple[Tensor, None]:
        """Return the product, and no bias."""
        return _Product.apply(states, self.weight), None


def _without_apex(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration for the constructors of Megatron's layers, which need Apex to fuse the sum."""
    config = copy(config)
    config.gradient_accumulation_fusion = False
    return config


class _Product(torch.autograd.Function):
    """states @ weight.T. The weight's gradient is added to Megatron's fp32 sum `main_grad`, if there is one."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return F.linear(states, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return product_gradients(ctx, grads[0])


def product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `states` and `weight`, which `ctx` has saved, by that of states @ weight.T, [..., n]."""
    states, weight = ctx.saved_tensors
    grad_states = grad @ weight if ctx.needs_input_grad[0] else None
    return grad_states, add_weight_gradient(weight, grad, states) if ctx.needs_input_grad[1] else None


def add_weight_gradient(weight: Tensor, grad: Tensor, states: Tensor) -> Tensor:
    """Add a weight's gradient to Megatron's fp32 sum `main_grad`, if there is one; return what autograd shall have.

    Args:
        weight: [n, k]
        grad: [..., n], the gradient of the product.
        states: [..., k], what the weight was multiplied with.
    """
    rows, grad = states.reshape(-1, states.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if not hasattr(weight, "main_grad"):
        return grad.t() @ rows
    add_product_(weight.main_grad, grad.t(), rows)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # Megatron's hook drops it unread. Without a gradient the hook would run on another thread.
    return torch.empty_like(weight)
