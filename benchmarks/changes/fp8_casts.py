"""FP8 whose casts cost nothing: what a linear layer multiplies is written in FP8 by the kernel that computes it.

Norm, GeGLU and local attention write the layers' inputs, and no BF16 where nobody else reads it. The backward passes of
norm, GeGLU, RoPE and local attention write the gradients of the layers' outputs.

Delayed scaling alone is served, because its scales are known beforehand, on a GPU whose FP8 products read a transposed
copy (Hopper), without tensor parallelism and recomputation. Elsewhere the classes below do what the engine's do.

The linear layers stay Transformer Engine's, with their quantizers, amax histories and checkpoint keys. Written for its
version 2.20, whose linear layer casts no input and no gradient that is a `Float8Tensor` already.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformer_engine.pytorch.constants import FP8BwdTensorIdx, FP8FwdTensorIdx
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor
from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

from benchmarks.changes import fp8_ops
from engine.modernbert import layers
from engine.modernbert.attention import PackedDocuments
from engine.modernbert.ops import takes_local_attention


def fp8_casts() -> AbstractContextManager[Any]:
    """Give a model that is built meanwhile the classes below."""
    return mock.patch.multiple(
        layers,
        ModernBertLayer=CastingLayer,
        ModernBertSelfAttention=CastingAttention,
        SummingNorm=CastingNorm,
        GatedMLP=CastingMLP,
    )


class CastingNorm(layers.SummingNorm):
    """SummingNorm whose norm, and the gradient of what it adds, are in FP8 for the linear layers beside it."""

    reader: tuple[Any, ...] = ()
    """The linear layer after it, in a tuple, because a module in an attribute would be a part of this one."""

    def forward(self, states: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return `states + other` in BF16 and the norm of the sum, [..., h] each."""
        result = input_quantizer(self.reader[0]) if self.reader else None
        if result is None:
            return super().forward(states, other)
        writer = getattr(other, "writer", None)
        gradient = None if writer is None else gradient_quantizer(writer)
        return fp8_ops.add_and_norm(states, other, self.weight, self.eps, result, gradient)


class CastingAttention(layers.ModernBertSelfAttention):
    """ModernBertSelfAttention with the gradient of qkv, and in local layers the input of its last matrix, in FP8."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.casts = can_cast(config)

    def attend(self, states: Tensor, cos: Tensor, sin: Tensor, packed: PackedDocuments) -> Tensor:
        """Map qkv, [T, 1, heads * 3 * d], to [T or Q, 1, heads * d]."""
        result = input_quantizer(self.linear_proj) if self.casts else None
        gradient = gradient_quantizer(self.linear_qkv) if self.casts else None
        if result is None or gradient is None:
            return super().attend(states, cos, sin, packed)
        heads, core = self.num_attention_heads_per_partition, self.core_attention
        if self.is_local and takes_local_attention(states.view(len(states), heads, 3, -1)):
            reach = (core.window, 0 if packed.causal else core.window)
            local: Tensor = fp8_ops.LocalAttentionByKernel.apply(
                states, heads, cos, sin, packed.documents, reach, result, gradient
            )
            return local
        context = core.attend_selected(*fp8_ops.rotate(states, heads, cos, sin, gradient), packed)
        context = context.reshape(len(context), 1, -1)
        return fp8_ops.Cast.apply(context, result) if self.is_local else context


class CastingMLP(layers.GatedMLP):
    """GatedMLP with the input of its second matrix, and the gradient of its first one's output, in FP8."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.casts = can_cast(self.config)

    def forward(
        self, hidden_states: Tensor, drop: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map [T, 1, hidden] to ([T, 1, hidden], bias). Dropout between the matrices takes its elements in BF16."""
        if not self.casts:
            return super().forward(hidden_states, drop)
        states = self.linear_fc1(hidden_states)[0]
        result = None if drop else input_quantizer(self.linear_fc2)
        gated = fp8_ops.geglu(states, result, gradient_quantizer(self.linear_fc1))
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(drop(gated) if drop else gated)
        return output


class CastingLayer(layers.ModernBertLayer):
    """ModernBertLayer whose norms know the linear layers before and after them."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if not can_cast(config):
            return
        first, second = self.self_attention.linear_qkv, self.mlp.linear_fc1
        for norm, linear in ((self.input_layernorm, first), (self.pre_mlp_layernorm, second)):
            if isinstance(norm, CastingNorm):  # the first layer has none before its attention
                norm.reader = (linear,)
        outputs = self.self_attention.linear_proj, self.mlp.linear_fc2
        for linear in (first, second, *outputs):
            linear.register_forward_hook(_drop_rows)
        for linear in outputs:
            linear.register_forward_hook(_name_writer)


def can_cast(config: TransformerConfig) -> bool:
    """Return whether a model's kernels can write what its linear layers multiply."""
    return bool(
        config.fp8 == "hybrid"
        and config.fp8_recipe == "delayed"
        and config.tensor_model_parallel_size == 1
        and config.recompute_granularity is None
        and not is_non_tn_fp8_gemm_supported()
    )


def _drop_rows(linear: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep of an FP8 input what the weight's gradient needs, as the layer does with the FP8 that it casts itself."""
    if isinstance(inputs[0], Float8Tensor) and torch.is_grad_enabled():
        inputs[0].update_usage(rowwise_usage=False, columnwise_usage=True)


def _name_writer(linear: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Tell the norm that adds the output, in the next layer perhaps, whose gradient it computes."""
    output[0].writer = linear


def input_quantizer(linear: Any) -> Float8Quantizer | None:
    """Return the quantizer of a linear layer's input; None if the layer does not multiply in FP8 now."""
    return _quantizer(linear, "scaling_fwd", FP8FwdTensorIdx.GEMM1_INPUT)


def gradient_quantizer(linear: Any) -> Float8Quantizer | None:
    """Return the quantizer of the gradient of a linear layer's output; None if the layer has no FP8 now."""
    return _quantizer(linear, "scaling_bwd", FP8BwdTensorIdx.GRAD_OUTPUT1)


def _quantizer(linear: Any, direction: str, index: int) -> Float8Quantizer | None:
    if not FP8GlobalStateManager.is_fp8_enabled():
        return None
    if not linear.fp8_initialized:  # the layer's own forward would create its state, but comes later
        linear.init_fp8_metadata()
    quantizer = linear.quantizers[direction][index]
    return quantizer if isinstance(quantizer, Float8Quantizer) else None
