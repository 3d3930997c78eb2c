"""Loss and gradients over a shared vocabulary against torch's, and the memory that calls reuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.modernbert.linear_cross_entropy import Scratch, linear_cross_entropy
from tests.engine.world import run_world

ROWS, WIDTH, SIZE = 21, 16, 300


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw hidden, weight, bias and labels; the vocabulary is padded to 384."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((ROWS, WIDTH), (384, WIDTH), (384,)))
    return hidden, weight, bias, torch.randint(0, SIZE, (ROWS,), generator=generator)


def loss_and_gradients(size: int) -> list[Any]:
    """Return loss and gradients of hidden, weight slice and bias slice, for the calling rank of `size`."""
    hidden, weight, bias, labels = inputs()
    rank = dist.get_rank()
    start, end = rank * len(weight) // size, (rank + 1) * len(weight) // size
    parts = (hidden, weight[start:end], bias[start:end])
    hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in parts)
    loss, _ = linear_cross_entropy(hidden, weight, bias, labels, (start, SIZE), dist.group.WORLD)
    return [tensor.tolist() for tensor in (loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias)))]


def test_a_rank_whose_slice_is_all_padding_takes_part() -> None:
    """The last of eight slices of 48 entries begins at 336, beyond the 300 that are used."""
    hidden, weight, bias, labels = inputs()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(hidden, weight[:SIZE], bias[:SIZE])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(expected, leaves)
    ranks = [tuple(map(torch.tensor, tensors)) for tensors in run_world(8, loss_and_gradients, 8)]
    for loss, grad, _, _ in ranks:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, grad_hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]), grad_weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), grad_bias, rtol=1e-4, atol=1e-4)


def test_scratch_memory_is_reused_and_never_shared_between_owners() -> None:
    one, other, like = Scratch(), Scratch(), torch.empty(0)
    first = one.take("tile", 4, 6, like)
    assert one.take("tile", 3, 8, like).data_ptr() == first.data_ptr()
    assert other.take("tile", 4, 6, like).data_ptr() != first.data_ptr()
    assert one.take("kernel", 4, 6, like).data_ptr() != first.data_ptr()
    assert one.take("tile", 4, 6, like.bfloat16()).dtype == torch.bfloat16


def test_import_does_not_ask_for_a_gpu() -> None:
    """Forks of a process that has asked lose CUDA."""
    code = (
        "from engine import device\nfrom engine.megatron import cpu\ncpu.install()\n"
        "device.compiles_kernels = lambda: 1 / 0\n"
        "import engine.modernbert.model"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[2])
