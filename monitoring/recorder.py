"""Reports each step of a run, on global rank 0 of the trainer, into metrics.jsonl and telemetry.json."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from configs.schema import RunConfig
from monitoring.events import CheckpointSaved, PhaseStarted, WorkersStarted
from monitoring.events import record as record_event
from monitoring.log import LineWriter, held_events, read_events, rewind_metrics
from monitoring.run_directory import RunDirectory
from monitoring.telemetry import Counters, Rates, StepValues, Telemetry, WorkerRecord, highest
from monitoring.writers import Writers

RECENT_STEPS = 50
"""Number of steps whose mean time gives the time left."""
TELEMETRY_INTERVAL = 1.0
"""Seconds between two writes of telemetry.json."""


class StepRecord(StepValues):
    """One optimizer step, summed over all ranks. The fields of `StepValues` belong to it."""

    model_config = ConfigDict(frozen=True)

    step: int
    """Number of completed steps, so the first is 1."""
    phase: int
    """Index into the phases of the configuration, from 0."""
    objective: str
    """`clm`, `mlm`, or `clm+mlm` in a phase that mixes them."""
    loss: float
    """Mean over the label positions."""
    bits_per_byte: float = math.nan
    """Bits of loss per byte of the predicted text."""
    losses: dict[str, float] | None = None
    """In a mixture, the loss of each objective that the step had label positions of."""
    tokens: int
    """Real tokens, without padding."""
    objective_tokens: dict[str, int] | None = None
    """In a mixture, `tokens` by objective."""
    step_seconds: float
    """Wall time, with the wait for data."""
    data_wait_seconds: float
    flops: float
    """Floating-point operations that the model needs for the step, forward and backward."""
    epochs: dict[str, int]
    """Epoch that each source has reached, from 0."""
    gradient_norms: dict[str, float] | None = None
    """At a due step, the gradient's norm before clipping by part: `embeddings`, layers from `0`, `head`."""
    workers: list[WorkerRecord] | None
    """One record per rank at a due step; None at other steps."""
    eval_loss: dict[str, float] | None = None
    """Held-out loss by objective, at the steps that evaluate."""
    eval_accuracy: dict[str, float] | None = None
    """Share of the held-out label positions, from 0 to 1, at which the likeliest token is the right one."""
    eval_bits_per_byte: dict[str, float] | None = None
    """Bits of held-out loss per byte of the predicted text, by objective."""
    drawn: dict[str, tuple[int, int, int]] | None = None
    """At a due step, as `Counters.drawn`, summed over all ranks."""


def due(config: RunConfig, step: int) -> bool:
    """Return whether `step` completed steps give a line of metrics.jsonl."""
    return step % config.monitoring.every.value == 0 or step == config.total_steps


@dataclass
class _Window:
    """Sums over the steps since the last report."""

    steps: int = 0
    seconds: float = 0.0
    wait: float = 0.0
    tokens: int = 0
    flops: float = 0.0

    def add(self, record: StepRecord) -> None:
        self.steps += 1
        self.seconds += record.step_seconds
        self.wait += record.data_wait_seconds
        self.tokens += record.tokens
        self.flops += record.flops

    def rates(self, peak_flops: float) -> Rates:
        """`peak_flops`: operations per second of all devices, or 0 if unknown."""
        if not self.seconds:
            return Rates(tokens_per_second=math.nan, mfu=math.nan)
        mfu = self.flops / (self.seconds * peak_flops) if peak_flops else math.nan
        return Rates(tokens_per_second=self.tokens / self.seconds, mfu=mfu)


def _labels(config: RunConfig, directory: Path) -> dict[str, str | int | float]:
    """Labels of `detour_run_info` that tell runs apart. Nodes are those of the latest start, else the most allowed."""
    started = [event["workers"] for event in read_events(directory) if event["event"] == WorkersStarted.KIND]
    nodes = config.cluster.nodes
    return {
        "directory": str(directory),
        "model": config.model.size or config.model.init,
        "phases": "-".join(phase.objective_name for phase in config.phases),
        "nodes": len(set(started[-1])) if started else nodes if isinstance(nodes, int) else max(nodes),
    }


