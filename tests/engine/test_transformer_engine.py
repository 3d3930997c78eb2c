"""Transformer Engine's layers and FP8 recipes on a CPU, by `te_on_cpu`: parity, what is quantized, exact resuming.

Needs Transformer Engine's Python package alone, in the directory that TE_PYTHON names; `.ci/run` fetches it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from engine.checkpoint import step_directory
from monitoring.log import read_metrics
from tests.engine.world import run_world, stored, toy_config, train

pytestmark = pytest.mark.skipif("TE_PYTHON" not in os.environ, reason="TE_PYTHON names no directory")
LENGTHS = (300, 40, 5, 5, 34)


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process that has Transformer Engine; its result."""
    (result,) = run_world(1, _with_transformer_engine, function, *args, fresh=True)
    return result


def _with_transformer_engine(function: Callable[..., Any], *args: Any) -> Any:
    from tests.engine import te_on_cpu

    te_on_cpu.install(Path(os.environ["TE_PYTHON"]))
    from engine import build, precision
    from engine.modernbert import layers
    from engine.modernbert.attention_kernels import BlockedAttention

    layers.FlashAttention = layers.TransformerEngineAttention = BlockedAttention  # type: ignore[misc, assignment]
    precision._require_fp8 = lambda recipe, capability: None
    bare = build.ModernBert
    build.ModernBert = lambda *args, **more: bare(*args, **{**more, "transformer_engine": True})  # type: ignore
    config = build.transformer_config
    build.transformer_config = lambda *args, **more: config(*args, **{**more, "gradient_accumulation_fusion": True})
    return function(*args)


def _differences() -> dict[tuple[str, bool], float]:
    """Largest difference of the logits from Hugging Face's, relative to the largest of them, by dtype and causality."""
    import torch

    from engine.modernbert.attention import PackedDocuments
    from engine.modernbert.convert import load_weights
    from engine.modernbert.model import ModernBert, transformer_config
    from engine.parallel import Layout, initialise
    from tests.engine.test_parity import build, their_logits

    initialise(Layout(1, 1, 1, False, ()), seed=0)
    theirs, _, architecture = build()
    state = theirs.state_dict()
    ids = torch.randint(0, architecture.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = ModernBert(transformer_config(architecture, dtype=dtype), architecture, transformer_engine=True).eval()
        load_weights(model, lambda name: state[name])
        for causal in (False, True):
            packed = PackedDocuments.from_lengths(LENGTHS, causal, ids.device)
            with torch.no_grad():
                expected = torch.cat([their_logits(theirs, document, causal) for document in ids.split(LENGTHS)])
                logits = model(ids[None], packed)[:, : architecture.vocab_size].float()
            found[str(dtype), causal] = float((logits - expected).abs().max() / expected.abs().max())
    return found


def test_logits_equal_hugging_face() -> None:
    for (dtype, causal), difference in alone(_differences).items():
        assert difference <= {"torch.float32": 1e-5, "torch.bfloat16": 2e-2}[dtype], (dtype, causal)


def _train(config: RunConfig, directory: Path) -> dict[str, int]:
    """Train to the end; what was quantized and multiplied."""
    from engine.trainer import train
    from tests.engine.te_on_cpu import CALLS

    directory.mkdir(exist_ok=True)
    assert train(config, directory).finished
    return dict(CALLS)


def fp8(shards: Path, *, dropout: float = 0.0, evaluation: Any = None, **changes: Any) -> RunConfig:
    """A run as short as it gets: a CPU without AMX multiplies the vocabulary in BF16 very slowly.

    Its last layer is global, so that in MLM it computes the labels alone, in FP8 as well.
    """
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "global_attn_every_n_layers": 1}
    tree = {
        "model": {**shape, "mlp_dropout": dropout},
        "data": {"sequence_length": 64, "evaluation": evaluation},
        "batch": {"sequences": 4, "micro": 2},
        "phases": [{"objective": "clm", "steps": 2}, {"objective": "mlm", "steps": 1}],
        "checkpoint": {"every": "1 steps", "keep": 9},
    }
    return toy_config(shards, **tree, **changes)


def test_its_layers_train_as_megatrons_own(shards: Path, tmp_path: Path) -> None:
    """In fp32. Each goes on from the other's checkpoint."""
    config = fp8(shards, precision="fp32")
    engines, ours = tmp_path / "engines", tmp_path / "ours"
    ours.mkdir()
    alone(_train, config, engines)
    run_world(1, train, config, ours)
    for found, expected in zip(read_metrics(engines), read_metrics(ours), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    weights, expected_weights = stored(engines, 3), stored(ours, 3)
    assert weights.keys() == expected_weights.keys()
    assert all((tensor - expected_weights[name]).abs().max() <= 1e-5 for name, tensor in weights.items())
    for start, go_on in ((ours, partial(alone, _train)), (engines, partial(run_world, 1, train))):
        other = start.with_suffix(".other")
        shutil.copytree(start, other)
        shutil.rmtree(step_directory(other / "checkpoints", 3))
        go_on(config, other)
        assert read_metrics(other)[2]["loss"] == pytest.approx(read_metrics(ours)[2]["loss"])
        assert all((tensor - expected_weights[name]).abs().max() <= 1e-5 for name, tensor in stored(other, 3).items())


@pytest.fixture(scope="module")
def bf16_losses(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    directory = tmp_path_factory.mktemp("bf16")
    assert alone(_train_all_in_its_layers, fp8(shards, precision="bf16"), directory).keys() == {"plain product"}
    return [line["loss"] for line in read_metrics(directory)]


def _train_all_in_its_layers(config: RunConfig, directory: Path) -> dict[str, int]:
    from engine.modernbert import layers

    layers.takes_plain_linears = lambda config: False  # type: ignore[assignment]
    return _train(config, directory)


def test_bf16_without_its_layers_trains_the_same(shards: Path, bf16_losses: list[float], tmp_path: Path) -> None:
    """Steps with two micro-batches, so that gradients add up."""
    assert not alone(_train, fp8(shards, precision="bf16"), tmp_path)
    assert [line["loss"] for line in read_metrics(tmp_path)] == pytest.approx(bf16_losses, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "quantizer"),
    [
        ("delayed", "Float8Quantizer"),
        ("tensorwise", "Float8CurrentScalingQuantizer"),
        ("blockwise", "Float8BlockQuantizer"),
    ],
)
def test_fp8_follows_bf16_and_resumes_exactly(
    recipe: str, quantizer: str, shards: Path, bf16_losses: list[float], tmp_path: Path
) -> None:
    config = fp8(shards, precision="fp8", fp8_recipe=recipe)
    whole, again = tmp_path / "whole", tmp_path / "again"
    # Forward, and the gradients of input and weight, of 4 linear layers in 2 blocks, in 2 micro-batches of 3 steps.
    products = {"fp8 product": 3 * 4 * 2 * 2 * 3}
    calls = alone(_train, config, whole)
    assert calls.pop(quantizer) > 0 and calls == products, "all products of the layers are in FP8, by this quantizer"
    assert [line["loss"] for line in read_metrics(whole)] == pytest.approx(bf16_losses, rel=0.01)

    shutil.copytree(whole, again)
    for path in (again / "checkpoints").glob("step-0000000[23]"):
        shutil.rmtree(path)
    alone(_train, config, again)
    lines = [{key: line[key] for key in ("step", "loss", "grad_norm")} for line in read_metrics(again)]
    assert lines == [{key: line[key] for key in lines[0]} for line in read_metrics(whole)]
