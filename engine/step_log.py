"""Turns a finished step into the recorder's line: gathers what ranks know, on logged steps alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from configs.schema import RunConfig
from configs.spans import PhaseSpan
from datapipe.batch import Drawn, StepData
from engine import device
from engine.device import Stopwatch
from engine.rank_stats import RankStats, StepTotals, latest_epochs, reports_loss, total_drawn
from engine.schedule import PhaseSchedule
from engine.step import Evaluation
from monitoring.events import DocumentsSkipped, record
from monitoring.log import Follower
from monitoring.recorder import Recorder, StepRecord, WorkerRecord, due
from monitoring.run_directory import RunDirectory


class StepTimes(NamedTuple):
    """Times of a step on this rank."""

    step_seconds: float
    """Wall time, data included, evaluation and checkpoints not."""
    data_wait_seconds: float
    own_work: Stopwatch
    """Forward and backward, without waiting for other data-parallel ranks."""


class StepLog:
    """Logs every step; all ranks call it, and global rank 0 writes.

    Args:
        config: The run's configuration.
        directory: The run directory.
        schedule: Gives the learning rates.
        recorder: On global rank 0 only.
    """

    def __init__(self, config: RunConfig, directory: Path, schedule: PhaseSchedule, recorder: Recorder | None) -> None:
        self._config, self._directory = config, directory
        self._schedule, self._recorder = schedule, recorder
        self._events = Follower(RunDirectory(directory).events)

    def due(self, step: int) -> bool:
        """Return whether `step` completed steps give a line with the ranks' views and the gradient's norms by part."""
        return due(self._config, step)

    def record(
        self,
        step: int,
        span: PhaseSpan,
        batch: StepData,
        totals: StepTotals,
        grad_norm: float,
        gradient_norms: dict[str, float] | None,
        times: StepTimes,
        evaluation: Evaluation | None,
    ) -> None:
        """Log the step after which `step` steps are complete."""
        workers = drawn = None
        epochs = batch.epochs
        if self.due(step):
            ranks = _rank_stats(batch, times).gather()
            workers, drawn, epochs = _worker_records(ranks), total_drawn(ranks), latest_epochs(ranks)
        if self._recorder is None:
            return
        if drawn is not None:
            self._report_skipped(step, drawn)
        eval_loss, eval_accuracy, eval_bits_per_byte = evaluation or (None, None, None)
        is_mixed = len(span.phase.objectives) > 1
        self._recorder.step(
            StepRecord(
                step=step,
                phase=span.index,
                objective=span.phase.objective_name,
                loss=totals.loss,
                bits_per_byte=totals.bits_per_byte,
                losses=totals.losses if is_mixed else None,
                tokens=int(totals.tokens),
                objective_tokens=totals.objective_tokens if is_mixed else None,
                learning_rate=self._schedule.learning_rate(step - 1),
                grad_norm=grad_norm,
                gradient_norms=gradient_norms,
                step_seconds=times.step_seconds,
                data_wait_seconds=times.data_wait_seconds,
                flops=totals.flops,
                packing_ratio=totals.tokens / span.tokens_per_step,
                epochs=epochs,
                workers=workers,
                eval_loss=eval_loss,
                eval_accuracy=eval_accuracy,
                eval_bits_per_byte=eval_bits_per_byte,
                drawn=None if drawn is None else {**drawn},
            )
        )

    def _report_skipped(self, step: int, drawn: dict[str, Drawn]) -> None:
        """Record newly skipped documents by source; not again after a rollback."""
        reported: Counter[str] = Counter()
        for event in self._events.read() if any(source.skipped for source in drawn.values()) else ():
            if event["event"] == DocumentsSkipped.KIND:
                reported[event["source"]] += event["documents"]
        for name, source in drawn.items():
            if source.skipped > reported[name]:
                documents = source.skipped - reported[name]
                record(self._directory, DocumentsSkipped(step=step, source=name, documents=documents))


def _rank_stats(batch: StepData, times: StepTimes) -> RankStats:
    return RankStats(
        step_seconds=times.data_wait_seconds + times.own_work.seconds(),
        memory_bytes=device.memory_bytes(),
        gpu_utilization=device.utilization(),
        drawn={name: drawn if reports_loss() else Drawn(0, 0, 0) for name, drawn in batch.drawn.items()},
        epochs=batch.epochs,
    )


def _worker_records(ranks: list[RankStats]) -> list[WorkerRecord]:
    records = []
    for rank, stats in enumerate(ranks):
        busy = None if math.isnan(stats.gpu_utilization) else stats.gpu_utilization
        records.append(WorkerRecord(rank, stats.step_seconds, int(stats.memory_bytes), busy))
    return records
