"""The call of flash-attn-4, received by a stand-in with the signature of its release 4.0.0b36, in torch."""

from __future__ import annotations

import sys
import types
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.errors import InputError
from engine.modernbert.attention import PackedDocuments
from engine.modernbert.attention_kernels import BlockedAttention, FlashAttention4
from engine.modernbert.model import transformer_config
from tests.engine.test_parity import build

pytestmark = pytest.mark.usefixtures("alone")
LENGTHS = (40, 3, 17)


def stand_in(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    deterministic: bool = False,
) -> tuple[Tensor, None]:
    """Attention by its documentation: per document, a causal or windowed mask aligned with the last key."""
    assert cu_seqlens_q is not None and cu_seqlens_k is not None and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == int(cu_seqlens_q.diff().max()) and max_seqlen_k == int(cu_seqlens_k.diff().max())
    outputs = []
    for q_bounds, k_bounds in zip(cu_seqlens_q.unfold(0, 2, 1), cu_seqlens_k.unfold(0, 2, 1), strict=True):
        query, (key, value) = q[slice(*q_bounds)], (x[slice(*k_bounds)] for x in (k, v))
        last = len(key) - len(query)
        distance = torch.arange(len(query))[:, None] + last - torch.arange(len(key))[None, :]
        left, right = window_size[0], 0 if causal else window_size[1]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        hidden |= distance > left if left is not None else False
        hidden |= -distance > right if right is not None else False
        scores = torch.einsum("qhd,khd->hqk", query, key) * (softmax_scale or q.shape[-1] ** -0.5)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value))
    return torch.cat(outputs), None


@pytest.fixture()
def _installed() -> Any:
    module: Any = types.ModuleType("flash_attn.cute")
    module.flash_attn_varlen_func = stand_in
    with mock.patch.dict(sys.modules, {"flash_attn": types.ModuleType("flash_attn"), "flash_attn.cute": module}):
        yield


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("layer", [1, 2], ids=["global", "local"])
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "labels alone"])
def test_equals_blocked_attention_with_its_gradients(layer: int, kind: str) -> None:
    if (layer, kind) == (2, "labels alone"):
        pytest.skip("a local layer computes all tokens")
    config = transformer_config(build()[2])
    labels = np.array([1, 30, 50]) if kind == "labels alone" else None
    packed = PackedDocuments.from_lengths(LENGTHS, kind == "causal", torch.device("cpu"), None, labels)
    packed = packed if labels is None else packed.at_queries()
    generator = torch.Generator().manual_seed(0)
    qkv, angles = torch.randn(60, 2, 3, 8, generator=generator), torch.randn(60, 4, generator=generator).repeat(1, 2)
    found = []
    for kernel in (FlashAttention4, BlockedAttention):
        states = qkv.clone().requires_grad_()
        output = kernel(config, layer)(states, angles.cos(), angles.sin(), packed)
        (output * output.detach().roll(1, 0)).sum().backward()
        found.append((output.detach(), states.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_names_the_package_that_is_missing() -> None:
    with mock.patch.dict(sys.modules, {"flash_attn": None}), pytest.raises(InputError) as caught:
        FlashAttention4(transformer_config(build()[2]), 1)
    assert caught.value.key == "attention"
