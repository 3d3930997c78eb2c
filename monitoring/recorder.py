"""What the trainer's global rank 0 reports: every step, into metrics.jsonl and telemetry.json."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from monitoring.events import CheckpointSaved, PhaseStarted, WorkersStarted
from monitoring.events import record as record_event
from monitoring.log import LineWriter, held_events, read_events, rewind_metrics
from monitoring.run_directory import RunDirectory
from monitoring.telemetry import Counters, Telemetry, WorkerRecord, highest
from monitoring.writers import Writers

RECENT_STEPS = 50
"""Steps whose mean time tells the time left."""
TELEMETRY_INTERVAL = 1.0
"""Seconds between two writings of telemetry.json."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, summed over all ranks."""

    step: int
    """Completed steps, so the first is 1."""
    phase: int
    """Index into the configuration's phases, from 0."""
    objective: str
    loss: float
    """Mean over the positions that paid."""
    tokens: int
    """Real tokens, padding not counted."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    step_seconds: float
    """Wall time, waiting for data included."""
    data_wait_seconds: float
    flops: float
    """Floating-point operations the model needs for it, forward and backward."""
    packing_ratio: float
    """Real tokens as a share of the token slots."""
    epochs: dict[str, int]
    """Epoch each source has reached, from 0."""
    workers: list[WorkerRecord] | None
    """Every rank's view at a due step; None at other steps."""
    eval_loss: dict[str, float] | None = None
    """Loss of each objective on the held-out set, at the steps that evaluate."""
    eval_accuracy: dict[str, float] | None = None
    """Share of those positions, from 0 to 1, at which the model's likeliest token is the right one."""
    drawn: dict[str, tuple[int, int, int]] | None = None
    """At a due step, of each source over all ranks: tokens, documents, damaged documents left out."""


def due(config: RunConfig, step: int) -> bool:
    """Whether a line of metrics.jsonl is written after this many completed steps."""
    return step % config.monitoring.every.value == 0 or step == config.total_steps


@dataclass
class _Window:
    """Sums over the steps since something was last written."""

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

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else math.nan

    def mfu(self, peak_flops: float) -> float:
        """Model FLOPs utilisation: the share of the devices' peak that the model's own operations took."""
        return self.flops / (self.seconds * peak_flops) if self.seconds and peak_flops else math.nan


def _describe(config: RunConfig, directory: Path) -> dict[str, str | int | float]:
    """The labels that dashboards compare runs by. Nodes are those the workers were started on, else the most."""
    started = [event["workers"] for event in read_events(directory) if event["event"] == WorkersStarted.KIND]
    nodes = config.cluster.nodes
    return {
        "model": config.model.size or config.model.init,
        "phases": "-".join(phase.objective for phase in config.phases),
        "nodes": len(set(started[-1])) if started else nodes if isinstance(nodes, int) else max(nodes),
    }


def _interval(config: RunConfig, step_seconds: float) -> float:
    """Seconds between two checkpoints, as configured."""
    return config.checkpoint.every.seconds(config.tokens_per_step, step_seconds)


