"""The formulas of a plan, against counted collectives, Megatron's own buckets, and the measured rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ModernBertConfig

from configs.errors import InputError
from configs.load import changes_of_run, validate
from configs.schema import RunConfig
from datapipe.batch import IGNORE, MicroBatch, Origin
from engine.build import BUCKET_PARAMETERS, build_model
from engine.checkpoint import expired, step_directory
from engine.megatron import ddp_timing
from engine.megatron.fake_world import fake_world
from engine.megatron.optimizer import FrozenWeights, build_optimizer
from engine.modernbert.config import DropoutRates, parameter_count
from engine.parallel import Layout, initialise, single_process
from engine.planning.memory import Memory, step_memory
from engine.planning.plan import Plan, make_plan
from engine.planning.speed import measured
from engine.planning.stages import Stage, build_stages
from engine.planning.traffic import StepShape, transfers
from engine.step import DeviceBatch, StepRunner, to_device_batch
from tests.engine.collectives import CollectiveCounter, Counted

TINY = ModernBertConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8, pad_token_id=0
)
BASE = ModernBertConfig()
LENGTH = 32
"""Tokens of a test's packed sequence."""


def recipe(sequences: int = 8, length: int = LENGTH, **changes: Any) -> RunConfig:
    tree = {
        "name": "planned",
        "model": {"size": "tiny"},
        "tokenizer": "package://tokenizer/modernbert",
        "data": {"sequence_length": length, "streams": 1, "sources": [{"name": "a", "shards": "a"}]},
        "batch": {"sequences": sequences},
        "phases": [{"objective": "clm", "steps": 1}],
        **changes,
    }
    return validate(RunConfig, tree, "planned")


