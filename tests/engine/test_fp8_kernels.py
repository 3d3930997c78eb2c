"""The kernels that write FP8 in Triton's interpreter: their bits are those of a cast of what the BF16 kernels write.

Needs Transformer Engine's Python package, as `test_transformer_engine` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from tests.engine.test_transformer_engine import alone

pytestmark = pytest.mark.skipif("TE_PYTHON" not in os.environ, reason="TE_PYTHON names no directory")


def test_the_kernels_write_the_bits_of_a_cast() -> None:
    pytest.importorskip("triton")
    alone(_check_kernels)


def _check_kernels() -> None:
    from triton.runtime import interpreter

    with mock.patch.object(interpreter, "_convert_float", _round_as_a_gpu(interpreter._convert_float)):
        for rows, width in ((1, 8), (70, 72), (128, 64)):
            torch.manual_seed(rows)
            _check_geglu(rows, width)
            _check_norm(rows, width)
            _check_rotate(rows, 2, 16)
            _check_local_attention(rows, 2, 16)


def leaf(*shape: int) -> torch.Tensor:
    """Return values of many magnitudes: some underflow in FP8, and some saturate."""
    return (torch.randn(*shape) * 10 ** (4 * torch.rand(*shape) - 3)).bfloat16().requires_grad_()


def quantizers(scale: float, e5m2: bool = False, amax: float = 0.0) -> list[Any]:
    """Return one for the kernel and one for the cast."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    kind = DType.kFloat8E5M2 if e5m2 else DType.kFloat8E4M3
    return [Float8Quantizer(torch.tensor(scale), torch.tensor([amax]), kind) for _ in range(2)]


def assert_same(found: Any, values: torch.Tensor, ours: Any, reference: Any) -> None:
    from benchmarks.changes import fp8_ops

    assert found.shape == values.shape and found.dtype == values.dtype
    expected = fp8_ops.cast(values, reference, type(found))
    for one, other in zip(found.get_data_tensors(), expected.get_data_tensors(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found.get_metadata()["fp8_scale_inv"], 1 / ours.scale.view(1))
    assert len(found.get_data_tensors()[0].unique()) > 5 or len(values) == 1
    assert torch.equal(ours.amax, reference.amax)


def _check_geglu(rows: int, width: int) -> None:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    from benchmarks.changes import fp8_casts, fp8_ops
    from engine.modernbert.kernels.pointwise import GeGLU

    for smaller in (slice(width), slice(width, None)):
        states, grad = leaf(rows, 1, 2 * width), leaf(rows, 1, width).detach()
        with torch.no_grad():
            states[..., smaller] /= 1000  # so that the largest gradient is in the other half
        result, gradient = quantizers(7.3), quantizers(3000.0, e5m2=True)
        found, expected = fp8_ops.GeGLUByKernel.apply(states, result[0], gradient[0]), GeGLU.apply(states)
        assert_same(found, expected.detach(), *result)
        grads = [torch.autograd.grad(output, states, grad)[0] for output in (found, expected)]
        assert_same(*grads, *gradient)
        rows_of_gradient = grads[0].reshape((-1, 2 * width))
        assert type(rows_of_gradient) is Float8Tensor
        for one, other in zip(rows_of_gradient.get_data_tensors(), grads[0].get_data_tensors(), strict=True):
            assert torch.equal(one.flatten(), other.flatten())
        fp8_casts._drop_rows(None, (found,), None)
        data, transposed = found.get_data_tensors()
        assert data is None and transposed is not None and found.shape == (rows, 1, width)
        plain = fp8_ops.GeGLUByKernel.apply(states, None, None)
        assert torch.equal(plain, expected) and torch.equal(torch.autograd.grad(plain, states, grad)[0], grads[1])


def _check_norm(rows: int, width: int) -> None:
    from benchmarks.changes import fp8_ops
    from engine.modernbert.kernels.pointwise import AddAndNorm

    for other in (None, leaf(rows, 1, width)):
        states, weight = leaf(rows, 1, width), leaf(width)
        result, gradient = quantizers(200.0, amax=1e9 if other is None else 0.0), quantizers(3.0, e5m2=True)
        total, normed = fp8_ops.NormByKernel.apply(states, other, weight, 1e-5, result[0], gradient[0])
        expected_total, expected = AddAndNorm.apply(states, other, weight, 1e-5)
        assert torch.equal(total, expected_total)
        assert_same(normed, expected.detach(), *result)
        leaves = [states, weight, *([] if other is None else [other])]
        given = [leaf(rows, 1, width).detach() for _ in range(2)]
        grads = torch.autograd.grad((total, normed), leaves, given)
        expected_grads = torch.autograd.grad((expected_total, expected), leaves, given)
        assert all(torch.equal(*pair) for pair in zip(grads[:2], expected_grads[:2], strict=True))
        if other is not None:
            assert_same(grads[2], expected_grads[2], *gradient)
        without = fp8_ops.NormByKernel.apply(states, other, weight, 1e-5, result[0], None)
        for pair in zip(torch.autograd.grad(without, leaves, given), expected_grads, strict=True):
            assert torch.equal(*pair)


def _check_rotate(tokens: int, heads: int, dim: int) -> None:
    from benchmarks.changes import fp8_ops
    from engine.modernbert.kernels.pointwise import Rotate

    cos, sin = torch.rand(2, tokens, dim).bfloat16()
    states, gradient = leaf(tokens, 1, heads * 3 * dim), quantizers(2.0, e5m2=True)
    turned = fp8_ops.RotateByKernel.apply(states, heads, cos, sin, gradient[0])
    expected_turned = Rotate.apply(states.view(tokens, heads, 3, dim), cos, sin)
    assert all(torch.equal(*pair) for pair in zip(turned, expected_turned, strict=True))
    given = [leaf(tokens, heads, dim).detach() for _ in range(3)]
    grads = [torch.autograd.grad(outputs, states, given)[0] for outputs in (turned, expected_turned)]
    assert_same(*grads, *gradient)


def _check_local_attention(tokens: int, heads: int, dim: int) -> None:
    """In fp32, because the interpreter multiplies no BF16."""
    from benchmarks.changes import fp8_ops
    from engine.modernbert.kernels.attention import LocalAttention

    qkv = torch.randn(tokens, 1, heads * 3 * dim, requires_grad=True)
    documents = (torch.arange(tokens, dtype=torch.int32) * 3 // tokens).int()
    cos, sin = torch.rand(2, tokens, dim)
    result, gradient = quantizers(300.0), quantizers(3000.0, e5m2=True)
    settings = (heads, cos, sin, documents, (20, 5), result[0], gradient[0])
    found = fp8_ops.LocalAttentionByKernel.apply(qkv, *settings)
    expected = LocalAttention.apply(qkv.view(tokens, heads, 3, dim), *settings[1:4], 20, 5).flatten(1)[:, None]
    assert_same(found, expected.detach(), *result)
    grad = torch.randn(tokens, 1, heads * dim)
    assert_same(*(torch.autograd.grad(output, qkv, grad)[0] for output in (found, expected)), *gradient)


def _round_as_a_gpu(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Return a conversion for Triton's interpreter, which truncates to BF16, and to FP8 neither saturates nor rounds
    values next to the smallest normal one.
    """
    import triton.language as tl

    types = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def converted(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target not in types:
            return convert(values, source, target, rounding)
        dtype, found = types[target], torch.from_numpy(values)
        if target != tl.bfloat16:
            found = found.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        return found.to(dtype).view(torch.int16 if target == tl.bfloat16 else torch.uint8).numpy()

    return converted
