"""FP8 whose casts cost nothing: norm and GeGLU write the FP8 that the next linear layer multiplies, and no BF16.

Delayed scaling alone is served, because its scales are known beforehand, on a GPU whose FP8 products read a transposed
copy (Hopper), without tensor parallelism and recomputation. Elsewhere the classes below do what the engine's do.

The linear layers stay Transformer Engine's, with their quantizers, amax histories and checkpoint keys. Written for its
version 2.20, whose linear layer casts no input and no gradient that is a `Float8Tensor` already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformer_engine.pytorch.constants import FP8BwdTensorIdx, FP8FwdTensorIdx, TE_DType_To_Torch
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor
from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

from engine import device
from engine.modernbert import layers, ops


def fp8_casts() -> AbstractContextManager[Any]:
    """Give a model that is built meanwhile the classes below."""
    return mock.patch.multiple(layers, ModernBertLayer=CastingLayer, SummingNorm=CastingNorm, GatedMLP=CastingMLP)


class CastingNorm(layers.SummingNorm):
    """SummingNorm whose norm is in FP8 where the linear layer after it multiplies in FP8."""

    reader: tuple[Any, ...] = ()
    """The linear layer after it, in a tuple, because a module in an attribute would be a part of this one."""

    def forward(self, states: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return `states + other` in BF16 and the norm of the sum, [..., h] each."""
        quantizer = input_quantizer(self.reader[0]) if self.reader else None
        if quantizer is None:
            return super().forward(states, other)
        return add_and_norm(states, other, self.weight, self.eps, quantizer)


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
        gated = geglu(states, result, gradient_quantizer(self.linear_fc1))
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(drop(gated) if drop else gated)
        return output


class CastingLayer(layers.ModernBertLayer):
    """ModernBertLayer whose norms know the linear layer after them."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if not can_cast(config):
            return
        first, second = self.self_attention.linear_qkv, self.mlp.linear_fc1
        for norm, linear in ((self.input_layernorm, first), (self.pre_mlp_layernorm, second)):
            if isinstance(norm, CastingNorm):  # the first layer has none before its attention
                norm.reader = (linear,)
        for linear in (first, second, self.mlp.linear_fc2):
            linear.register_forward_hook(_drop_rows)


def can_cast(config: TransformerConfig) -> bool:
    """Return whether a model's norm and GeGLU can write what its linear layers multiply."""
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


def add_and_norm(
    states: Tensor, other: Tensor | None, weight: Tensor, eps: float, quantizer: Float8Quantizer
) -> tuple[Tensor, Tensor]:
    """Return `states + other` in BF16 and the LayerNorm of the sum in FP8, [..., h] each."""
    if states.is_cuda and device.compiles_kernels():
        both: tuple[Tensor, Tensor] = _NormByKernel.apply(states, other, weight, eps, quantizer)
        return both
    total, normed = ops.add_and_norm(states, other, weight, eps)
    return total, _Cast.apply(normed, quantizer)


def geglu(states: Tensor, result: Float8Quantizer | None, gradient: Float8Quantizer | None) -> Tensor:
    """Compute `ops.geglu`, [..., 2 n] -> [..., n], with the result and the gradient of `states` in FP8.

    Args:
        states: [..., 2 n] BF16
        result: Quantizer of the result; None for BF16.
        gradient: Quantizer of the gradient; None for BF16.
    """
    if states.is_cuda and device.compiles_kernels():
        by_kernel: Tensor = _GeGLUByKernel.apply(states, result, gradient)
        return by_kernel
    gated = ops.geglu(states if gradient is None else _CastGradient.apply(states, gradient))
    return gated if result is None else _Cast.apply(gated, result)


class _NormByKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, other: Tensor | None, weight: Tensor, eps: float, quantizer: Float8Quantizer
    ) -> tuple[Tensor, Tensor]:
        from benchmarks.changes import fp8_kernels

        states, ctx.adds = states.contiguous(), other is not None
        added = None if other is None else other.contiguous()
        normed, target = allocate(states.shape, quantizer, Float8Tensor, states)
        total, mean, inverse = fp8_kernels.add_and_norm(states, added, weight, eps, target)
        ctx.save_for_backward(total, weight, mean, inverse)
        return total.view_as(total), normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from engine.modernbert.kernels.pointwise import AddAndNorm

        return *AddAndNorm.backward(ctx, *grads), None


