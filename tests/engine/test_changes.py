"""The changes that only a GPU can judge compute what the engine computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from megatron.core.transformer.mlp import MLPSubmodules
from torch import Tensor

from engine.modernbert.layers import GatedMLP
from engine.modernbert.linears import PlainColumnLinear, PlainRowLinear
from engine.modernbert.model import transformer_config
from tests.engine.test_kernels import DEVICE, ON_GPU, near
from tests.engine.test_parity import build

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("alone")

from benchmarks.changes import geglu_products, tuned_products  # noqa: E402
from benchmarks.changes.geglu_products import FusedMLP  # noqa: E402

DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # Triton's interpreter multiplies no BF16


def mlp(kind: type, hidden: int, width: int) -> GatedMLP:
    config = transformer_config(
        build(hidden_size=hidden, intermediate_size=width)[2], dtype=torch.bfloat16, gradient_accumulation_fusion=True
    )
    torch.manual_seed(0)
    layer = kind(config, MLPSubmodules(linear_fc1=PlainColumnLinear, linear_fc2=PlainRowLinear)).to(DEVICE, DTYPE)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.2)
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device=DEVICE), False
    return layer


def passes(layer: GatedMLP, tokens: tuple[int, ...], drop: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Outputs and the input's gradients of micro-batches, and both weights' sums of gradients."""
    torch.manual_seed(1)
    results = []
    for count in tokens:
        states = torch.randn(count, 1, 192, dtype=DTYPE, device=DEVICE, requires_grad=True)
        output, bias = layer(states, drop)
        output.backward(torch.randn_like(output))
        assert bias is None
        results += [output, states.grad]
    assert all(weight.grad_added_to_main_grad for weight in layer.parameters())
    return [*results, *(weight.main_grad for weight in layer.parameters())]


def all_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        near(one, other.cpu(), 1e-2 if ON_GPU else 1e-5)


@pytest.mark.parametrize("drop", [None, partial(torch.mul, 2.0)])
def test_geglu_in_products(drop: Callable[[Tensor], Tensor] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With edges inside the tiles of every axis."""
    if not ON_GPU:
        for kernel in (geglu_products._linear_and_gate, geglu_products._gate_gradient):
            monkeypatch.setattr(kernel, "configs", kernel.configs[:1])  # the interpreter times nothing
    all_near(*(passes(mlp(kind, 192, 136), (128, 200), drop) for kind in (FusedMLP, GatedMLP)))


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_products_by_shape() -> None:
    """The second micro-batch has fewer rows, as the model's last layer has."""
    layer = partial(mlp, GatedMLP, 192, 136)
    expected = passes(layer(), (128, 40, 128))
    with tuned_products.by_shape():
        all_near(passes(layer(), (128, 40, 128)), expected)
    assert tuned_products._multiply.rows == tuned_products._add_multiplied.rows == 128
