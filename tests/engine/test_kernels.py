"""The Triton kernels against the operations that a CPU runs in their place: on a GPU, or in Triton's interpreter.

Triton comes with CUDA builds of torch alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.changes import LOCAL_TILES
from engine.modernbert import linear_cross_entropy as head
from engine.modernbert import ops
from engine.modernbert.attention import PackedDocuments
from engine.modernbert.attention_kernels import BlockedAttention

ROOT = Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytest.importorskip("triton")

from engine.modernbert.kernels import attention  # noqa: E402
from engine.modernbert.kernels.attention import LocalAttention  # noqa: E402
from engine.modernbert.kernels.pointwise import (  # noqa: E402
    ROWS_PER_PROGRAM,
    AddAndNorm,
    Drop,
    GeGLU,
    Rotate,
    exponentials_,
    softmax_minus_label_,
)

BAR = 1e-5
"""Relative to the largest value; all but attention computes in fp32 throughout."""


def near(found: Tensor, expected: Tensor, bar: float = BAR) -> None:
    found, expected = found.detach().float().cpu(), expected.detach().float()
    assert (found - expected).abs().max() <= bar * expected.abs().max()


def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], inputs: list[tuple[Tensor, Tensor]]) -> None:
    """Outputs, and gradients of random ones with respect to the inputs, which are (ours, the reference's)."""
    for ours, reference in zip(found, expected, strict=True):
        near(ours, reference)
    grads = [torch.randn_like(reference) for reference in expected]
    ours = torch.autograd.grad(found, [pair[0] for pair in inputs], [grad.to(found[0].device) for grad in grads])
    references = torch.autograd.grad(expected, [pair[1] for pair in inputs], grads)
    for one, other in zip(ours, references, strict=True):
        near(one, other)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    reference = torch.randn(*shape)
    return reference.to(DEVICE).clone().requires_grad_(), reference.requires_grad_()


def angles(tokens: int, dim: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    turn = torch.randn(tokens, dim // 2)
    reference = torch.cat([turn.cos()] * 2, -1), torch.cat([turn.sin()] * 2, -1)
    return (reference[0].to(DEVICE), reference[1].to(DEVICE)), reference


@pytest.mark.parametrize("rows", [1, 37])
def test_geglu(rows: int) -> None:
    ours, reference = pair(rows, 1, 2 * 72)
    compare((GeGLU.apply(ours),), (ops.geglu(reference),), [(ours, reference)])


def test_rotate() -> None:
    ours, reference = pair(29, 3, 3, 16)
    mine, theirs = angles(29, 16)
    compare(Rotate.apply(ours, *mine), ops.rotate(reference, *theirs), [(ours, reference)])


@pytest.mark.parametrize("adds", [True, False])
def test_add_and_norm(adds: bool) -> None:
    states, other, weight = pair(2 * ROWS_PER_PROGRAM + 9, 1, 72), pair(2 * ROWS_PER_PROGRAM + 9, 1, 72), pair(72)
    found = AddAndNorm.apply(states[0], other[0] if adds else None, weight[0], 1e-5)
    expected = ops.add_and_norm(states[1], other[1] if adds else None, weight[1], 1e-5)
    compare(found, (expected[0] * 1.0, expected[1]), [states, weight, *([other] if adds else [])])


@pytest.mark.parametrize("site", [0, 5, 0x9ABCDEF0])
def test_drop(site: int) -> None:
    """The same elements to the bit, above and below the sign bit of the hash's inputs and of the threshold."""
    ours, reference = pair(37, 1, 200)
    keys = torch.randint(-(2**31), 2**31, (37,), dtype=torch.int32)
    for rate in (0.1, 0.7):
        expected = ops.drop(reference, keys, site, 300, rate)
        found = Drop.apply(ours, keys.to(DEVICE), site, 300, round(rate * 2**32), 1 / (1 - rate))
        assert torch.equal(found.cpu() == 0, expected == 0)
        compare((found,), (expected,), [(ours, reference)])


def test_exponentials() -> None:
    ours, reference = (x.detach() for x in pair(9, 10_001))
    peak = reference.amax(dim=1, keepdim=True)
    near(exponentials_(ours, peak.to(ours.device)), ops.exponentials_(reference, peak))
    near(ours, reference)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_softmax_minus_label(scale: float) -> None:
    logits, labels = scale * torch.randn(7, 5_003), torch.tensor([0, 1, 4_095, 4_096, 5_002, 17, 17])
    logits[2, 4_095] = logits.max() + 1
    reference = logits.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(reference, labels, reduction="none")
    losses.sum().backward()
    ours = logits.to(DEVICE).clone()
    for writes in (False, True):
        assert torch.equal(ours.cpu(), logits)
        sums = softmax_minus_label_(ours, labels.to(DEVICE), writes).cpu()
        near(sums[:, 0], losses)
        assert torch.equal(sums[:, 1] > 0, logits.argmax(dim=1) == labels)
    assert reference.grad is not None
    near(ours, reference.grad)


@pytest.mark.parametrize("height", [3, 100])
def test_loss_of_whole_rows(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, right predictions and gradients of the layer, in tiles, are those of the path without the kernel."""
    monkeypatch.setattr(head, "_tile_rows", lambda hidden, weight: height)
    found = []
    for by_rows in (False, True):
        monkeypatch.setattr(head, "takes_whole_rows", lambda states, answer=by_rows: answer)
        torch.manual_seed(3)
        leaves = [torch.randn(*shape).to(DEVICE).requires_grad_() for shape in ((10, 16), (384, 16), (384,))]
        labels = torch.randint(0, 300, (10,)).to(DEVICE)
        loss, _ = head.linear_cross_entropy(*leaves, labels, (0, 300))
        grads = torch.autograd.grad(2 * loss, leaves)
        with torch.no_grad():
            found.append((loss.detach(), *head.linear_cross_entropy(*leaves, labels, (0, 300)), *grads))
    for one, other in zip(found[1], found[0], strict=True):
        near(one, other.cpu())


@settings(max_examples=15 if not ON_GPU else 50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6).map(tuple),
    window=st.sampled_from([8, 40, 64, 100]),
    causal=st.booleans(),
    tile=st.sampled_from([(64, 64, attention.OPTIONS), *LOCAL_TILES]),
)
def test_local_attention(
    lengths: tuple[int, ...], window: int, causal: bool, tile: tuple[int, int, dict[str, int]]
) -> None:
    """Queries next to the ends of documents, of blocks, and of the row; on a GPU matrix products are in TF32."""
    tokens, bar = sum(lengths), 1e-2 if ON_GPU else BAR
    torch.manual_seed(tokens)
    ours, reference = pair(tokens, 2, 3, 32)
    mine, theirs = angles(tokens, 32)
    packed = PackedDocuments.from_lengths(lengths, causal, torch.device("cpu"))
    expected = BlockedAttention._by_band(*ops.rotate(reference, *theirs), packed, window)
    documents = packed.documents.to(ours.device)
    grad = torch.randn_like(expected)
    with mock.patch.multiple(attention, BLOCK_M=tile[0], BLOCK_N=tile[1], OPTIONS=tile[2]):
        found = LocalAttention.apply(ours, *mine, documents, window, 0 if causal else window)
        (one,) = torch.autograd.grad(found, ours, grad.to(found.device))
    near(found, expected, bar)
    (other,) = torch.autograd.grad(expected, reference, grad)
    near(one, other, bar)


def test_they_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.engine.compile_kernels"]
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 28
