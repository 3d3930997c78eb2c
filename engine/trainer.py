"""The training loop: from the first step to the last, through every phase, on every rank."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from configs.errors import RunFailedError
from configs.schema import RunConfig
from datapipe.batch import IGNORE, StepData
from datapipe.loader import end_of_data
from engine import checkpoint as checkpoints
from engine import device
from engine.flops import training_flops
from engine.guards import require_equal_replicas
from engine.megatron.optimizer import set_learning_rate
from engine.megatron.optimizer import step as optimizer_step
from engine.objectives import objective_of
from engine.saver import SaveFailedError
from engine.schedule import PhaseSpan
from engine.setup import Trainer, open_trainer
from engine.step import batches, counts_here, evaluate, forward_backward
from monitoring.events import CheckpointFailed, DocumentsSkipped, record
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
            data = batches(trainer, objective, max(step, span.first), span.last, trainer.data_state)
            with closing(data):
                for batch, clock in _timed(data):
                    set_learning_rate(trainer.optimizer, trainer.schedule.learning_rate(step), config.optimizer)
                    pending, own = forward_backward(trainer, batch.staged)
                    if trainer.replicas_due(step + 1):
                        require_equal_replicas(trainer.model, step + 1)
                    trainer.frozen.clear_gradients()
                    grad_norm = optimizer_step(trainer.optimizer, pending)
                    losses = pending.tolist()
                    step, trainer.data_state = step + 1, batch.state
                    reason = stop() if trainer.recorder else None
                    totals = _sum_over_ranks(trainer, batch, objective.causal, losses, step, reason)
                    trainer.guards.check(
                        step, objective.name, totals["loss"], grad_norm, _suspects(trainer, batch, losses)
                    )
                    seconds = clock.seconds()
                    evaluation = evaluate(trainer) if trainer.evaluation_due(step) else (None, None)
                    _record(trainer, span, batch, totals, step, grad_norm, seconds, clock.waited, own, evaluation)
                    _complete_save(trainer, totals)
                    stopping = bool(totals["stop"] or totals["ended"])
                    if totals["save"] or stopping or step == span.last:
                        _begin_save(trainer, span, step, stopping)
                    if totals["stop"]:
                        return Outcome(step, finished=step == trainer.schedule.total, reason=reason)
                    if totals["ended"]:  # for some ranks, but all have saved
                        raise end_of_data(step)
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


def _timed(data: Generator[StepData]) -> Generator[tuple[StepData, _Clock]]:
    started = time.perf_counter()
    for batch in data:
        yield batch, _Clock(started, time.perf_counter() - started)
        started = time.perf_counter()


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
        "ended": float(batch.ends),
        "writing": float(trainer.saver.writing),
    }
    if counts_here():
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


def _suspects(trainer: Trainer, batch: StepData, losses: list[float]) -> list[str]:
    """The sequences of this rank's micro-batches whose loss is not finite."""
    return [
        trainer.loader.describe(origin)
        for micro, loss in zip(batch.micro_batches, losses, strict=False)  # no losses before the last pipeline stage
        if not math.isfinite(loss)
        for origin in micro.origins
    ]


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
    seconds: float,
    waited: float,
    own: device.Stopwatch,
    evaluation: tuple[dict[str, float] | None, dict[str, float] | None],
) -> None:
    workers = drawn = None
    epochs = batch.epochs
    if due(trainer.config, step):
        taken = [value if counts_here() else 0 for source in batch.drawn.values() for value in source]
        state = [waited + own.seconds(), device.memory_bytes(), device.utilization()]
        mine = torch.tensor([*state, *taken, *epochs.values()], dtype=torch.float64)
        rows = [torch.empty_like(mine, device=device.device()) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine.to(device.device()))
        table = torch.stack(rows).cpu()
        workers = [
            WorkerRecord(rank, took, int(memory), None if math.isnan(busy) else busy)
            for rank, (took, memory, busy) in enumerate(table[:, :3].tolist())
        ]
        totals_drawn = table[:, 3 : 3 + len(taken)].sum(dim=0).view(-1, 3).tolist()
        drawn = {name: (int(t), int(d), int(s)) for name, (t, d, s) in zip(batch.drawn, totals_drawn, strict=True)}
        epochs = dict(zip(epochs, table[:, 3 + len(taken) :].amax(dim=0).int().tolist(), strict=True))
        if trainer.recorder:
            _report_skipped(trainer, step, {name: skipped for name, (_, _, skipped) in drawn.items()})
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
                data_wait_seconds=waited,
                flops=totals["flops"],
                packing_ratio=totals["tokens"] / trainer.config.tokens_per_step,
                epochs=epochs,
                workers=workers,
                eval_loss=evaluation[0],
                eval_accuracy=evaluation[1],
                drawn=drawn,
            )
        )


def _report_skipped(trainer: Trainer, step: int, skipped: dict[str, int]) -> None:
    """Tell of skipped documents by source, each once: also in a run that went back to a checkpoint before them."""
    told: Counter[str] = Counter()
    for event in trainer.events.read() if any(skipped.values()) else ():
        if event["event"] == DocumentsSkipped.KIND:
            told[event["source"]] += event["documents"]
    for source, total in skipped.items():
        if total > told[source]:
            event = DocumentsSkipped(step=step, source=source, documents=total - told[source])
            record(trainer.directory, event)


def _begin_save(trainer: Trainer, span: PhaseSpan, step: int, stopping: bool) -> None:
    """Start saving what training has reached. At the end of a phase, and before stopping, it is waited for."""
    last = stopping or step == trainer.schedule.total
    if trainer.saver.pending:
        _finish(trainer, trainer.saver.wait)
    started = time.perf_counter()
    if step == span.last:  # the next phase starts from the positions of all streams
        group = parallel_state.get_data_parallel_group()
        parts: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(parts, trainer.data_state, group=group)
        trainer.data_state = {stream: state for part in parts for stream, state in part.items()}
    meta: dict[str, Any] = {}
    if trainer.recorder:
        meta = {
            "step": step,
            "phase": span.index,
            "architecture": trainer.architecture.to_dict(),
            "config": trainer.config.model_dump(mode="json", exclude_none=True),
            "recorder": trainer.recorder.state(),
            "guards": trainer.guards.state(),
        }
    trainer.saved_at = time.monotonic()
    path = checkpoints.step_directory(trainer.checkpoints, step)
    trainer.saver.begin(path, trainer.model, trainer.optimizer, meta, trainer.data_state, started)
    if last or step == span.last:
        _finish(trainer, trainer.saver.wait, last)


def _complete_save(trainer: Trainer, totals: dict[str, float]) -> None:
    """Take note of a save once no rank is writing any more."""
    if trainer.saver.pending and not totals["writing"]:
        _finish(trainer, trainer.saver.complete)


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


def _save_failed(trainer: Trainer, error: SaveFailedError, last: bool) -> None:
    """Training is worth more than one checkpoint: it goes on, and the older ones stay. Only the last one is needed."""
    if trainer.recorder:
        record(trainer.directory, CheckpointFailed(reason=str(error)))
    if last:
        raise RunFailedError(f"{error}. Free space and run again: it goes on from the checkpoint before")
