"""Attention kernels over packed documents: torch's on any device, and three for a GPU in half precision."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from configs.errors import InputError
from engine.modernbert.attention import BAND, PackedDocuments
from engine.modernbert.ops import local_attention, rotate, takes_local_attention


class _CoreAttention(MegatronModule):
    """Base of the attention kernels, with the constructor that Megatron gives core attention.

    Attributes:
        window: Tokens that a query sees to each side; None in global layers.
    """

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__(config=config)
        local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window: int | None = config.window_size[0] if local else None

    def forward(self, qkv: Tensor, cos: Tensor, sin: Tensor, packed: PackedDocuments) -> Tensor:
        """Map [T, heads, 3, d] before RoPE to [T or Q, heads, d]; cos and sin are [T, d]."""
        if self.window is not None and takes_local_attention(qkv):
            after = 0 if packed.causal else self.window
            return local_attention(qkv, cos, sin, packed.documents, self.window, after)
        return self.attend_selected(*rotate(qkv, cos, sin), packed)

    def attend_selected(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments) -> Tensor:
        """Map q, k and v after RoPE, [T, heads, d] each, to [T or Q, heads, d]."""
        if packed.is_selected:
            assert packed.queries is not None
            query = query.index_select(0, packed.queries.positions)
        return self.attend(query, key, value, packed)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments) -> Tensor:
        """Map q [T or Q, heads, d], k and v [T, heads, d] after RoPE to the shape of q."""
        raise NotImplementedError


class BlockedAttention(_CoreAttention):
    """Attention by torch's SDPA on any device, in any dtype.

    A local layer costs as much as its window, a global one as its documents; neither costs the square of the row.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments) -> Tensor:
        """Attend within bands of queries in local layers, and document by document in global ones."""
        if self.window is None:
            return self._by_document(query, key, value, packed)
        return self._by_band(query, key, value, packed, self.window)

    @staticmethod
    def _by_document(query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments) -> Tensor:
        groups = packed.groups()
        # One `split`, because the gradient of each slice would be a zero-padded tensor of the whole size.
        tokens, counts = [group.tokens for group in groups], [group.queries for group in groups]
        queries, keys, values = (
            x.transpose(0, 1).unsqueeze(0).split(sizes, dim=2)
            for x, sizes in ((query, counts), (key, tokens), (value, tokens))
        )
        outputs = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=packed.causal and mask is None)
            for q, k, v, (_, _, mask) in zip(queries, keys, values, groups, strict=True)
        ]
        return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)

    @staticmethod
    def _by_band(query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments, window: int) -> Tensor:
        total, heads, dim = query.shape
        before, after, mask = packed.band(window, query.dtype)
        blocks = mask.shape[0]
        tail = blocks * BAND - total
        if tail:
            query = F.pad(query, (0, 0, 0, 0, 0, tail))
        q = query.view(blocks, BAND, heads, dim).transpose(1, 2)
        k, v = (_Band.apply(x, blocks, before, after) for x in (key, value))
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        output = output.transpose(1, 2).reshape(blocks * BAND, heads, dim)
        return output[:total] if tail else output


class _Band(torch.autograd.Function):
    """The keys that each block of BAND queries may see, [T, heads, d] -> [blocks, heads, before + BAND + after, d].

    The result is a view of the padded states. The gradient is written here, because torch's own gradient of `unfold`
    adds element by element.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, blocks: int, before: int, after: int) -> Tensor:
        total, heads, dim = states.shape
        ctx.shape, ctx.before = states.shape, before
        padded = states.new_zeros(before + blocks * BAND + after, heads, dim)
        padded[before : before + total] = states
        return padded.unfold(0, before + BAND + after, BAND).transpose(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        blocks, heads, keys, dim = grads[0].shape
        padded = grads[0].new_zeros((blocks + keys // BAND) * BAND, heads, dim)
        for first in range(0, keys, BAND):  # the same keys of two neighbouring blocks lie BAND apart
            part = grads[0][:, :, first : first + BAND].transpose(1, 2)
            padded[first : first + blocks * BAND].view(blocks, BAND, heads, dim)[:, : part.shape[1]] += part
        return padded[ctx.before : ctx.before + ctx.shape[0]], None, None, None


class FlashAttention(_CoreAttention):
    """FlashAttention for packed documents from torch; needs CUDA and fp16 or bf16."""

    def __init__(self, config: Any, layer_number: int, **more: Any) -> None:
        super().__init__(config, layer_number, **more)
        _take_newest_flash_attention()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments) -> Tensor:
        """Attend with the window of the layer."""
        from torch.nn.attention.varlen import varlen_attn

        reach = -1 if self.window is None else self.window
        bounds = packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv
        window = (reach, 0 if packed.causal else reach)
        output: Any = varlen_attn(query, key, value, *bounds, window_size=window)
        return cast(Tensor, output)  # the pair with lse is returned only on request


@functools.cache
def _take_newest_flash_attention() -> None:
    """Activate FlashAttention-3 in torch on a Hopper GPU, if its package is installed; else torch has version 2."""
    implementations: tuple[str, ...] = getattr(
        torch.nn.attention, "list_flash_attention_impls", tuple
    )()  # not in every torch 2.11
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if hopper and "FA3" in implementations and importlib.util.find_spec("flash_attn_interface"):
        torch.nn.attention.activate_flash_attention_impl("FA3")


class TransformerEngineAttention(_CoreAttention):
    """Transformer Engine's attention; needs CUDA and fp16 or bf16.

    Per call it picks cuDNN's kernels or those of the flash-attn package, and raises if neither takes the head size.
    """

    def __init__(self, config: Any, layer_number: int, **more: Any) -> None:
        super().__init__(config, layer_number)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.inner = TEDotProductAttention(config, layer_number, **more)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments) -> Tensor:
        """Attend with the window of the layer."""
        mask = AttnMaskType.padding_causal if packed.causal else AttnMaskType.padding
        context: Tensor = self.inner(query, key, value, None, attn_mask_type=mask, packed_seq_params=packed)
        return context.view(query.shape)


class FlashAttention4(_CoreAttention):
    """FlashAttention-4 by the package flash-attn-4; needs a Hopper or Blackwell GPU and fp16 or bf16.

    Raises:
        InputError: The package is not installed.
    """

    def __init__(self, config: Any, layer_number: int, **more: Any) -> None:
        super().__init__(config, layer_number, **more)
        self.kernel = flash_attention_4()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments) -> Tensor:
        """Attend with the window of the layer; its gradient adds in a fixed order if torch is told to."""
        window = (None, None) if self.window is None else (self.window, 0 if packed.causal else self.window)
        output = self.kernel(
            query,
            key,
            value,
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_k=packed.cu_seqlens_kv,
            max_seqlen_q=packed.max_seqlen_q,
            max_seqlen_k=packed.max_seqlen_kv,
            causal=packed.causal,
            window_size=window,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        context: Tensor = output[0] if isinstance(output, tuple) else output
        return context


def flash_attention_4() -> Callable[..., Any]:
    """Import the kernel for packed documents."""
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError as error:
        raise InputError(
            f"attention: flash_attn_4 needs the package flash-attn-4 ({error}); "
            "install flash-attn-4[cu13], or set attention=transformer_engine",
            key="attention",
        ) from error
    kernel: Callable[..., Any] = flash_attn_varlen_func
    return kernel
