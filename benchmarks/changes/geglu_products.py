"""GeGLU inside the products beside it: the gate in fc1's, its gradient in the product that brings fc2's gradient back.

fc1's product writes the gated states beside what backward needs, so that nothing reads both halves for the gate alone.
The other product writes the gradient of both halves, so that the gradient of the gated states is neither written nor
read. Each saves 4 n bytes per token and layer. The products are Triton's instead of cuBLAS's. Only a GPU can say which
weighs more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from megatron.core.transformer.mlp import MLPSubmodules
from torch import Tensor

from benchmarks.changes.products import descriptor, grid_of, place, tiling
from engine.modernbert import layers
from engine.modernbert.kernels.pointwise import gate, gate_gradients
from engine.modernbert.layers import GatedMLP
from engine.modernbert.linears import (
    PlainColumnLinear,
    PlainRowLinear,
    add_weight_gradient,
    product_gradients,
    takes_plain_linears,
)


def geglu_in_products() -> AbstractContextManager[Any]:
    """Build models with `FusedMLP` in this context."""
    return mock.patch.object(layers, "GatedMLP", FusedMLP)


class FusedMLP(GatedMLP):
    """`GatedMLP` with the gate inside the products, where the linear layers are plain ones."""

    def __init__(self, config: Any, submodules: MLPSubmodules, *args: Any, **kwargs: Any) -> None:
        self.fuses = takes_plain_linears(config) and submodules.linear_fc1 is PlainColumnLinear
        if self.fuses:
            submodules = MLPSubmodules(linear_fc1=LinearAndGate, linear_fc2=LinearAfterGate)
        super().__init__(config, submodules, *args, **kwargs)

    def forward(
        self, hidden_states: Tensor, drop: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map [T, 1, hidden] to ([T, 1, hidden], no bias); `drop` is dropout between the matrices."""
        if not self.fuses:
            return super().forward(hidden_states, drop)
        gated, states = self.linear_fc1(hidden_states)
        if drop is None:
            output: tuple[Tensor, None] = self.linear_fc2(gated, states)
            return output
        return self.linear_fc2(drop(layers.geglu(states)))


class LinearAndGate(PlainColumnLinear):
    """fc1 and the gate."""

    def forward(self, states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Map [T, 1, h] to the gated states [T, 1, n], which have no gradient, and to what is gated, [T, 1, 2 n]."""
        gated, product = _LinearAndGate.apply(states, self.weight)
        return gated, product


class LinearAfterGate(PlainRowLinear):
    """fc2, whose backward pass goes through the gate as well."""

    def forward(self, states: Tensor, ungated: Tensor | None = None) -> tuple[Tensor, None]:
        """Map [T, 1, n] to [T, 1, h]; the gradient goes to `ungated` [T, 1, 2 n], if it is given."""
        return (
            super().forward(states) if ungated is None else (_LinearAfterGate.apply(states, ungated, self.weight), None)
        )


class _LinearAndGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(states, weight)
        gated, product = linear_and_gate(states.reshape(-1, states.shape[-1]), weight)
        gated, product = (x.view(*states.shape[:-1], -1) for x in (gated, product))
        ctx.mark_non_differentiable(gated)
        ctx.set_materialize_grads(False)
        return gated, product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return product_gradients(ctx, grads[1])


class _LinearAfterGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gated: Tensor, ungated: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gated, ungated, weight)
        return torch.nn.functional.linear(gated, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        gated, ungated, weight = ctx.saved_tensors
        grad, result = grads[0].contiguous(), None
        if ctx.needs_input_grad[1]:
            result = gate_gradient(grad.flatten(end_dim=-2), ungated.flatten(end_dim=-2), weight).view_as(ungated)
        return None, result, add_weight_gradient(weight, grad, gated) if ctx.needs_input_grad[2] else None


def linear_and_gate(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply and gate.

    Args:
        states: [T, h]
        weight: [2 n, h], those of the gate's input first; n is a multiple of 8.

    Returns:
        The gated states [T, n], and the product [T, 2 n].
    """
    states, width = states.contiguous(), len(weight) // 2
    gated, product = states.new_empty(len(states), width), states.new_empty(len(states), 2 * width)
    first, second = weight.split(width)
    tensors = (states, first, second, *product.split(width, dim=1), gated)
    _linear_and_gate[grid_of(gated)](*map(descriptor, tensors), *gated.shape, states.shape[1])
    return gated, product


def gate_gradient(grad: Tensor, ungated: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of what is gated, [T, 2 n].

    Args:
        grad: [T, h], the gradient of fc2's output.
        ungated: [T, 2 n]
        weight: [h, n] of fc2.
    """
    result, width = torch.empty_like(ungated), weight.shape[1]
    tensors = (grad, weight, *ungated.split(width, dim=1), *result.split(width, dim=1))
    _gate_gradient[grid_of(ungated[:, :width])](*map(descriptor, tensors), len(grad), width, grad.shape[1])
    return result


FORWARD = [tiling(128, 64, 4, 3), tiling(128, 64, 8, 4), tiling(128, 128, 8, 3), tiling(128, 128, 8, 4)]
BACKWARD = [tiling(128, 128, 8, 3), tiling(128, 128, 8, 4), tiling(128, 64, 4, 4), tiling(64, 128, 4, 4)]
"""Tilings that a GPU times once per shape. All of them add up a product in the same order."""


@triton.autotune(FORWARD, key=["width", "inner"])
@triton.jit
def _linear_and_gate(  # type: ignore[no-untyped-def]
    states, first_weight, second_weight, first_product, second_product, gated, rows, width, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = place(rows, width, BLOCK_M, BLOCK_N, GROUP)
    first, second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, inner, BLOCK_K):
        x = states.load([row, k])
        first = tl.dot(x, first_weight.load([column, k]).T, first)
        second = tl.dot(x, second_weight.load([column, k]).T, second)
    first, second = first.to(gated.dtype), second.to(gated.dtype)  # what is stored is gated
    first_product.store([row, column], first)
    second_product.store([row, column], second)
    gated.store([row, column], gate(first.to(tl.float32), second.to(tl.float32)).to(gated.dtype))


@triton.autotune(BACKWARD, key=["width", "inner"])
@triton.jit
def _gate_gradient(  # type: ignore[no-untyped-def]
    grad, back_weight, first, second, first_result, second_result, rows, width, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = place(rows, width, BLOCK_M, BLOCK_N, GROUP)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, inner, BLOCK_K):
        sums = tl.dot(grad.load([row, k]), back_weight.load([k, column]), sums)
    grad_gated = sums.to(first.dtype).to(tl.float32)  # rounded, as the product alone would be
    x, y = first.load([row, column]).to(tl.float32), second.load([row, column]).to(tl.float32)
    dx, dy = gate_gradients(x, y, grad_gated)
    first_result.store([row, column], dx.to(first.dtype))
    second_result.store([row, column], dy.to(first.dtype))
