"""The elements that dropout drops, against NumPy and transformers, and the settings of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ModernBertConfig

from configs.errors import InputError
from configs.load import validate
from configs.schema import RunConfig
from datapipe.batch import Origin
from datapipe.targets import mix, position_hashes
from datapipe.tokenizer import load_tokenizer
from engine.modernbert import ops
from engine.modernbert.attention import PackedDocuments
from engine.modernbert.config import DropoutRates, resolve_architecture, resolve_dropout
from engine.modernbert.dropout import Dropout
from tests.engine.test_parity import build
from tests.engine.world import toy_config

RATES = DropoutRates(seed=17, embedding=0.05, attention_output=0.1, mlp=0.2)
CPU = torch.device("cpu")


def test_the_bits_are_those_of_uint32_arithmetic() -> None:
    keys = position_hashes(np.array([3], np.uint32), np.arange(50, dtype=np.uint32))
    channels = np.arange(1000, 1070, dtype=np.uint32) * np.uint32(0x9E3779B9)
    hashes = mix(mix(keys ^ np.uint32(0xDEADBEEF))[:, None] + channels)
    found = ops.dropped_elements(torch.from_numpy(keys.view(np.int32)), 0xDEADBEEF, 1000, 70, 0.3)
    assert np.array_equal(found.numpy(), hashes < np.uint32(round(0.3 * 2**32)))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_rate_and_independence(rate: float) -> None:
    """Rows, positions, sites and channels drop at the rate, and each independently of the others."""
    dropout = Dropout.of_rows(RATES, [Origin(2, 5, ()), Origin(2, 6, ())], 16384, CPU)
    sites = [ops.dropped_elements(dropout.keys, site, 0, 768, rate).float() for site in (1, 2)]
    both = torch.stack([*sites[0].chunk(2), *sites[1].chunk(2)]) - rate
    assert both.mean(dim=(1, 2)).abs().max() < 1e-3
    share = (both.flatten(1) @ both.flatten(1).T) / both[0].numel() / (rate * (1 - rate))
    assert (share - torch.eye(4)).abs().max() < 0.02
    shifted = [(both[0, :-1] * both[0, 1:]).mean(), (both[0, :, :-1] * both[0, :, 1:]).mean()]
    assert max(abs(float(mean)) for mean in shifted) < 0.01 * rate


def test_the_gradient_flows_through_kept_elements_alone() -> None:
    states = torch.randn(40, 1, 24, requires_grad=True)
    keys = torch.arange(40, dtype=torch.int32)
    output = ops.drop(states, keys, 9, 0, 0.25)
    (gradient,) = torch.autograd.grad(output.sum(), states)
    zeros = ops.dropped_elements(keys, 9, 0, 24, 0.25)[:, None]
    assert 0.1 < zeros.float().mean() < 0.4
    torch.testing.assert_close(output, torch.where(zeros, 0.0, states / 0.75))
    torch.testing.assert_close(gradient, torch.where(zeros, 0.0, torch.tensor(1 / 0.75)).expand_as(states))


class Masked(torch.nn.Module):
    """Stands in for transformers' dropout modules, and drops what Detour drops."""

    def __init__(self, drop: Any) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, states: Tensor) -> Tensor:
        return torch.as_tensor(self.drop(states.transpose(0, 1))).transpose(0, 1)


@pytest.mark.usefixtures("alone")
def test_transformers_with_the_same_masks_computes_the_same() -> None:
    theirs, ours, architecture = build()
    ids = torch.randint(0, architecture.vocab_size, (120,), generator=torch.Generator().manual_seed(1))
    dropout = Dropout.of_rows(RATES, [Origin(3, 7, ())], len(ids), CPU)
    theirs.model.embeddings.drop = Masked(dropout.on_embedding)
    for number, layer in enumerate(theirs.model.layers, 1):
        layer.attn.out_drop = Masked(lambda x, n=number: dropout.on_attention_output(x, n))
        layer.mlp.drop = Masked(lambda x, n=number: dropout.on_gated_states(x, n))
    found = ours(ids[None], PackedDocuments.from_lengths((120,), False, CPU, dropout))[:, : architecture.vocab_size]
    expected, undropped = theirs(ids[None]).logits[0], ours(ids[None], PackedDocuments.from_lengths((120,), False, CPU))
    assert (found - expected).abs().max() <= 1e-4
    assert (found - undropped[:, : architecture.vocab_size]).abs().max() > 0.1
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    mine, other = ours.embedding.word_embeddings.weight.grad, theirs.model.embeddings.tok_embeddings.weight.grad
    assert mine is not None and other is not None
    assert (mine[: len(other)] - other).abs().max() <= 1e-4 * other.abs().max()


def test_rates_of_the_recipe_come_before_those_of_the_file() -> None:
    tree = toy_config(Path("shards")).model_dump(mode="json", exclude_none=True)

    def rates(file: dict[str, Any], **model: float) -> Any:
        config = validate(RunConfig, tree | {"model": tree["model"] | model}, "toy")
        return resolve_dropout(config, ModernBertConfig(**file))

    assert rates({}) is None
    assert rates({"mlp_dropout": 0.1}) == (17, 0.0, 0.0, 0.1)
    assert rates({"mlp_dropout": 0.1}, mlp_dropout=0.0) is None
    assert rates({}, attention_output_dropout=0.1, embedding_dropout=0.2) == (17, 0.2, 0.1, 0.0)


def test_dropout_stays_out_of_the_exported_configuration() -> None:
    rates = {"mlp_dropout": 0.2, "embedding_dropout": 0.1, "attention_output_dropout": 0.1}
    config = toy_config(Path("shards"), model=rates)
    architecture = resolve_architecture(config.model, load_tokenizer(config.tokenizer)).to_dict()
    assert (architecture["mlp_dropout"], architecture["embedding_dropout"]) == (0.0, 0.0)
    assert "attention_output_dropout" not in architecture


@pytest.mark.parametrize("key", ["attention_dropout", "attention_output_dropout", "embedding_dropout", "mlp_dropout"])
def test_a_rate_is_a_share_below_one(key: str) -> None:
    with pytest.raises(InputError) as error:
        toy_config(Path("shards"), model={key: 1.0})
    assert f"model.{key}" in str(error.value)


def test_dropout_on_attention_weights_is_refused() -> None:
    config = toy_config(Path("shards"), model={"attention_dropout": 0.1})
    with pytest.raises(InputError) as error:
        resolve_architecture(config.model, load_tokenizer(config.tokenizer))
    assert (error.value.key, error.value.code) == ("model.attention_dropout", "dropout-on-attention-weights")
    assert "model.attention_output_dropout=0.1" in str(error.value)
