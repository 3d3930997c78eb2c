"""The linear layers without Transformer Engine, against torch's autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.modernbert.linears import PlainColumnLinear, PlainRowLinear
from engine.modernbert.model import transformer_config
from tests.engine.test_parity import build

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_product_and_gradients(kind: str, summed: bool) -> None:
    """Check that each micro-batch's gradient is added to Megatron's fp32 sum, if there is one, and its mark is set."""
    config = transformer_config(build()[2], dtype=torch.bfloat16, gradient_accumulation_fusion=True)
    more = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False}
    layer = (
        PlainColumnLinear(64, 96, gather_output=False, **more)
        if kind == "column"
        else PlainRowLinear(64, 96, input_is_parallel=True, **more)
    )
    weight = layer.weight
    torch.nn.init.normal_(weight)
    if summed:
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones(96, 64), False
    expected = torch.zeros(96, 64)
    for _ in range(2):
        states = torch.randn(48, 1, 64, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(48, 1, 96, dtype=torch.bfloat16)
        output, bias = layer(states)
        output.backward(grad)
        assert bias is None and torch.equal(output, F.linear(states, weight))
        assert torch.equal(states.grad, grad @ weight)
        expected += grad[:, 0].float().t() @ states.detach()[:, 0].float()
    if summed:
        torch.testing.assert_close(weight.main_grad, expected + 1)
        assert weight.grad_added_to_main_grad
    else:
        torch.testing.assert_close(weight.grad.float(), expected, rtol=2e-2, atol=0.2)
