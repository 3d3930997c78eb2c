"""Operations with results or gradients in FP8, which the linear layer beside them multiplies.

On a GPU a kernel casts what it computes. Elsewhere torch casts the result of the engine's operation, to the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor

from engine import device
from engine.modernbert import ops


def add_and_norm(
    states: Tensor,
    other: Tensor | None,
    weight: Tensor,
    eps: float,
    result: Float8Quantizer,
    gradient: Float8Quantizer | None,
) -> tuple[Tensor, Tensor]:
    """Return `states + other` in BF16 and the LayerNorm of the sum in FP8, [..., h] each.

    Args:
        states: [..., h] BF16
        other: [..., h] BF16, or None.
        weight: [h]
        eps: Added to the variance.
        result: Quantizer of the norm.
        gradient: Quantizer of the gradient of `other`; None for BF16. That of `states` is in BF16.
    """
    if states.is_cuda and device.compiles_kernels():
        both: tuple[Tensor, Tensor] = NormByKernel.apply(states, other, weight, eps, result, gradient)
        return both
    if other is not None and gradient is not None:
        other = CastGradient.apply(other, gradient)
    total, normed = ops.add_and_norm(states, other, weight, eps)
    return total, Cast.apply(normed, result)


def geglu(states: Tensor, result: Float8Quantizer | None, gradient: Float8Quantizer | None) -> Tensor:
    """Compute `ops.geglu`, [..., 2 n] -> [..., n], with the result and the gradient of `states` in FP8.

    Args:
        states: [..., 2 n] BF16
        result: Quantizer of the result; None for BF16.
        gradient: Quantizer of the gradient; None for BF16.
    """
    if states.is_cuda and device.compiles_kernels():
        by_kernel: Tensor = GeGLUByKernel.apply(states, result, gradient)
        return by_kernel
    gated = ops.geglu(states if gradient is None else CastGradient.apply(states, gradient))
    return gated if result is None else Cast.apply(gated, result)


def rotate(
    states: Tensor, heads: int, cos: Tensor, sin: Tensor, gradient: Float8Quantizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `ops.rotate` of [T, 1, heads * 3 * d], whose gradient is in FP8."""
    if states.is_cuda and device.compiles_kernels():
        by_kernel: tuple[Tensor, Tensor, Tensor] = RotateByKernel.apply(states, heads, cos, sin, gradient)
        return by_kernel
    marked: Tensor = CastGradient.apply(states, gradient)
    return ops.rotate(marked.view(len(states), heads, 3, -1), cos, sin)


class NormByKernel(torch.autograd.Function):
    """`add_and_norm` in Triton."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        other: Tensor | None,
        weight: Tensor,
        eps: float,
        result: Float8Quantizer,
        gradient: Float8Quantizer | None,
    ) -> tuple[Tensor, Tensor]:
        from benchmarks.changes import fp8_kernels

        ctx.gradient, ctx.adds, states = gradient, other is not None, states.contiguous()
        added = None if other is None else other.contiguous()
        normed, target = allocate(states.shape, result, Float8Tensor, states)
        total, mean, inverse = fp8_kernels.add_and_norm(states, added, weight, eps, target)
        ctx.save_for_backward(total, weight, mean, inverse)
        return total.view_as(total), normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from benchmarks.changes import fp8_kernels
        from engine.modernbert.kernels.pointwise import AddAndNorm

        if ctx.gradient is None or not ctx.adds:
            return *AddAndNorm.backward(ctx, *grads), None, None
        states, weight, mean, inverse = ctx.saved_tensors
        cast_grad, target = allocate(states.shape, ctx.gradient, Fp8Gradient, states)
        kept, normed = (grad.contiguous() for grad in grads)
        grad, weight_grad = fp8_kernels.norm_backward(states, weight, mean, inverse, kept, normed, target)
        return grad, cast_grad, weight_grad.to(weight.dtype), None, None, None


class GeGLUByKernel(torch.autograd.Function):
    """`geglu` in Triton."""

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


class RotateByKernel(torch.autograd.Function):
    """`rotate` in Triton."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, heads: int, cos: Tensor, sin: Tensor, gradient: Float8Quantizer
    ) -> tuple[Tensor, Tensor, Tensor]:
        from engine.modernbert.kernels.pointwise import Rotate

        ctx.gradient, ctx.shape = gradient, states.shape
        return Rotate.forward(ctx, states.view(len(states), heads, 3, -1), cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from benchmarks.changes import fp8_attention_kernels

        grad, target = allocate(ctx.shape, ctx.gradient, Fp8Gradient, grads[0])
        dq, dk, dv = (grad.contiguous() for grad in grads)
        cos, sin = ctx.saved_tensors
        fp8_attention_kernels.rotate_backward(dq, dk, dv, cos, sin, target)
        return grad, None, None, None, None


class LocalAttentionByKernel(torch.autograd.Function):
    """`ops.local_attention` in Triton, [T, 1, heads * 3 * d] BF16 -> [T, 1, heads * d] FP8, and its gradient in FP8."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        heads: int,
        cos: Tensor,
        sin: Tensor,
        documents: Tensor,
        reach: tuple[int, int],
        result: Float8Quantizer,
        gradient: Float8Quantizer,
    ) -> Tensor:
        from benchmarks.changes import fp8_attention_kernels

        ctx.gradient, ctx.reach, ctx.shape = gradient, reach, states.shape
        qkv = states.contiguous().view(len(states), heads, 3, -1)
        context, target = allocate(torch.Size((len(states), 1, states.shape[-1] // 3)), result, Float8Tensor, states)
        out, lse = fp8_attention_kernels.local_attention(qkv, cos, sin, documents, reach, target)
        ctx.save_for_backward(qkv, cos, sin, documents, out, lse)
        return context

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from benchmarks.changes import fp8_attention_kernels

        grad, target = allocate(ctx.shape, ctx.gradient, Fp8Gradient, grads[0])
        qkv, cos, sin, documents, out, lse = ctx.saved_tensors
        tensors = qkv, cos, sin, documents, out, lse, grads[0].contiguous()
        fp8_attention_kernels.local_attention_backward(*tensors, ctx.reach, target)
        return grad, *[None] * 7


class Cast(torch.autograd.Function):
    """BF16 to FP8, by torch."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, quantizer: Float8Quantizer) -> Tensor:
        return cast(values, quantizer, Float8Tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class CastGradient(torch.autograd.Function):
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
