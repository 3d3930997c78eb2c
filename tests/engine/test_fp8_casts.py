"""Whole runs whose operations write FP8, on a CPU by `te_on_cpu`; `test_fp8_kernels` has the kernels.

Needs Transformer Engine's Python package, as `test_transformer_engine` does.
"""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def _served() -> list[bool]:
    from benchmarks.changes.fp8_casts import can_cast

    served = {"fp8": "hybrid", "fp8_recipe": "delayed", "tensor_model_parallel_size": 1, "recompute_granularity": None}
    others = {"fp8": None, "fp8_recipe": "tensorwise", "tensor_model_parallel_size": 2, "recompute_granularity": "full"}
    changed = [{**served, key: value} for key, value in others.items()]
    return [can_cast(SimpleNamespace(**config)) for config in (served, *changed)]  # type: ignore[arg-type]


def test_other_models_take_the_ordinary_path() -> None:
    """Other recipes, tensor parallelism and recomputation."""
    assert alone(_served) == [True, False, False, False, False]
