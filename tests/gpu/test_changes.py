"""The changes that the benchmark measures, in short runs on a GPU: the losses stay those of the run without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.changes import CHANGES
from configs.schema import RunConfig
from datapipe.prepare import ensure_prepared
from datapipe.tokenizer import load_tokenizer
from monitoring.log import read_metrics
from tests.engine.world import run_world, toy_config, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with Transformer Engine"),
]


def _train_with_the_other(name: str, config: RunConfig, directory: Path) -> None:
    with CHANGES[name].other():
        train(config, directory)


@pytest.mark.parametrize("name", CHANGES)
def test_losses_stay(name: str, tmp_path: Path) -> None:
    """In BF16, or in FP8 where the change is one of FP8; three causal and two bidirectional steps."""
    if name == "flash-attn-4":
        pytest.importorskip("flash_attn.cute")
    model = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    precision = {"precision": "fp8", "fp8_recipe": "delayed"} if "FP8" in name else {"precision": "bf16"}
    config, other = (
        toy_config(tmp_path, model=model, batch={"sequences": 4, "micro": 2}, **precision, **settings)
        for settings in ({}, CHANGES[name].settings or {})
    )
    ensure_prepared(config.data, load_tokenizer(config.tokenizer))
    losses = []
    for number, (function, arguments) in enumerate(((train, (config,)), (_train_with_the_other, (name, other)))):
        directory = tmp_path / str(number)
        directory.mkdir()
        run_world(1, function, *arguments, directory)
        losses.append([line["loss"] for line in read_metrics(directory)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