class Recorder:
    """Logs a run from its trainer. On a resume it first cuts metrics.jsonl back to the resumed step.

    Args:
        directory: The run directory.
        config: The resolved configuration.
        info: Further labels of `detour_run_info`, for instance precision, workers and versions.
        devices: Number of devices, by which the throughput is divided.
        peak_flops: Floating-point operations per second of one device; 0 if unknown, and then there is no MFU.
        state: `Recorder.state()` of the resumed checkpoint; None for a new run.
        step: Completed steps of that checkpoint; 0 for a new run.
    """

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        info: dict[str, str | int | float],
        devices: int,
        peak_flops: float,
        state: dict[str, Any] | None,
        step: int,
    ) -> None:
        self._directory, self._config = directory, config
        self._devices, self._peak_flops = devices, devices * peak_flops
        state = state or {"counters": {}, "since_line": {}}
        self._counters = Counters.model_validate(state["counters"])
        self._since_line = _Window(**state["since_line"])
        self._since_written = _Window()
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

        before = Telemetry.read(directory)
        self._floor = (before.counters if before else Counters()).model_dump()
        known = before.stopped().model_dump(exclude={"step_time"}) if before else {}
        self._telemetry = Telemetry.model_validate(
            {"start_time": time.time()}
            | known
            | {
                "run": config.name,
                "info": _labels(config, directory) | info,
                "objectives": [phase.objective_name for phase in config.phases],
                "total_steps": config.total_steps,
                "step": step,
                "resume_time": time.time(),
                "checkpoint_step": step or None,
            }
        )
        rewind_metrics(directory, step)
        self._lines = LineWriter(RunDirectory(directory).metrics)
        self._writers = Writers(config, directory, step)
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="telemetry")
        self._writing = self._start_writing()
        self._writing.result()

    def due(self, step: int) -> bool:
        """Return whether `step` gets a line of metrics.jsonl."""
        return due(self._config, step)

    def phase_started(self, index: int, objective: str, step: int) -> None:
        """Note that phase `index` goes on after `step` steps. Its beginning is recorded, once even after a rollback."""
        self._telemetry.phase = index
        begun = [event["phase"] for event in read_events(self._directory) if event["event"] == PhaseStarted.KIND]
        if index not in begun and step == self._config.spans[index].first:
            record_event(self._directory, PhaseStarted(step=step, phase=index, objective=objective))
        self.flush()

    def step(self, record: StepRecord) -> None:
        """Take in one step. Call it after every step, in order."""
        counters, telemetry = self._counters, self._telemetry
        for name, tokens in (record.objective_tokens or {record.objective: record.tokens}).items():
            counters.tokens[name] = counters.tokens.get(name, 0) + tokens
        counters.data_wait_seconds += record.data_wait_seconds
        counters.step_seconds.observe(record.step_seconds)
        if clip := self._config.optimizer.clip:
            counters.count_clipping(record.phase, clip < record.grad_norm < math.inf)
        self._since_line.add(record)
        self._since_written.add(record)
        self._recent.append(record.step_seconds)

        telemetry.step, telemetry.step_time = record.step, time.time()
        telemetry.phase = record.phase
        telemetry.loss |= {record.objective: record.loss, **(record.losses or {})}
        telemetry.bits_per_byte[record.objective] = record.bits_per_byte
        telemetry.epochs = {**telemetry.epochs, **record.epochs}  # idle sources keep their epoch
        for name, value in record.step_values().items():
            setattr(telemetry, name, value)
        if record.workers is not None:
            telemetry.workers = record.workers
        if record.gradient_norms is not None:
            telemetry.gradient_norms[record.objective] = record.gradient_norms
        if record.drawn is not None:
            counters.drawn = {**counters.drawn, **record.drawn}  # idle sources keep their counts
        if record.eval_loss is not None:
            telemetry.eval_loss, telemetry.eval_accuracy = record.eval_loss, record.eval_accuracy or {}
            telemetry.eval_bits_per_byte = record.eval_bits_per_byte or {}
        if self.due(record.step) or record.eval_loss is not None:
            line = self._line(record)
            self._lines.append(line)
            self._writers.write(line)
            self._since_line = _Window()
        if time.monotonic() - self._written >= TELEMETRY_INTERVAL and self._writing.done():
            self._writing.result()
            self._writing = self._start_writing()

    def checkpoint_saved(self, step: int, seconds: float, path: Path, stall: float = 0.0) -> None:
        """Note that a checkpoint is complete.

        Args:
            step: Its step.
            seconds: Time to save it.
            path: Where it lies.
            stall: Part of `seconds` in which training stood still.
        """
        self._counters.checkpoint_seconds.observe(seconds)
        self._telemetry.checkpoint_step, self._telemetry.checkpoint_time = step, time.time()
        name = str(path.relative_to(self._directory) if path.is_relative_to(self._directory) else path)
        event = CheckpointSaved(step=step, seconds=round(seconds, 3), stall_seconds=round(stall, 3), path=name)
        record_event(self._directory, event)
        self.flush()

    def state(self) -> dict[str, Any]:
        """Return JSON for the checkpoint, so that every total continues exactly; the lines so far are on disk then."""
        self._lines.sync()
        return {"counters": self._counters.model_dump(mode="json"), "since_line": asdict(self._since_line)}

    def flush(self) -> None:
        """Write telemetry.json now. Otherwise a thread writes it about once per second, beside the training steps."""
        self._writing.result()
        self._start_writing().result()

    def close(self) -> None:
        """Write telemetry.json a last time and close every file."""
        self.flush()
        self._disk.shutdown()
        self._lines.close()
        self._writers.close()

    def _line(self, record: StepRecord) -> dict[str, Any]:
        window = self._since_line
        line = {
            "step": record.step,
            "phase": record.phase,
            "objective": record.objective,
            "loss": record.loss,
            "bits_per_byte": record.bits_per_byte,
            "tokens": sum(self._counters.tokens.values()),
            **record.step_values(),
            **self._clipped_share(record.phase),
            "step_seconds": window.seconds / window.steps,
            "data_wait_seconds": window.wait / window.steps,
            **window.rates(self._peak_flops).rates(),
        }
        names = ("losses", "eval_loss", "eval_accuracy", "eval_bits_per_byte")
        by_name = {name: getattr(record, name) for name in names}
        if record.gradient_norms is not None:
            by_name["gradient_norms"] = {part: float(f"{norm:.4g}") for part, norm in record.gradient_norms.items()}
        return line | {name: values for name, values in by_name.items() if values is not None}

    def _clipped_share(self, phase: int) -> dict[str, float]:
        """The share of a phase's steps so far whose gradient was clipped; empty without clipping."""
        share = self._counters.clipped_shares().get(str(phase))
        return {} if share is None else {"clipped_share": share}

    def _start_writing(self) -> Future[None]:
        """Write telemetry.json in the thread. Its counters never fall: after a rollback they wait at their highest."""
        window, telemetry = self._since_written, self._telemetry
        if window.steps:
            rates = window.rates(self._peak_flops)
            telemetry.tokens_per_second_per_device = rates.tokens_per_second / self._devices
            telemetry.step_seconds = statistics.fmean(self._recent)
            for name, value in rates.rates().items():
                setattr(telemetry, name, value)
            self._since_written = _Window()
        steps = self._counters.step_seconds
        telemetry.checkpoint_interval_seconds = self._config.checkpoint.every.seconds(
            self._config.span_at(telemetry.step).tokens_per_step, steps.sum / steps.count if steps.count else math.nan
        )
        shown = Counters.model_validate(highest(self._counters.model_dump(mode="json"), self._floor))
        held = dict(held_events(self._directory))
        now = telemetry.model_copy(update={"counters": shown, "time": time.time(), "unwritten": held})
        self._written = time.monotonic()
        return self._disk.submit(Telemetry.write, self._directory, now.model_dump_json())
