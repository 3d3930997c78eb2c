"""What `kernels` does on a GPU in one pass each, and torch's operations elsewhere, with gradients of few passes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import device

COMPILES = device.compiles_kernels()
if COMPILES:
    from engine.modernbert.kernels import pointwise
    from engine.modernbert.kernels.attention import LocalAttention


def geglu(states: Tensor) -> Tensor:
    """[..., 2 n] -> [..., n]: the exact GELU of the first half times the second."""
    if states.is_cuda and COMPILES:
        output: Tensor = pointwise.GeGLU.apply(states)
        return output
    gated: Tensor = _GeGLU.apply(states)
    return gated


class _GeGLU(torch.autograd.Function):
    """Its gradient is written where it belongs: those of two halves would each be copied into a whole of zeros."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        gate = F.gelu(first)
        ctx.save_for_backward(states, gate)
        return gate * second

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        states, gate = ctx.saved_tensors
        (first, second), result = states.chunk(2, dim=-1), torch.empty_like(states)
        grad_first, grad_second = result.chunk(2, dim=-1)
        torch.ops.aten.gelu_backward.grad_input(grads[0] * second, first, grad_input=grad_first)
        torch.mul(grads[0], gate, out=grad_second)
        return result


def rotate(mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, [T, heads, d] each, of [T, heads, 3, d], the first two turned by RoPE.

    By the half-split rotation Hugging Face uses; cos and sin are [T, d], the same in both halves.
    """
    if mixed.is_cuda and COMPILES:
        turned: tuple[Tensor, Tensor, Tensor] = pointwise.Rotate.apply(mixed, cos, sin)
        return turned
    query, key, value = _Rotate.apply(mixed, cos, sin)
    return query, key, value


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        query, key, value = mixed.unbind(2)
        return _turn(query, cos, sin), _turn(key, cos, sin), value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        query, key, value = grads
        tokens, heads, dim = value.shape
        mixed = value.new_empty(tokens, heads, 3, dim)
        _turn(query, cos, -sin, mixed[:, :, 0])
        _turn(key, cos, -sin, mixed[:, :, 1])
        mixed[:, :, 2] = value
        return mixed, None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, result: Tensor | None = None) -> Tensor:
    """[T, heads, d], into the result if there is one."""
    result = torch.empty_like(states, memory_format=torch.contiguous_format) if result is None else result
    half = states.shape[-1] // 2
    (first, second), (left, right) = states.split(half, dim=-1), result.split(half, dim=-1)
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return result


def takes_local_attention(mixed: Tensor) -> bool:
    """Whether `local_attention` can be called: on a GPU in half precision, for heads of 32, 64 or 128."""
    return bool(COMPILES and mixed.is_cuda and mixed.dtype != torch.float32 and mixed.shape[-1] in (32, 64, 128))


def local_attention(mixed: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, before: int, after: int) -> Tensor:
    """`rotate` and the attention of a local layer: [T, heads, 3, d] -> [T, heads, d].

    A query sees keys of its own document, at most `before` places to the left and `after` to the right. documents: [T],
    the document of each token.
    """
    context: Tensor = LocalAttention.apply(mixed, cos, sin, documents, before, after)
    return context


def add_and_norm(states: Tensor, other: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The states [..., h], plus another where there is one, and the sum's LayerNorm with a weight and no bias.

    On a GPU the gradients of both are added in the norm's backward pass.
    """
    if states.is_cuda and COMPILES:
        both: tuple[Tensor, Tensor] = pointwise.AddAndNorm.apply(states, other, weight, eps)
        return both
    total = states if other is None else states + other
    return total, F.layer_norm(total, weight.shape, weight, None, eps)


def exponentials_(logits: Tensor, peak: Tensor | None) -> Tensor:
    """Turn logits [N, V] into exp(logits - peak) in place; their sums [N, 1] fp32. peak: [N, 1] fp32; None for zero."""
    if peak is not None and logits.is_cuda and COMPILES:
        sums: Tensor = pointwise.exponentials_(logits, peak)
        return sums
    powers = logits.float()
    if peak is not None:
        powers.sub_(peak)
    sums = powers.exp_().sum(dim=1, keepdim=True)
    logits.copy_(powers)  # nothing to do in fp32, where `powers` are the logits
    return sums