def batch(dropout: DropoutRates | None = None) -> DeviceBatch:
    ids = np.random.default_rng(0).integers(5, 900, LENGTH)
    labels = np.append(ids[1:], IGNORE)
    ends = np.array([0, LENGTH // 2, LENGTH], np.int32)
    return to_device_batch(MicroBatch(ids, labels, ends, LENGTH, "clm", (Origin(0, 0, ()),)), dropout)


def counted_step(config: RunConfig, layout: Layout, rank: int, micro_batches: int) -> Counter[Counted]:
    """Count one rank's second step."""
    with fake_world(layout.workers, rank):
        initialise(layout, config.seed)
        model, ddp_model = build_model(TINY, layout, "fp32", config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        optimizer = build_optimizer([ddp_model], config.optimizer, torch.float32)
        model.config.grad_scale_func = optimizer.scale_loss
        waits, frozen = ddp_timing.install(ddp_model), FrozenWeights(model, optimizer)
        runner = StepRunner(model, ddp_model, optimizer, waits, config.optimizer, frozen, lambda: None)
        data = [batch()] * micro_batches
        runner.optimizer_step(runner.forward_backward(data)[0])
        with CollectiveCounter(smallest=TINY.hidden_size) as counter:
            runner.optimizer_step(runner.forward_backward(data)[0])
    return counter.calls


@pytest.mark.parametrize(
    ("workers", "tensor", "pipeline", "sequence", "recompute"),
    [
        (8, 2, 2, False, "full"),
        (64, 2, 1, True, "full"),
        (64, 4, 2, True, "none"),
        (512, 8, 2, False, "none"),
    ],
)
def test_counted_collectives_equal_the_formula(
    workers: int, tensor: int, pipeline: int, sequence: bool, recompute: str
) -> None:
    config = recipe(batch={"sequences": 8, "micro": 1, "recompute": recompute})
    layout = Layout(tensor, pipeline, workers // tensor // pipeline, sequence, (1,))
    step = StepShape(micro_batches=3, tokens=LENGTH, labels=LENGTH - 1)
    for stage in build_stages(config, TINY, layout):
        if 0 < stage.index < pipeline - 2 or (workers == 512 and stage.is_last):
            continue  # stages between the first and the last are alike; making the groups of 512 ranks takes seconds
        expected: Counter[Counted] = Counter()
        for sent in transfers(TINY, layout, stage, step, weight_bytes=4, recompute=recompute == "full"):
            expected[sent.kind, sent.operation, sent.elements, sent.element_bytes, sent.ranks] += sent.calls
        rank = stage.index * layout.tensor * layout.data
        assert counted_step(config, layout, rank, step.micro_batches) == expected, stage


@pytest.mark.parametrize("ranks", [64, 256])
def test_little_but_the_tied_embedding_is_left_to_reduce_when_backward_ends(ranks: int) -> None:
    (stage,) = build_stages(recipe(), BASE, Layout(1, 1, ranks, False, (1,)))
    assert len(stage.buckets) >= 4
    *_behind_backward, last, embedding = stage.buckets
    assert embedding == pytest.approx(stage.embedding, abs=ranks * 128)
    assert last < BUCKET_PARAMETERS + 5e6
    assert last <= 0.1 * stage.elements
    assert stage.elements == pytest.approx(parameter_count(BASE), rel=1e-3)


def passes(recompute: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the loss of one micro-batch with dropout, its gradients, and how many elements the forward pass kept."""
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with single_process():
        config = recipe(batch={"sequences": 8, "recompute": recompute})
        model, ddp_model = build_model(TINY, Layout(1, 1, 1, False, (1,)), "fp32", config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1, generator=generator)
        data = batch(DropoutRates(3, 0.1, 0.1, 0.1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = ddp_model(data.inputs, data.documents, data.label_positions, data.labels)[0]
        loss.backward()
        return loss.detach(), torch.cat([buffer.grad_data for buffer in ddp_model.buffers]), sum(kept)


def test_recomputed_layers_give_the_same_loss_and_gradients() -> None:
    loss, gradients, kept = passes("none")
    again, gradients_again, kept_again = passes("full")
    assert torch.equal(loss, again)
    assert torch.equal(gradients, gradients_again)
    assert gradients.abs().sum() > 0
    assert kept_again < 0.7 * kept


def test_recomputation_may_change_at_a_resume() -> None:
    before, after = recipe(), recipe(batch={"sequences": 8, "recompute": "full"})
    assert before != after
    assert changes_of_run(before, after) == []


def shape(name: str) -> tuple[ModernBertConfig, Stage]:
    """A measured model as one GPU holds it."""
    row = next(row for row in measured()["rows"] if row["name"].startswith(name))
    architecture = ModernBertConfig(
        hidden_size=row["hidden"],
        intermediate_size=row["inner"],
        num_hidden_layers=row["layers"],
        num_attention_heads=row["heads"],
    )
    embedding = architecture.vocab_size * architecture.hidden_size
    count = parameter_count(architecture)
    return architecture, Stage(0, row["layers"], True, True, 0, embedding, (count - embedding, embedding))


def memory(name: str, rows: int, recompute: bool = False) -> Memory:
    architecture, stage = shape(name)
    layout = Layout(1, 1, 1, False, (1,))
    return step_memory(architecture, layout, stage, rows * 8192, 1.0, 1, width=2, recompute=recompute)


def test_memory_agrees_with_the_measured_sizes() -> None:
    """`benchmarks/results/gpu-2026-11-26.md`: 59 GB of state, 16 rows of base on 80 GB, and 3B does not fit there."""
    gpu = measured()["memory_bytes"]
    assert memory("3B", 1).state == pytest.approx(59e9, rel=0.02)
    assert memory("base CLM", 16).total < 0.9 * gpu
    assert memory("3B", 1).total > gpu > memory("3B", 1, recompute=True).total
    assert memory("base CLM", 16).activations == pytest.approx(16 * 3.5e9, rel=0.05)


def plan_of(name: str, sequences: int, **changes: Any) -> Plan:
    architecture, _ = shape(name)
    config = recipe(sequences, 8192, **changes)
    return make_plan(config, architecture, Layout(1, 1, 1, False, (1,)), 1, 1, "bf16")


@pytest.mark.parametrize("name", ["base CLM", "base MLM", "large CLM"])
def test_a_measured_row_is_planned_as_it_was_measured(name: str) -> None:
    row = next(row for row in measured()["rows"] if row["name"].startswith(name))
    (phase,) = plan_of(name, 16, phases=[{"objective": row["objective"], "steps": 1}]).phases
    assert phase.speed.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=0.01)
    assert (phase.micro, phase.speed.extrapolated) == (row["sequences"], ())


@pytest.mark.parametrize("checkpoint", [{"keep": 2, "every": "3 steps"}, {"every": "2 steps", "keep_every": 8}])
def test_the_disk_holds_all_checkpoints_that_are_kept(checkpoint: dict[str, Any]) -> None:
    phases = [{"objective": "clm", "steps": 16}, {"objective": "mlm", "steps": 24, "lr": {"warmup": "1 steps"}}]
    plan = plan_of("base CLM", 16, phases=phases, checkpoint=checkpoint)
    config = recipe(16, 8192, phases=phases, checkpoint=checkpoint)
    every = config.checkpoint.every.value
    saved = [step_directory(Path(), step) for step in range(40, 0, -1) if step % every == 0 or step in (16, 40)]
    assert plan.checkpoints_kept == len(saved) - len(expired(saved, config))


def test_few_rows_are_bound_by_the_host() -> None:
    (phase,) = plan_of("base CLM", 4).phases
    assert (phase.micro, phase.speed.bound) == (4, "host")
    assert phase.speed.tokens_per_second == pytest.approx(282e3, rel=0.02)


def test_a_row_that_does_not_fit_names_recomputation() -> None:
    with pytest.raises(InputError) as refusal:
        plan_of("3B", 1)
    assert (refusal.value.key, refusal.value.code) == ("batch.micro", "gpu-out-of-memory")
    assert "recompute: full" in str(refusal.value)
    (phase,) = plan_of("3B", 1, batch={"sequences": 1, "recompute": "full"}).phases
    assert phase.micro == 1
