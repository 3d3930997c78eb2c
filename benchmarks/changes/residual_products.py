"""Residual sums inside the products before them: attention's output product and fc2 add the states that go around them.

The norm after it then reads one tensor instead of two and writes one instead of two, and the product reads one more:
4 passes over [T, h] for 5. The products are Triton's instead of cuBLAS's. Only a GPU can say which weighs more.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.changes.products import descriptor, grid_of, place, tiling
from engine.modernbert import layers
from engine.modernbert.attention import PackedDocuments
from engine.modernbert.layers import ModernBertLayer, Summands
from engine.modernbert.linears import PlainRowLinear, product_gradients


def residuals_in_products() -> AbstractContextManager[Any]:
    """Build models with the layers below in this context."""
    return mock.patch.multiple(layers, ModernBertLayer=AddingLayer, PlainRowLinear=AddingRowLinear)


class AddingRowLinear(PlainRowLinear):
    """A plain linear layer that adds `residual` [T, 1, n] to its product, if the layer around it sets one."""

    residual: Tensor | None = None

    def forward(self, states: Tensor) -> tuple[Tensor, None]:
        """Map [T, 1, k] to [T, 1, n]."""
        residual, self.residual = self.residual, None
        return (
            super().forward(states) if residual is None else (_LinearAndAdd.apply(states, self.weight, residual), None)
        )


class AddingLayer(ModernBertLayer):
    """`ModernBertLayer` whose products add the residual states, where all rows are computed and nothing is dropped."""

    def forward(
        self, hidden_states: Tensor | Summands, *, rotary_pos_emb: Tensor, packed_seq_params: PackedDocuments, **_: Any
    ) -> tuple[Tensor | Summands, None]:
        """Map [T, 1, hidden] to ([T, 1, hidden], None)."""
        attention, fc2 = self.self_attention, self.mlp.linear_fc2
        adds = isinstance(attention.linear_proj, AddingRowLinear) and isinstance(fc2, AddingRowLinear)
        if not adds or packed_seq_params.dropout is not None or attention.selects(packed_seq_params):
            more: dict[str, Any] = {"rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params}
            return super().forward(hidden_states, **more)
        states, normed = self.input_layernorm(
            *(hidden_states if isinstance(hidden_states, tuple) else (hidden_states,))
        )
        attention.linear_proj.residual = states
        states, _bias = attention(
            normed, attention_mask=None, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )
        fc2.residual, normed = self.pre_mlp_layernorm(states)
        return self.mlp(normed)[0], None


class _LinearAndAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        rows, added = (x.reshape(-1, x.shape[-1]) for x in (states, residual))
        return linear_and_add(rows, weight, added).view_as(residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        return *product_gradients(ctx, grads[0]), grads[0]


def linear_and_add(states: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Return states [T, k] @ weight.T [k, n] + residual [T, n]; the product is rounded before the sum."""
    output = torch.empty_like(residual)
    tensors = (states.contiguous(), weight, residual.contiguous(), output)
    _linear_and_add[grid_of(output)](*map(descriptor, tensors), *output.shape, states.shape[1])
    return output


TILINGS = [tiling(128, 128, 8, 3), tiling(128, 128, 8, 4), tiling(128, 256, 8, 3), tiling(128, 64, 4, 4)]
"""Tilings that a GPU times once per shape. All of them add up a product in the same order."""


@triton.autotune(TILINGS, key=["width", "inner"])
@triton.jit
def _linear_and_add(  # type: ignore[no-untyped-def]
    states, weight, residual, output, rows, width, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = place(rows, width, BLOCK_M, BLOCK_N, GROUP)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, inner, BLOCK_K):
        sums = tl.dot(states.load([row, k]), weight.load([column, k]).T, sums)
    total = sums.to(output.dtype).to(tl.float32) + residual.load([row, column]).to(tl.float32)
    output.store([row, column], total.to(output.dtype))
