"""The training loop: from the first step to the last, through every phase, on every rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from configs.schema import RunConfig
from datapipe.batch import IGNORE, StepData, label_bytes
from datapipe.loader import end_of_data
from engine.build import Components, build
from engine.device import Stopwatch
from engine.flops import training_flops
from engine.rank_stats import StepTotals, reports_loss
from engine.step_log import StepLog, StepTimes

StopReason = Callable[[], str | None]
"""Returns why training must stop now; None: it goes on."""


@dataclass(frozen=True)
class Outcome:
    """The end of a call of `train`."""

    step: int
    """Completed steps."""
    finished: bool
    reason: str | None = None
    """Why it stopped early, on rank 0; everything is saved then."""


def train(config: RunConfig, directory: Path, stop: StopReason = lambda: None) -> Outcome:
    """Train from the newest valid checkpoint in `directory`, or from the start, to the end of the last phase.

    Every rank calls it, with torch.distributed initialised.

    Args:
        config: The resolved configuration.
        directory: The run directory.
        stop: Asked on rank 0 after every step; a reason makes all ranks save and return.

    Raises:
        InputError: Checkpoints or data do not fit the configuration.
        RunFailedError: The numbers went wrong, or the last checkpoint could not be written.
    """
    with closing(build(config, directory)) as run:
        return train_loop(run, stop)


def train_loop(run: Components, stop: StopReason = lambda: None) -> Outcome:
    """Train the remaining steps of a run that was built. Arguments and errors as for `train`."""
    state, runner = run.state, run.runner
    log = StepLog(run.config, run.directory, run.schedule, run.recorder)
    lengths = run.tokenizer.byte_lengths
    for span in run.schedule.remaining(state.step):
        objective = run.begin_phase(span)
        if run.recorder:
            run.recorder.phase_started(span.index, objective.name, state.step)
        with closing(run.batches(span, objective, state.step, span.last, state.data)) as batches:
            for batch, watch, waited in _timed(batches):
                losses, own_work = runner.forward_backward(batch.staged)
                run.replicas.observe()
                learning_rate = run.schedule.learning_rate(state.step)
                peak, by_part = run.schedule.peak(span), log.due(state.step + 1)
                gradient = runner.optimizer_step(losses, learning_rate, peak, by_part)
                batch_losses = losses.tolist()
                state.step += 1

                reason = stop() if run.recorder else None
                totals = _totals(run, batch, batch_losses, reason).sum_over_ranks()
                suspects = _suspects(run, batch, batch_losses)
                run.guards.check(state.step, objective.name, totals.loss, gradient.total, suspects)
                times = StepTimes(watch.seconds(), waited, own_work)
                evaluation = runner.evaluate(run.held_out, lengths) if run.evaluation_due(span) else None
                log.record(state.step, span, batch, totals, gradient, times, evaluation)

                run.checkpoints.poll(all_idle=not totals.writing)
                stopping, phase_ends = bool(totals.stop or totals.data_ended), state.step == span.last
                if totals.save or stopping or phase_ends:
                    state.data = batch.state
                    run.replicas.require_equal(state.step)
                    last = stopping or state.step == run.schedule.total
                    run.checkpoints.save(state, run.guards, wait=phase_ends, last=last)
                if totals.stop:
                    return Outcome(state.step, finished=state.step == run.schedule.total, reason=reason)
                if totals.data_ended:  # for some ranks, but all have saved
                    raise end_of_data(state.step)
    return Outcome(state.step, finished=True)


def _timed(batches: Iterator[StepData]) -> Iterator[tuple[StepData, Stopwatch, float]]:
    """Yield each batch, a watch that runs since the step asked for it, and the seconds that it waited."""
    watch = Stopwatch()
    for batch in batches:
        yield batch, watch, watch.seconds()
        watch = Stopwatch()


def _totals(run: Components, batch: StepData, losses: list[float], reason: str | None) -> StepTotals:
    """Return this rank's contribution to the step, and on rank 0 the decisions to save and to stop."""
    sums: defaultdict[str, float] = defaultdict(float)
    predicted_bytes, flops = 0, 0.0
    if reports_loss():
        for micro_batch, loss in zip(batch.micro_batches, losses, strict=True):
            labels = int((micro_batch.labels != IGNORE).sum())
            lengths = micro_batch.cu_seqlens[1:] - micro_batch.cu_seqlens[:-1]
            predicted_bytes += label_bytes(micro_batch.labels, run.tokenizer.byte_lengths)
            name = micro_batch.objective
            sums[f"{name}_loss_sum"] += loss
            sums[f"{name}_label_tokens"] += labels
            sums[f"{name}_tokens"] += micro_batch.tokens
            flops += training_flops(run.architecture, lengths, labels, micro_batch.is_causal)
    return StepTotals(
        **sums,
        label_bytes=predicted_bytes,
        flops=flops,
        save=float(run.recorder is not None and run.checkpoints.is_due(run.state)),
        stop=float(reason is not None),
        data_ended=float(batch.ends),
        writing=float(run.checkpoints.writing),
    )


def _suspects(run: Components, batch: StepData, losses: list[float]) -> list[str]:
    """Describe the sequences of this rank's micro-batches whose loss is not finite."""
    return [
        run.loader.describe(origin)
        for micro_batch, loss in zip(batch.micro_batches, losses, strict=False)  # no losses before the last stage
        if not math.isfinite(loss)
        for origin in micro_batch.origins
    ]
