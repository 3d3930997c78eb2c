"""The training loop: from the first step to the last, through every phase, on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from configs.schema import RunConfig
from datapipe.batch import IGNORE, MicroBatch, StepData
from engine import checkpoint as checkpoints
from engine import device
from engine.flops import training_flops
from engine.modernbert.attention import PackedDocuments
from engine.objectives import objective_of
from engine.optimizer import set_learning_rate
from engine.schedule import PhaseSpan
from engine.setup import Trainer, open_trainer
from monitoring.recorder import StepRecord, WorkerRecord, due


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    step: int
    """Completed steps."""
    finished: bool
    reason: str | None = None
    """Why it stopped early, on rank 0; everything is saved then."""


def train(config: RunConfig, directory: Path, stop: Callable[[], str | None] = lambda: None) -> Outcome:
    """Train from the newest valid checkpoint in `directory`, or from the start, to the end of the last phase.

    Called by every rank, with torch.distributed initialised. `stop` is asked on rank 0 after every step; a reason
    makes all ranks save and return. Raises InputError for checkpoints or data that do not fit the configuration.
    """
    trainer = open_trainer(config, directory)
    step, reason = trainer.step, None
    for span in trainer.schedule.remaining(step):
        objective = objective_of(span.phase, trainer.tokenizer, config.data.seed)
        trainer.frozen.freeze(span.phase.freeze)
        if trainer.recorder:
            trainer.recorder.phase_started(span.index, objective.name, step)
        batches = trainer.loader.steps(
            objective.targets(), trainer.layout.micro, max(step, span.first), span.last, trainer.data_state
        )
        for batch, clock in _timed(batches):
            set_learning_rate(trainer.optimizer, trainer.schedule.learning_rate(step), config.optimizer)
            loss = _forward_backward(trainer, batch, objective.causal)
            trainer.frozen.clear_gradients()
            _, grad_norm, _ = trainer.optimizer.step()
            step, trainer.data_state = step + 1, batch.state
            reason = stop() if trainer.recorder else None
            totals = _sum_over_ranks(trainer, batch, objective.causal, loss, step, reason)
            _record(trainer, span, batch, totals, step, float(grad_norm), clock)
            if totals["save"] or totals["stop"] or step == span.last:
                _save(trainer, span, step)
            if totals["stop"]:
                batches.close()
                break
        else:
            continue
        break
    trainer.close()
    return Outcome(step, finished=step == trainer.schedule.total, reason=reason)


@dataclass
class _Clock:
    """When a step began, and how long it waited for its data, in seconds."""

    started: float
    waited: float

    def seconds(self) -> float:
        return time.perf_counter() - self.started


def _timed(batches: Generator[StepData]) -> Generator[tuple[StepData, _Clock]]:
    started = time.perf_counter()
    for batch in batches:
        yield batch, _Clock(started, time.perf_counter() - started)
        started = time.perf_counter()


def _forward_backward(trainer: Trainer, batch: StepData, causal: bool) -> float:
    """Gradients of the mean loss over the paying tokens of the global batch; this rank's summed loss.

    The loss is a sum over paying tokens, and Megatron divides the gradients by their count over all data-parallel ranks
    (calculate_per_token_loss), so the result does not depend on how tokens fell on ranks and micro-batches.
    """
    trainer.wrapped.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    slots = len(batch.micro_batches[0].inputs)
    losses = get_forward_backward_func()(
        forward_step_func=lambda data, model: _forward(next(data), model, causal),
        data_iterator=iter(batch.micro_batches),
        model=trainer.wrapped,
        num_microbatches=trainer.layout.micro_batches,
        seq_length=slots,
        micro_batch_size=1,  # Megatron's: a micro-batch of ours is one row of packed documents
        forward_only=False,
    )
    return sum(float(part["loss"]) for part in losses)  # empty before the last pipeline stage


def _forward(micro: MicroBatch, model: Any, causal: bool) -> tuple[torch.Tensor, Callable[..., Any]]:
    where = device.device()
    lengths = tuple(int(length) for length in micro.cu_seqlens[1:] - micro.cu_seqlens[:-1])
    labels = torch.from_numpy(micro.labels)
    paying = (labels != IGNORE).nonzero().squeeze(1)
    output = model(
        torch.from_numpy(micro.inputs)[None].to(where),
        PackedDocuments.from_lengths(lengths, causal, where),
        paying.to(where),
        labels[paying].to(where),
    )

    def loss(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        count = torch.tensor(len(paying), dtype=torch.int, device=where)
        return total, count, {"loss": total.detach()}

    return output, loss


def _sum_over_ranks(
    trainer: Trainer, batch: StepData, causal: bool, loss: float, step: int, reason: str | None
) -> dict[str, float]:
    """One small all-reduce a step: what the log needs, and rank 0's decisions to save and to stop."""
    share = {
        "loss": loss,
        "paying": 0.0,
        "tokens": 0.0,
        "flops": 0.0,
        "save": float(trainer.recorder is not None and _checkpoint_due(trainer, step)),
        "stop": float(reason is not None),
    }
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        for micro in batch.micro_batches:
            paying = int((micro.labels != IGNORE).sum())
            lengths = micro.cu_seqlens[1:] - micro.cu_seqlens[:-1]
            share["paying"] += paying
            share["tokens"] += micro.tokens
            share["flops"] += training_flops(trainer.architecture, lengths, paying, causal)
    else:
        share["loss"] = 0.0
    vector = torch.tensor(list(share.values()), dtype=torch.float64, device=device.device())
    dist.all_reduce(vector)
    return dict(zip(share, vector.tolist(), strict=True))


