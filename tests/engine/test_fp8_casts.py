"""Operations that write FP8: whole runs on a CPU by `te_on_cpu`, and the kernels in Triton's interpreter.

Needs Transformer Engine's Python package, as `test_transformer_engine` does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from configs.schema import RunConfig
from engine.checkpoint import step_directory
from monitoring.log import read_metrics
from tests.engine.test_transformer_engine import _train, alone, fp8
from tests.engine.world import stored

pytestmark = pytest.mark.skipif("TE_PYTHON" not in os.environ, reason="TE_PYTHON names no directory")
KEYS = ("step", "loss", "grad_norm", "eval_loss")


def _train_both_ways(config: RunConfig, folder: Path, resumes: bool) -> list[dict[str, int]]:
    """Train with the change and without, and from the former's first checkpoint without; return what the CPU called."""
    from benchmarks.changes import CHANGES
    from tests.engine.te_on_cpu import CALLS

    found = []
    for name, context in (("casting", CHANGES["FP8 written where it is computed"].other), ("plain", nullcontext)):
        CALLS.clear()
        with context():
            found.append(_train(config, folder / name))
    if resumes:
        shutil.copytree(folder / "casting", folder / "resumed")
        for step in (2, 3):
            shutil.rmtree(step_directory(folder / "resumed/checkpoints", step))
        _train(config, folder / "resumed")
    return found


def lines(directory: Path) -> list[dict[str, Any]]:
    return [{key: line.get(key) for key in KEYS} for line in read_metrics(directory)]


def assert_same_run(found: Path, expected: Path) -> None:
    assert lines(found) == lines(expected)
    weights, expected_weights = stored(found, 3), stored(expected, 3)
    assert weights.keys() == expected_weights.keys()
    assert any(name.startswith("scaling.") for name in weights)
    assert all(torch.equal(tensor, expected_weights[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_is_the_same_to_the_bit(dropout: float, shards: Path, tmp_path: Path) -> None:
    """Losses, weights, moments and FP8 state, in CLM, then MLM, in steps of two micro-batches, with evaluations.

    Also after a restart without the change from a checkpoint with it.
    """
    held_out = {"shards": str(shards / "en"), "every": "2 steps", "sequences": 2}
    config = fp8(shards, precision="fp8", fp8_recipe="delayed", evaluation=held_out, dropout=dropout)
    # The second of three layers is local.
    shape = {"num_hidden_layers": 3, "global_attn_every_n_layers": 2, "attention_output_dropout": dropout}
    config = config.model_copy(update={"model": config.model.model_copy(update=shape)})
    calls, expected_calls = alone(_train_both_ways, config, tmp_path, not dropout)
    layers, micro_batches, evaluations, steps = 3, 2 * 3, 2 * 2, 3
    linears = 4 * layers
    products = {"fp8 product": linears * (3 * micro_batches + evaluations)}
    # Inputs and gradients, and the weights once per step and evaluation.
    quantizations = linears * (2 * micro_batches + evaluations + steps + evaluations)
    assert expected_calls == {"Float8Quantizer": quantizations, **products}
    # Left to cast are the input of the first qkv, those of proj in global layers, and the gradient of the last fc2.
    inputs, gradients = linears - 1 - 2, linears - 1
    # Dropout reads what fc2 multiplies and what proj has multiplied.
    dropped = layers if dropout else 0
    written = inputs * evaluations + (inputs + gradients - 2 * dropped) * micro_batches
    assert calls == {"Float8Quantizer": quantizations - written, **products}, "and no copy is transposed afterwards"
    assert_same_run(tmp_path / "casting", tmp_path / "plain")
    if not dropout:
        assert_same_run(tmp_path / "resumed", tmp_path / "plain")


def _check_all_kernels() -> None:
    from triton.runtime import interpreter

    with mock.patch.object(interpreter, "_convert_float", _round_as_a_gpu(interpreter._convert_float)):
        for rows, width in ((1, 8), (70, 72), (128, 64)):
            _check_kernels(rows, width)


def _check_kernels(rows: int, width: int) -> None:
    """Compare the kernels' bits with casts of what the kernels for BF16 write, both in Triton's interpreter."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor

    from benchmarks.changes import fp8_casts, fp8_ops
    from engine.modernbert.kernels.attention import LocalAttention
    from engine.modernbert.kernels.pointwise import AddAndNorm, GeGLU, Rotate

    def quantizers(scale: float, e5m2: bool = False, amax: float = 0.0) -> list[Any]:
        kind = DType.kFloat8E5M2 if e5m2 else DType.kFloat8E4M3
        return [Float8Quantizer(torch.tensor(scale), torch.tensor([amax]), kind) for _ in range(2)]

    def assert_same(found: Any, values: torch.Tensor, ours: Any, reference: Any) -> None:
        assert found.shape == values.shape and found.dtype == values.dtype
        expected = fp8_ops.cast(values, reference, type(found))
        for one, other in zip(found.get_data_tensors(), expected.get_data_tensors(), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(found.get_metadata()["fp8_scale_inv"], 1 / ours.scale.view(1))
        assert len(found.get_data_tensors()[0].unique()) > 5 or rows == 1
        assert torch.equal(ours.amax, reference.amax)

    def leaf(*shape: int) -> torch.Tensor:
        """Return values of many magnitudes: some underflow in FP8, and some saturate."""
        return (torch.randn(*shape) * 10 ** (4 * torch.rand(*shape) - 3)).bfloat16().requires_grad_()

    torch.manual_seed(rows)
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

    tokens, heads, dim = rows, 2, 16
    cos, sin = torch.rand(2, tokens, dim).bfloat16()
    states, gradient = leaf(tokens, 1, heads * 3 * dim), quantizers(2.0, e5m2=True)
    turned = fp8_ops.RotateByKernel.apply(states, heads, cos, sin, gradient[0])
    expected_turned = Rotate.apply(states.view(tokens, heads, 3, dim), cos, sin)
    assert all(torch.equal(*pair) for pair in zip(turned, expected_turned, strict=True))
    given = [leaf(tokens, heads, dim).detach() for _ in range(3)]
    grads = [torch.autograd.grad(outputs, states, given)[0] for outputs in (turned, expected_turned)]
    assert_same(*grads, *gradient)

    # Attention in fp32, because the interpreter multiplies no BF16.
    qkv = torch.randn(tokens, 1, heads * 3 * dim, requires_grad=True)
    documents = (torch.arange(tokens, dtype=torch.int32) * 3 // tokens).int()
    result, gradient = quantizers(300.0), quantizers(3000.0, e5m2=True)
    settings = (heads, cos.float(), sin.float(), documents, (20, 5), result[0], gradient[0])
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


def _served() -> list[bool]:
    from benchmarks.changes.fp8_casts import can_cast

    served = {"fp8": "hybrid", "fp8_recipe": "delayed", "tensor_model_parallel_size": 1, "recompute_granularity": None}
    others = {"fp8": None, "fp8_recipe": "tensorwise", "tensor_model_parallel_size": 2, "recompute_granularity": "full"}
    changed = [{**served, key: value} for key, value in others.items()]
    return [can_cast(SimpleNamespace(**config)) for config in (served, *changed)]  # type: ignore[arg-type]


def _check_all() -> None:
    """Other recipes, tensor parallelism and recomputation take the ordinary path."""
    assert _served() == [True, False, False, False, False]
    _check_all_kernels()


def test_the_kernels_write_the_bits_of_a_cast() -> None:
    pytest.importorskip("triton")
    alone(_check_all)
