"""Phases and learning rates by step, the FLOP count, and layouts that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ModernBertConfig, ModernBertForMaskedLM

from configs.errors import InputError
from configs.load import load_config
from datapipe.tokenizer import load_tokenizer
from engine.flops import training_flops
from engine.modernbert.config import parameter_count, resolve_architecture
from engine.parallel import plan
from engine.schedule import PhaseSchedule
from tests.engine.world import toy_config


def test_learning_rate_of_the_paper() -> None:
    """Warmup and plateau, then 1-sqrt from 2e-4 to 2e-5, restarted at the switch."""
    schedule = PhaseSchedule(load_config("modernbert-base-bio-en"))
    assert [(span.first, span.last) for span in schedule.spans] == [(0, 15895), (15895, 17484)]
    assert schedule.learning_rate(0) == pytest.approx(2e-4 / 32)
    assert schedule.learning_rate(31) == schedule.learning_rate(15894) == 2e-4
    assert schedule.learning_rate(15895) == pytest.approx(2e-4 * (1 - 0.9 * (1 / 1589) ** 0.5))
    assert schedule.learning_rate(15895 + 1588) == pytest.approx(2e-5)


@pytest.mark.parametrize(
    ("shape", "middle"), [("constant", 1.0), ("linear", 0.6), ("cosine", 0.6), ("1-sqrt", 1 - 0.8 * 0.5**0.5)]
)
def test_shapes_reach_their_end_at_the_last_step(shape: str, middle: float, tmp_path: Path) -> None:
    lr = {"warmup": "2 steps", "shape": shape, "final": 0.2}
    schedule = PhaseSchedule(toy_config(tmp_path, phases=[{"objective": "clm", "steps": 12, "lr": lr}]))
    peak = schedule.peak(schedule.spans[0])
    assert schedule.learning_rate(1) == peak
    assert schedule.learning_rate(6) == pytest.approx(peak * middle)
    assert schedule.learning_rate(11) == pytest.approx(peak * (1.0 if shape == "constant" else 0.2))
    rates = [schedule.learning_rate(step) for step in range(2, 12)]
    assert rates == sorted(rates, reverse=True)


def test_flops_of_full_attention_equal_torchs_count() -> None:
    """Torch counts the same products for one document, global layers, and labels at all positions."""
    architecture = ModernBertConfig(
        vocab_size=500,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        layer_types=["full_attention"] * 3,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = ModernBertForMaskedLM(architecture)
    ids = torch.randint(1, 500, (1, 100))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    counted = counter.get_total_flops()
    assert training_flops(architecture, [100], 100, causal=False) == counted
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(architecture)


def test_flops_leave_out_what_a_global_last_layer_does_not_compute() -> None:
    shape: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 4}
    architecture = ModernBertConfig(**shape, num_hidden_layers=1, layer_types=["full_attention"])
    assert training_flops(architecture, [60], 0, causal=False) == 3 * 2 * 60 * 3 * 48 * 48  # the product of qkv remains
    whole, half = (training_flops(architecture, [60], count, causal=False) for count in (60, 30))
    assert half - training_flops(architecture, [60], 0, causal=False) == whole - half


@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_attention_equal_the_pairs_that_see_each_other(causal: bool) -> None:
    architecture = ModernBertConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=5, local_attention=6)
    lengths = [1, 3, 4, 9, 40]
    empty = training_flops(architecture, [1] * sum(lengths), 0, causal)  # each token sees itself alone
    pairs = 0
    for kind in architecture.layer_types:
        for length in lengths:
            place = torch.arange(length)
            distance = place[:, None] - place[None, :]
            seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
            if kind == "sliding_attention":
                seen &= distance.abs() <= 3
            pairs += int(seen.sum()) - length
    expected = empty + 3 * 4 * 48 * pairs
    assert training_flops(architecture, lengths, 0, causal) == expected


@pytest.mark.parametrize(
    ("changes", "workers", "key", "number"),
    [
        ({"parallel": {"tensor": 8}}, 8, "parallel.tensor", "4"),
        ({"parallel": {"pipeline": 3}}, 3, "parallel.pipeline", "4"),
        ({"parallel": {"tensor": 2, "pipeline": 2}}, 6, "cluster.workers_per_node", "6"),
        ({}, 3, "data.streams", "[1, 2, 4]"),
        ({"batch": {"micro": 3}}, 1, "batch.micro", "8"),
        ({"data": {"sequence_length": 16384}}, 1, "data.sequence_length", "16384"),
        (
            {"precision": "fp8", "data": {"sequence_length": 100}, "batch": {"micro": 1}},
            1,
            "data.sequence_length",
            "16",
        ),
        ({"phases": [{"objective": "clm", "steps": 1, "freeze": [9]}]}, 1, "phases.0.freeze", "[9]"),
    ],
)
def test_a_key_that_does_not_fit_is_named(
    changes: dict[str, Any], workers: int, key: str, number: str, tmp_path: Path
) -> None:
    config = toy_config(tmp_path, **changes)
    architecture = resolve_architecture(config.model, load_tokenizer(config.tokenizer))
    with pytest.raises(InputError) as error:
        plan(config, architecture, workers)
    assert error.value.key == key
    assert number in str(error.value)
