"""Time that the host needs to start a step's kernels: Python and torch of base's 22 layers, forward and backward.

The tensors are so small (64 tokens, hidden size 64) that their arithmetic is next to nothing, and attention is a
stand-in without arithmetic. On a GPU a kernel in Triton replaces several operations that a CPU starts here. The limit
is the time of the kernels of 4 rows of 8192 on an H100, 75 ms (estimated): below it the GPU decides, and not the host.

    python -m benchmarks.host [--quick] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import ModernBertConfig

from benchmarks.table import Row, arguments, report
from engine.megatron import cpu
from engine.modernbert import layers
from engine.modernbert.attention import PackedDocuments
from engine.modernbert.model import ModernBert, transformer_config
from engine.parallel import single_process

KERNELS = 75e-3
"""Seconds of the kernels of 4 rows, estimated: a quarter of the 335 ms of 16 rows, less the optimizer's share."""
TOKENS, HIDDEN = 64, 64
LAYERS = 22


class _Attention(torch.autograd.Function):
    """As many nodes of autograd as an attention kernel, and no arithmetic."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        ctx.save_for_backward(qkv)
        return qkv.new_zeros(qkv.shape[0], qkv.shape[1], qkv.shape[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (qkv,) = ctx.saved_tensors
        return torch.zeros_like(qkv)


class _CoreAttention(torch.nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, qkv: Tensor, *_: Any) -> Tensor:
        output: Tensor = _Attention.apply(qkv)
        return output


def one_pass(plain: bool) -> Callable[[], None]:
    """A forward and backward pass through the layers, with plain linear layers or Megatron's own."""
    architecture = ModernBertConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=0,
        cls_token_id=0,
        sep_token_id=0,
        pad_token_id=0,
    )
    config = transformer_config(architecture, gradient_accumulation_fusion=plain)
    with (
        mock.patch.object(layers, "BlockedAttention", _CoreAttention),
        mock.patch.object(layers, "takes_plain_linears", lambda _: plain),
    ):
        model = ModernBert(config, architecture, transformer_engine=plain)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
        weight.main_grad = torch.zeros_like(weight)
    packed = PackedDocuments.from_lengths((TOKENS,), True, torch.device("cpu"))
    states = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)
    angles = model._rotary(packed)  # noqa: SLF001

    def run() -> None:
        output = model.decoder(
            hidden_states=states, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=packed
        )
        output.sum().backward()

    return run


def fastest(run: Callable[[], None], repeats: int) -> float:
    """Seconds of the fastest pass, after some to warm up."""
    for _ in range(5):
        run()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__)
    torch.set_num_threads(1)
    cpu.install()
    repeats = 30 if options.quick else 200
    with single_process():
        plain, megatrons = (fastest(one_pass(kind), repeats) for kind in (True, False))
    rows = [
        Row.at_most("base's layers: torch's products against Megatron's layers", plain, megatrons, None, "s a pass"),
        Row.at_most("base's layers: host against the kernels of 4 rows on an H100", plain, KERNELS, 1.0, "s a pass"),
    ]
    report(rows, options.json)


if __name__ == "__main__":
    main()
