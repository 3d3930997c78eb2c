"""Operations between the matrix products: one Triton kernel each on a GPU, torch's operations elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datapipe.targets import threshold
from engine import device

CONVERTED_ROWS = 16
"""Rows of logits that a CPU converts to fp32 and back at once: they stay in its cache."""
STEP = 0x9E3779B9
"""Distance of the hashes' inputs of two neighbouring channels, as in `datapipe.targets.position_hashes`."""


def geglu(states: Tensor) -> Tensor:
    """Compute the exact GELU of the first half times the second half, [..., 2 n] -> [..., n]."""
    if states.is_cuda and device.compiles_kernels():
        from engine.modernbert.kernels import pointwise

        output: Tensor = pointwise.GeGLU.apply(states)
        return output
    gated: Tensor = _GeGLU.apply(states)
    return gated


class _GeGLU(torch.autograd.Function):
    """Writes both halves' gradients in place, because autograd would allocate two zero-padded copies."""

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


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split [T, heads, 3, d] into q, k and v, [T, heads, d] each, with RoPE applied to q and k.

    The rotation is the half-split one of Hugging Face; cos and sin are [T, d] with two equal halves.
    """
    if qkv.is_cuda and device.compiles_kernels():
        from engine.modernbert.kernels import pointwise

        rotated: tuple[Tensor, Tensor, Tensor] = pointwise.Rotate.apply(qkv, cos, sin)
        return rotated
    q, k, v = _Rotate.apply(qkv, cos, sin)
    return q, k, v


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = qkv.unbind(2)
        return _turn(q, cos, sin), _turn(k, cos, sin), v.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        dq, dk, dv = grads
        tokens, heads, dim = dv.shape
        dqkv = dv.new_empty(tokens, heads, 3, dim)
        _turn(dq, cos, -sin, dqkv[:, :, 0])
        _turn(dk, cos, -sin, dqkv[:, :, 1])
        dqkv[:, :, 2] = dv
        return dqkv, None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, result: Tensor | None = None) -> Tensor:
    """Rotate [T, heads, d] into `result`, or into a new tensor."""
    result = torch.empty_like(states, memory_format=torch.contiguous_format) if result is None else result
    half = states.shape[-1] // 2
    (first, second), (left, right) = states.split(half, dim=-1), result.split(half, dim=-1)
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return result


def takes_local_attention(qkv: Tensor) -> bool:
    """Whether `local_attention` can be called: on a GPU in half precision, for heads of 32, 64 or 128."""
    return bool(
        qkv.is_cuda and qkv.dtype != torch.float32 and qkv.shape[-1] in (32, 64, 128) and device.compiles_kernels()
    )


def local_attention(qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, before: int, after: int) -> Tensor:
    """Apply RoPE and the attention of a local layer, [T, heads, 3, d] -> [T, heads, d].

    Args:
        qkv: Queries, keys and values before RoPE.
        cos: [T, d]
        sin: [T, d]
        documents: [T] int32, the document of each token; no token sees another document.
        before: Keys that a query sees to its left, itself not counted.
        after: Keys that a query sees to its right.
    """
    from engine.modernbert.kernels.attention import LocalAttention

    out: Tensor = LocalAttention.apply(qkv, cos, sin, documents, before, after)
    return out


def add_and_norm(states: Tensor, other: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `states + other` and the LayerNorm of the sum, with a weight and no bias, [..., h] each.

    A GPU adds the gradients of both results in the norm's backward pass.
    """
    if states.is_cuda and device.compiles_kernels():
        from engine.modernbert.kernels import pointwise

        both: tuple[Tensor, Tensor] = pointwise.AddAndNorm.apply(states, other, weight, eps)
        return both
    total = states if other is None else states + other
    return total, F.layer_norm(total, weight.shape, weight, None, eps)


def drop(states: Tensor, keys: Tensor, site: int, first_channel: int, rate: float) -> Tensor:
    """Set elements to 0 with probability `rate`, by a hash, and divide the others by 1 - rate; [T, 1, n] -> [T, 1, n].

    Args:
        states: [T, 1, n]
        keys: [T] int32, the hash of each token.
        site: uint32, the hash of the place in the model.
        first_channel: Number of the first of the n channels in the whole model.
        rate: Share of the elements, below 1.
    """
    if states.is_cuda and device.compiles_kernels():
        from engine.modernbert.kernels import pointwise

        output: Tensor = pointwise.Drop.apply(states, keys, site, first_channel, int(threshold(rate)), 1 / (1 - rate))
        return output
    dropped: Tensor = _Drop.apply(states, keys, site, first_channel, rate)
    return dropped


