"""The training loop: from the first step to the last, through every phase, on every rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from configs.errors import RunFailedError
from configs.schema import RunConfig
from datapipe.batch import IGNORE, MicroBatch, StepData
from engine import checkpoint as checkpoints
from engine import device
from engine.flops import training_flops
from engine.guards import require_equal_replicas
from engine.modernbert.attention import PackedDocuments
from engine.objectives import objective_of
from engine.optimizer import set_learning_rate
from engine.optimizer import step as optimizer_step
from engine.saver import SaveFailedError
from engine.schedule import PhaseSpan
from engine.setup import Trainer, open_trainer
from monitoring.log import append_event
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
    try:
        for span in trainer.schedule.remaining(step):
            objective = objective_of(span.phase, trainer.tokenizer, config.data.seed)
            trainer.frozen.freeze(span.phase.freeze)
            if trainer.recorder:
                trainer.recorder.phase_started(span.index, objective.name, step)
            batches = trainer.loader.steps(
                objective.targets(), trainer.layout.micro, max(step, span.first), span.last, trainer.data_state
            )
            with closing(batches):
                for batch, clock in _timed(batches):
                    set_learning_rate(trainer.optimizer, trainer.schedule.learning_rate(step), config.optimizer)
                    losses = _forward_backward(trainer, batch.micro_batches, objective.causal)
                    trainer.frozen.clear_gradients()
                    grad_norm = optimizer_step(trainer.optimizer)
                    step, trainer.data_state = step + 1, batch.state
                    reason = stop() if trainer.recorder else None
                    totals = _sum_over_ranks(trainer, batch, objective.causal, losses, step, reason)
                    trainer.guards.check(
                        step, objective.name, totals["loss"], grad_norm, _suspects(trainer, losses, step)
                    )
                    evaluation = _evaluate(trainer) if trainer.evaluation_due(step) else None
                    _record(trainer, span, batch, totals, step, grad_norm, clock, evaluation)
                    _complete_save(trainer, totals)
                    if totals["save"] or totals["stop"] or step == span.last:
                        _begin_save(trainer, span, step, stopping=bool(totals["stop"]))
                    if totals["stop"]:
                        return Outcome(step, finished=step == trainer.schedule.total, reason=reason)
    finally:
        trainer.close()
    return Outcome(step, finished=True)


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


def _forward_backward(trainer: Trainer, micro_batches: tuple[MicroBatch, ...], causal: bool) -> list[float]:
    """Gradients of the mean loss over the paying tokens of the global batch; this rank's summed losses.

    One loss a micro-batch on the last pipeline stage, none before it.

    The loss is a sum over paying tokens, and Megatron divides the gradients by their count over all data-parallel ranks
    (calculate_per_token_loss), so the result does not depend on how tokens fell on ranks and micro-batches.
    """
    trainer.wrapped.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=lambda data, model: _forward(next(data), model, causal),
        data_iterator=iter(micro_batches),
        model=trainer.wrapped,
        num_microbatches=len(micro_batches),
        seq_length=len(micro_batches[0].inputs),
        micro_batch_size=1,  # Megatron's: a micro-batch of ours is one row of packed documents
        forward_only=False,
    )
    return [float(part["loss"]) for part in losses]


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


def _evaluate(trainer: Trainer) -> dict[str, float]:
    """Mean loss of each objective over the held-out set; the training streams and the weights are not touched."""
    found = {}
    for objective, micro_batches in trainer.evaluation.items():
        trainer.model.eval()
        with torch.no_grad():
            parts = get_forward_backward_func()(
                forward_step_func=lambda data, model, causal=objective.causal: _forward(next(data), model, causal),
                data_iterator=iter(micro_batches),
                model=trainer.wrapped,
                num_microbatches=len(micro_batches),
                seq_length=len(micro_batches[0].inputs),
                micro_batch_size=1,
                forward_only=True,
            )
        trainer.model.train()
        loss = sum(float(part["loss"]) for part in parts)
        paying = sum(int((micro.labels != IGNORE).sum()) for micro in micro_batches)
        mine = [loss, float(paying)] if _counts_here() else [0.0, 0.0]
        sums = torch.tensor(mine, dtype=torch.float64, device=device.device())
        dist.all_reduce(sums)
        found[objective.name] = float(sums[0] / sums[1])
    return found


def _counts_here() -> bool:
    """One rank of each data-parallel replica, the one that has its loss, speaks for it."""
    return bool(parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0)


def _sum_over_ranks(
    trainer: Trainer, batch: StepData, causal: bool, losses: list[float], step: int, reason: str | None
) -> dict[str, float]:
    """One small all-reduce a step: what the log needs, and rank 0's decisions to save and to stop."""
    share = {
        "loss": sum(losses),
        "paying": 0.0,
        "tokens": 0.0,
        "flops": 0.0,
        "save": float(trainer.recorder is not None and _checkpoint_due(trainer, step)),
        "stop": float(reason is not None),
        "writing": float(trainer.saver.writing),
        "write_failed": float(trainer.saver.failed),
    }
    if _counts_here():
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
    totals = dict(zip(share, vector.tolist(), strict=True))
    return {**totals, "loss": totals["loss"] / max(1.0, totals["paying"])}


