"""The training loop: from the first step to the last, through every phase, on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from configs.schema import RunConfig
from configs.spans import PhaseSpan
from datapipe.batch import StepData
from datapipe.loader import end_of_data
from engine.build import Components, build
from engine.device import Stopwatch
from engine.megatron.gradient_norms import parts
from engine.rank_stats import Decisions, StepNumbers, StepTotals
from engine.step_log import StepLog, StepTimes

StopReason = Callable[[], str | None]
"""Returns why training must stop now, or None."""


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


@dataclass(frozen=True)
class _Launched:
    """A step whose numbers are read later, so that a GPU has the next step's work while the host waits for them."""

    step: int
    """Completed steps with this one."""
    span: PhaseSpan
    objective: str
    batch: StepData
    numbers: StepNumbers
    watch: Stopwatch
    """Runs from the request for the batch until the host launches the next step, or reads this one."""
    waited: float
    own_work: Stopwatch


def train_loop(run: Components, stop: StopReason = lambda: None) -> Outcome:
    """Train the remaining steps of a run that was built. Arguments and errors are those of `train`.

    The numbers of a step are read while the next one runs, unless the step is saved or evaluated.
    """
    state = run.state
    log = StepLog(run.config, run.directory, run.schedule, run.recorder)
    unread: _Launched | None = None
    for span in run.schedule.remaining(state.step):
        objective = run.begin_phase(span)
        if run.recorder:
            run.recorder.phase_started(span.index, objective.name, state.step)
        with closing(run.batches(span, objective, state.step, span.last, state.data)) as batches:
            for batch, watch, waited in _timed(batches):
                launched = _launch(run, span, objective.name, batch, watch, waited, by_part=log.due(state.step + 1))
                if unread:
                    _finish(run, log, unread)

                reason = stop() if run.recorder else None
                decided = _decisions(run, batch, reason).sum_over_ranks(run.hosts)
                run.checkpoints.poll(all_idle=not decided.writing)
                stopping, phase_ends = bool(decided.stop or decided.data_ended), state.step == span.last
                saving, evaluating = decided.save or stopping or phase_ends, run.evaluation_due(span)
                if not (saving or evaluating):
                    watch.stop()
                    unread = launched
                    continue
                unread = None
                _finish(run, log, launched, evaluating)  # what is saved or evaluated is known to be sound
                if saving:
                    state.data = batch.state
                    run.replicas.require_equal(state.step)
                    last = stopping or state.step == run.schedule.total
                    run.checkpoints.save(state, run.guards, wait=phase_ends, last=last)
                if decided.stop:
                    return Outcome(state.step, finished=state.step == run.schedule.total, reason=reason)
                if decided.data_ended:  # for some ranks, but all have saved
                    raise end_of_data(state.step)
    return Outcome(state.step, finished=True)


def _timed(batches: Iterator[StepData]) -> Iterator[tuple[StepData, Stopwatch, float]]:
    """Yield each batch, a watch that runs since the step asked for it, and the seconds that it waited."""
    watch = Stopwatch()
    for batch in batches:
        yield batch, watch, watch.seconds()
        watch = Stopwatch()


def _launch(
    run: Components, span: PhaseSpan, objective: str, batch: StepData, watch: Stopwatch, waited: float, by_part: bool
) -> _Launched:
    """Start a step's work on the device: forward, backward and the optimizer's step. The host reads no number of it.

    Args:
        run: The run's components.
        span: The phase of the step.
        objective: Name of the phase's objective.
        batch: This rank's batch.
        watch: Runs since the step asked for the batch.
        waited: Seconds that it waited.
        by_part: Whether gradient norms are taken by part of the model too.
    """
    losses, own_work = run.runner.forward_backward(batch.staged)
    run.replicas.observe()
    learning_rate, peak = run.schedule.learning_rate(run.state.step), run.schedule.peak(span)
    norms = run.runner.optimizer_step(losses, learning_rate, peak, by_part)
    run.state.step += 1
    counts = StepTotals.counted(batch.micro_batches, run.architecture, run.tokenizer.byte_lengths)
    numbers = StepNumbers(batch.micro_batches, counts, losses, norms)
    return _Launched(run.state.step, span, objective, batch, numbers, watch, waited, own_work)


def _finish(run: Components, log: StepLog, launched: _Launched, evaluating: bool = False) -> None:
    """Wait for a step, check its numbers, evaluate after it if asked to, and log it."""
    totals, (grad_norm, *norms), losses = launched.numbers.read()
    by_part = dict(zip(parts(run.architecture.num_hidden_layers), norms, strict=True)) if norms else None
    times = StepTimes(launched.watch.seconds(), launched.waited, launched.own_work)
    if not math.isfinite(grad_norm):
        run.runner.undo_step_count()
    suspects = _suspects(run, launched.batch, losses)
    run.guards.check(launched.step, launched.objective, totals.loss, grad_norm, suspects)
    evaluation = run.runner.evaluate(run.held_out, run.tokenizer.byte_lengths) if evaluating else None
    log.record(launched.step, launched.span, launched.batch, totals, grad_norm, by_part, times, evaluation)


def _decisions(run: Components, batch: StepData, reason: str | None) -> Decisions:
    """Return this rank's contribution: rank 0 decides to save and to stop, and each rank knows of its own data."""
    return Decisions(
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