class _Drop(torch.autograd.Function):
    """Computes the hash again in backward, because a mask would hold memory from forward to backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, keys: Tensor, site: int, first_channel: int, rate: float) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.site, ctx.first_channel, ctx.rate = site, first_channel, rate
        return _drop_by_keys(states, keys, site, first_channel, rate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (keys,) = ctx.saved_tensors
        return _drop_by_keys(grads[0], keys, ctx.site, ctx.first_channel, ctx.rate), None, None, None, None


def _drop_by_keys(states: Tensor, keys: Tensor, site: int, first_channel: int, rate: float) -> Tensor:
    zeros = dropped_elements(keys, site, first_channel, states.shape[-1], rate).view(states.shape)
    return states.mul(1 / (1 - rate)).masked_fill_(zeros, 0.0)


def dropped_elements(keys: Tensor, site: int, first_channel: int, channels: int, rate: float) -> Tensor:
    """Compute which elements `drop` sets to 0, [T, channels] bool.

    torch has little arithmetic for uint32. int32 wraps around to the same bits.
    """
    tokens = _mix_(keys ^ _int32(site))
    numbers = torch.arange(first_channel, first_channel + channels, dtype=torch.int32, device=keys.device)
    hashes = _mix_(tokens[:, None] + numbers * _int32(STEP))
    return hashes.bitwise_xor_(-(2**31)) < int(threshold(rate)) - 2**31  # unsigned order as signed order


def _mix_(x: Tensor) -> Tensor:
    """Apply `datapipe.targets.mix` in place to int32. torch's shift copies the sign, which the masks remove."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _int32(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _int32(word: int) -> int:
    """Return the int32 with the bits of a uint32."""
    return word - 2**32 if word >= 2**31 else word


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [n, t] @ right [t, k] in half precision to total [n, k] fp32 in place, without rounding in between."""
    if total.is_cuda:
        # Not one addmm: some versions of torch refuse a summand whose dtype differs from the factors'.
        total.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        total.addmm_(left.float(), right.float())


def takes_whole_rows(states: Tensor) -> bool:
    """Whether `softmax_minus_label_` can be called: on a GPU. A CPU has no cache for the rows of a tile."""
    return bool(states.is_cuda and device.compiles_kernels())


def softmax_minus_label_(logits: Tensor, labels: Tensor, writes: bool) -> Tensor:
    """Compute each row's cross-entropy, and turn logits [N, V] into its gradient in place.

    Args:
        logits: [N, V], over the whole vocabulary.
        labels: [N] int64
        writes: Write the gradient; otherwise the logits stay.

    Returns:
        [N, 2] fp32: the cross-entropy, and 1 where the label is the likeliest entry, else 0.
    """
    from engine.modernbert.kernels import pointwise

    sums: Tensor = pointwise.softmax_minus_label_(logits, labels, writes)
    return sums


def exponentials_(logits: Tensor, largest: Tensor | None) -> Tensor:
    """Turn logits [N, V] into exp(logits - largest) in place, and return their sums, [N, 1] fp32.

    `largest` is [N, 1] fp32; None subtracts nothing.
    """
    if largest is not None and logits.is_cuda and device.compiles_kernels():
        from engine.modernbert.kernels import pointwise

        sums: Tensor = pointwise.exponentials_(logits, largest)
        return sums
    rows = CONVERTED_ROWS if logits.device.type == "cpu" and logits.dtype != torch.float32 else len(logits)
    sums = logits.new_empty(len(logits), 1, dtype=torch.float32)
    for first in range(0, len(logits), rows):
        part = slice(first, first + rows)
        exponentials = logits[part].float()
        if largest is not None:
            exponentials.sub_(largest[part])
        torch.sum(exponentials.exp_(), dim=1, keepdim=True, out=sums[part])
        logits[part] = exponentials  # in fp32 both are the same memory
    return sums