def _suspects(trainer: Trainer, losses: list[float], step: int) -> list[str]:
    """The sequences of this rank's micro-batches whose loss is not finite."""
    rows, size = trainer.config.batch.sequences // trainer.config.data.streams, trainer.layout.data
    rank, micro, names = parallel_state.get_data_parallel_rank(), trainer.layout.micro, []
    for number, loss in enumerate(losses):
        if not math.isfinite(loss):
            for row in range(number * micro, (number + 1) * micro):
                stream, place = rank + row // rows * size, (step - 1) * rows + row % rows
                names.append(f"sequence {place} of stream {stream}")
    return names


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
    evaluation: dict[str, float] | None,
) -> None:
    seconds = clock.seconds()
    workers = drawn = None
    epochs = batch.epochs
    if due(trainer.config, step):
        own = [value if _counts_here() else 0 for source in batch.drawn.values() for value in source]
        mine = torch.tensor([seconds, device.memory_bytes(), *own, *epochs.values()], dtype=torch.float64)
        rows = [torch.empty_like(mine, device=device.device()) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine.to(device.device()))
        table = torch.stack(rows).cpu()
        workers = [WorkerRecord(rank, row[0].item(), int(row[1].item())) for rank, row in enumerate(table)]
        totals_drawn = table[:, 2 : 2 + len(own)].sum(dim=0).view(-1, 3).tolist()
        drawn = {name: (int(t), int(d), int(s)) for name, (t, d, s) in zip(batch.drawn, totals_drawn, strict=True)}
        epochs = dict(zip(epochs, table[:, 2 + len(own) :].amax(dim=0).int().tolist(), strict=True))
    if trainer.recorder:
        trainer.recorder.step(
            StepRecord(
                step=step,
                phase=span.index,
                objective=span.phase.objective,
                loss=totals["loss"],
                tokens=int(totals["tokens"]),
                learning_rate=trainer.schedule.learning_rate(step - 1),
                grad_norm=grad_norm,
                step_seconds=seconds,
                data_wait_seconds=clock.waited,
                flops=totals["flops"],
                packing_ratio=totals["tokens"] / trainer.config.tokens_per_step,
                epochs=epochs,
                workers=workers,
                eval_loss=evaluation,
                drawn=drawn,
            )
        )


def _begin_save(trainer: Trainer, span: PhaseSpan, step: int, stopping: bool) -> None:
    """Start saving what training has reached. At the end of a phase, and before stopping, it is waited for."""
    last = stopping or step == trainer.schedule.total
    require_equal_replicas(trainer.model, step)
    group = parallel_state.get_data_parallel_group()
    parts: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(parts, trainer.data_state, group=group)
    trainer.data_state = {stream: state for part in parts for stream, state in part.items()}
    meta = {
        "step": step,
        "phase": span.index,
        "architecture": trainer.architecture.to_dict(),
        "config": trainer.config.model_dump(mode="json", exclude_none=True),
        "data": trainer.data_state,
        "recorder": trainer.recorder.state() if trainer.recorder else None,
    }
    trainer.saved_at = time.monotonic()
    if trainer.saver.pending:
        _finish(trainer, trainer.saver.wait)
    try:
        path = checkpoints.step_directory(trainer.checkpoints, step)
        trainer.saver.begin(path, trainer.model, trainer.optimizer, meta)
    except SaveFailedError as error:
        _save_failed(trainer, error, last)
    else:
        if last or step == span.last:
            _finish(trainer, trainer.saver.wait, last)


def _complete_save(trainer: Trainer, totals: dict[str, float]) -> None:
    """Make a save visible once no rank is writing any more."""
    if trainer.saver.pending and not totals["writing"]:
        _finish(trainer, lambda: trainer.saver.complete(failed=bool(totals["write_failed"])))


def _finish(trainer: Trainer, complete: Callable[[], tuple[Path, float]], last: bool = False) -> None:
    try:
        path, seconds = complete()
    except SaveFailedError as error:
        _save_failed(trainer, error, last)
    else:
        if trainer.recorder:
            trainer.recorder.checkpoint_saved(checkpoints.step_of(path), seconds, path, trainer.saver.stall)
        if trainer.mirror:
            trainer.mirror.upload(path)
            if trainer.mirror.error:
                append_event(trainer.directory, "checkpoint_failed", reason=f"mirror: {trainer.mirror.error}")


def _save_failed(trainer: Trainer, error: SaveFailedError, last: bool) -> None:
    """Training is worth more than one checkpoint: it goes on, and the older ones stay. Only the last one is needed."""
    if trainer.recorder:
        append_event(trainer.directory, "checkpoint_failed", reason=str(error))
    if last:
        raise RunFailedError(f"{error}. Free space and run again: it goes on from the checkpoint before")