def _checkpoint_due(trainer: Trainer, step: int) -> bool:
    every = trainer.config.checkpoint.every
    if every.unit == "minutes":
        return time.monotonic() - trainer.saved_at >= 60 * every.value
    interval = max(1, every.steps(trainer.config.tokens_per_step))
    return step % interval == 0


def _record(
    trainer: Trainer,
    span: PhaseSpan,
    batch: StepData,
    totals: dict[str, float],
    step: int,
    grad_norm: float,
    clock: _Clock,
) -> None:
    seconds = clock.seconds()
    workers = None
    if due(trainer.config, step):
        mine = torch.tensor([seconds, device.memory_bytes()], dtype=torch.float64, device=device.device())
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine)
        workers = [WorkerRecord(rank, row[0].item(), int(row[1].item())) for rank, row in enumerate(rows)]
    if trainer.recorder:
        trainer.recorder.step(
            StepRecord(
                step=step,
                phase=span.index,
                objective=span.phase.objective,
                loss=totals["loss"] / max(1.0, totals["paying"]),
                tokens=int(totals["tokens"]),
                learning_rate=trainer.schedule.learning_rate(step - 1),
                grad_norm=grad_norm,
                step_seconds=seconds,
                data_wait_seconds=clock.waited,
                flops=totals["flops"],
                packing_ratio=totals["tokens"] / trainer.config.tokens_per_step,
                epochs=batch.epochs,
                workers=workers,
            )
        )


def _save(trainer: Trainer, span: PhaseSpan, step: int) -> None:
    started = time.perf_counter()
    group = parallel_state.get_data_parallel_group()
    parts: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(parts, trainer.data_state, group=group)
    trainer.data_state = {stream: state for part in parts for stream, state in part.items()}
    path = checkpoints.step_directory(trainer.checkpoints, step)
    meta = {
        "step": step,
        "phase": span.index,
        "architecture": trainer.architecture.to_dict(),
        "config": trainer.config.model_dump(mode="json", exclude_none=True),
        "data": trainer.data_state,
        "recorder": trainer.recorder.state() if trainer.recorder else None,
    }
    checkpoints.save(path, trainer.model, trainer.optimizer, meta)
    trainer.saved_at = time.monotonic()
    if trainer.recorder:
        trainer.recorder.checkpoint_saved(step, time.perf_counter() - started, path)
        checkpoints.prune(trainer.checkpoints, trainer.config.checkpoint.keep)