class Recorder:
    """Logs a run from its trainer. On resume it cuts metrics.jsonl back to the resumed step and goes on from there.

    Args:
        directory: The run directory.
        config: The resolved configuration.
        info: Labels of `detour_run_info`, for instance precision, model size, workers and versions.
        devices: Devices the throughput is divided by.
        peak_flops: Floating-point operations a second one device can do; 0 where it is not known (no MFU then).
        state: `Recorder.state()` of the checkpoint resumed from; None for a fresh run.
        step: Completed steps of that checkpoint; 0 for a fresh run.
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
                "info": _describe(config, directory) | info,
                "objectives": [phase.objective for phase in config.phases],
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
        """Whether `step` gets a line in metrics.jsonl."""
        return due(self._config, step)

    def phase_started(self, index: int, objective: str, step: int) -> None:
        """Phase `index` begins after `step` completed steps. A phase begun again after a rollback is one event."""
        self._telemetry.phase = index
        begun = [event["phase"] for event in read_events(self._directory) if event["event"] == PhaseStarted.KIND]
        if index not in begun:
            record_event(self._directory, PhaseStarted(step=step, phase=index, objective=objective))
        self.flush()

    def step(self, record: StepRecord) -> None:
        """Take in one step; call it after every step, in order."""
        counters, telemetry = self._counters, self._telemetry
        counters.tokens[record.objective] = counters.tokens.get(record.objective, 0) + record.tokens
        counters.data_wait_seconds += record.data_wait_seconds
        counters.step_seconds.observe(record.step_seconds)
        self._since_line.add(record)
        self._since_written.add(record)
        self._recent.append(record.step_seconds)

        telemetry.step, telemetry.step_time = record.step, time.time()
        telemetry.phase = record.phase
        telemetry.loss[record.objective] = record.loss
        telemetry.learning_rate, telemetry.grad_norm = record.learning_rate, record.grad_norm
        telemetry.packing_ratio, telemetry.epochs = record.packing_ratio, record.epochs
        if record.workers is not None:
            telemetry.workers = record.workers
        if record.drawn is not None:
            counters.drawn = record.drawn
        if record.eval_loss is not None:
            telemetry.eval_loss, telemetry.eval_accuracy = record.eval_loss, record.eval_accuracy or {}
        if self.due(record.step) or record.eval_loss is not None:
            line = self._line(record)
            self._lines.append(line)
            self._writers.write(line)
            self._since_line = _Window()
        if time.monotonic() - self._written >= TELEMETRY_INTERVAL and self._writing.done():
            self._writing.result()
            self._writing = self._start_writing()

    def checkpoint_saved(self, step: int, seconds: float, path: Path, stall: float = 0.0) -> None:
        """The checkpoint after `step` steps is complete; saving took `seconds`, for `stall` of which training stood."""
        self._counters.checkpoint_seconds.observe(seconds)
        self._telemetry.checkpoint_step, self._telemetry.checkpoint_time = step, time.time()
        where = path.relative_to(self._directory) if path.is_relative_to(self._directory) else path
        times = {"seconds": round(seconds, 3), "stall_seconds": round(stall, 3)}
        record_event(self._directory, CheckpointSaved(step=step, **times, path=str(where)))
        self.flush()

    def state(self) -> dict[str, Any]:
        """JSON for the checkpoint, so that every total goes on exactly. The lines up to here are on disk after it."""
        self._lines.sync()
        return {"counters": self._counters.model_dump(mode="json"), "since_line": asdict(self._since_line)}

    def flush(self) -> None:
        """Write telemetry.json now; otherwise a thread does about once a second, off the training step."""
        self._writing.result()
        self._start_writing().result()

    def close(self) -> None:
        self.flush()
        self._disk.shutdown()
        self._lines.close()
        self._writers.close()

    def _line(self, record: StepRecord) -> dict[str, Any]:
        window = self._since_line
        return {
            "step": record.step,
            "phase": record.phase,
            "objective": record.objective,
            "loss": record.loss,
            "tokens": sum(self._counters.tokens.values()),
            "learning_rate": record.learning_rate,
            "grad_norm": record.grad_norm,
            "step_seconds": window.seconds / window.steps,
            "tokens_per_second": window.tokens_per_second,
            "mfu": window.mfu(self._peak_flops),
            "data_wait_seconds": window.wait / window.steps,
            "packing_ratio": record.packing_ratio,
            **({"eval_loss": record.eval_loss} if record.eval_loss is not None else {}),
            **({"eval_accuracy": record.eval_accuracy} if record.eval_accuracy is not None else {}),
        }

    def _start_writing(self) -> Future[None]:
        """Counters shown never fall: after a rollback they stand still until the run is past where it had been."""
        window, telemetry = self._since_written, self._telemetry
        if window.steps:
            telemetry.tokens_per_second = window.tokens_per_second
            telemetry.tokens_per_second_per_device = window.tokens_per_second / self._devices
            telemetry.mfu = window.mfu(self._peak_flops)
            telemetry.step_seconds = statistics.fmean(self._recent)
            self._since_written = _Window()
        steps = self._counters.step_seconds
        telemetry.checkpoint_interval_seconds = _interval(
            self._config, steps.sum / steps.count if steps.count else math.nan
        )
        shown = Counters.model_validate(highest(self._counters.model_dump(mode="json"), self._floor))
        held = dict(held_events(self._directory))
        now = telemetry.model_copy(update={"counters": shown, "time": time.time(), "unwritten": held})
        self._written = time.monotonic()
        return self._disk.submit(Telemetry.write, self._directory, now.model_dump_json())