class _GeGLUByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, result: Float8Quantizer | None, gradient: Float8Quantizer | None) -> Tensor:
        from benchmarks.changes import fp8_kernels
        from engine.modernbert.kernels.pointwise import GeGLU

        ctx.gradient, states = gradient, states.contiguous()
        if result is None:
            return GeGLU.forward(ctx, states)
        ctx.save_for_backward(states)
        shape = torch.Size((*states.shape[:-1], states.shape[-1] // 2))
        gated, target = allocate(shape, result, Float8Tensor, states)
        fp8_kernels.geglu(states, target)
        return gated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        from benchmarks.changes import fp8_kernels
        from engine.modernbert.kernels.pointwise import GeGLU

        if ctx.gradient is None:
            return GeGLU.backward(ctx, *grads), None, None
        (states,) = ctx.saved_tensors
        grad, target = allocate(states.shape, ctx.gradient, Fp8Gradient, states)
        fp8_kernels.geglu_backward(states, grads[0].contiguous(), target)
        return grad, None, None


class _Cast(torch.autograd.Function):
    """BF16 to FP8, by torch."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, quantizer: Float8Quantizer) -> Tensor:
        return cast(values, quantizer, Float8Tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _CastGradient(torch.autograd.Function):
    """The identity, whose gradient is cast from BF16 to FP8 by torch."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, quantizer: Float8Quantizer) -> Tensor:
        ctx.quantizer = quantizer
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return cast(grads[0], ctx.quantizer, Fp8Gradient), None


class Fp8Gradient(Float8Tensor):
    """The gradient [..., n] of a linear layer's output, whose transposed copy is [n, rows]."""

    def reshape(self, *shape: Any) -> Float8Tensor:
        """Return [rows, n] of Transformer Engine's own class, the only shape that a linear layer asks for.

        Its own `reshape` drops the transposed copy of three dimensions, and brings that of two into a wrong shape.
        """
        return Float8Tensor.make_like(self, data=self.get_data_tensors(columnwise_data=False).view(*shape))


@torch.no_grad()
def cast(values: Tensor, quantizer: Float8Quantizer, kind: type[Float8Tensor]) -> Float8Tensor:
    """Cast [..., n] BF16 as Transformer Engine does: multiply in fp32, saturate, round to the nearest."""
    dtype = TE_DType_To_Torch[quantizer.dtype]
    top = torch.finfo(dtype).max
    scaled = (values.float() * quantizer.scale).clamp_(-top, top)
    quantizer.amax.copy_(quantizer.amax.maximum(values.abs().amax().float()))
    result, (data, transposed, inverse, *_) = allocate(values.shape, quantizer, kind, values)
    data.copy_(scaled.to(dtype).view(torch.uint8))
    transposed.view(data.shape[-1], -1).copy_(data.view(-1, data.shape[-1]).t())
    torch.div(1.0, quantizer.scale, out=inverse[0])
    return result


def allocate(
    shape: torch.Size, quantizer: Float8Quantizer, kind: type[Float8Tensor], like: Tensor
) -> tuple[Float8Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return a tensor of [..., n] in FP8 without values, and the `fp8_kernels.Target` that fills it."""
    leading = (math.prod(shape[:-1]),) if kind is Fp8Gradient else shape[:-1]
    data, transposed = (
        torch.empty(sizes, dtype=torch.uint8, device=like.device) for sizes in (shape, (shape[-1], *leading))
    )
    inverse = torch.empty(1, dtype=torch.float32, device=like.device)
    parts = {"data": data, "data_transpose": transposed, "fp8_scale_inv": inverse, "fp8_dtype": quantizer.dtype}
    tensor = kind(shape=shape, dtype=like.dtype, device=like.device, quantizer=quantizer, **parts)
    return tensor, (data, transposed, inverse, quantizer.scale, quantizer.amax)
