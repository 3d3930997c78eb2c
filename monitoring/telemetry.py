"""telemetry.json: the live state of a run in one small file, which the trainer replaces about once per second.

The metrics endpoint, the progress line and `detour monitor` read only this file and events.jsonl. Therefore they
outlive the workers.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ValidationError

from configs.files import write_atomically
from monitoring.log import surviving_full_disk
from monitoring.run_directory import RunDirectory

DISK_BLOCK = 4096
"""Bytes. The file is padded to whole blocks, so that a later document fits into the same blocks of a full disk."""

STEP_SECONDS = tuple(float(f"{0.01 * 30_000 ** (index / 46):.3g}") for index in range(47))
"""Histogram bounds from 0.01 to 300 seconds; each bound is a quarter above the one before."""
CHECKPOINT_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Histogram bounds, in seconds."""

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float. JSON holds null where it is not finite."""


class Histogram(BaseModel):
    """A Prometheus histogram of `count` observations; `counts[i]` of them were at most `bounds[i]` seconds."""

    bounds: tuple[float, ...]
    counts: list[int]
    count: int = 0
    sum: float = 0.0

    @classmethod
    def empty(cls, bounds: tuple[float, ...]) -> Self:
        """Make a histogram without observations."""
        return cls(bounds=bounds, counts=[0] * len(bounds))

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.count += 1
        self.sum += value
        for index, bound in enumerate(self.bounds):
            self.counts[index] += value <= bound


class Counters(BaseModel):
    """Totals that only grow. Checkpoints hold them, so that a resumed run continues from the totals of its step."""

    tokens: dict[str, int] = {}
    """Real tokens trained on, by objective."""
    data_wait_seconds: float = 0.0
    """Time that steps waited for their data."""
    drawn: dict[str, tuple[int, int, int]] = {}
    """Tokens and documents that entered the streams, and damaged documents left out, by source."""
    clipped: dict[str, tuple[int, int]] = {}
    """Steps whose gradient was clipped, and all steps, by the phase's index. Empty without clipping."""
    step_seconds: Histogram = Histogram.empty(STEP_SECONDS)
    checkpoint_seconds: Histogram = Histogram.empty(CHECKPOINT_SECONDS)

    def count_clipping(self, phase: int, clipped: bool) -> None:
        """Count one step of a phase."""
        before, steps = self.clipped.get(str(phase), (0, 0))
        self.clipped[str(phase)] = (before + clipped, steps + 1)

    def clipped_shares(self) -> dict[str, float]:
        """The share of clipped steps by the phase's index."""
        return {phase: clipped / steps for phase, (clipped, steps) in self.clipped.items()}


@dataclass(frozen=True)
class WorkerRecord:
    """How one rank saw its last step."""

    rank: int
    step_seconds: float
    """Time of the rank's own work: data wait, forward and backward, until it first waits for another rank."""
    memory_bytes: int
    """On a GPU the peak of its allocator, else the resident memory of the process."""
    gpu_utilization: float | None = None
    """Share of the last second in which the GPU ran a kernel, by NVML. None without NVML."""


class StepValues(BaseModel):
    """Numbers of one step. metrics.jsonl and telemetry.json hold them under these names."""

    learning_rate: Number = math.nan
    grad_norm: Number = math.nan
    """Global norm before clipping."""
    packing_ratio: Number = math.nan
    """Real tokens as a share of the token slots."""

    def step_values(self) -> dict[str, float]:
        """The fields declared here, by name."""
        return {name: getattr(self, name) for name in StepValues.model_fields}


class Rates(BaseModel):
    """Means over the steps since the last report. metrics.jsonl and telemetry.json hold them under these names."""

    tokens_per_second: Number = 0.0
    """Real tokens per second over all devices."""
    mfu: Number = 0.0
    """Model FLOPs utilisation: share of the devices' peak spent on the model's own operations. NaN: peak unknown."""

    def rates(self) -> dict[str, float]:
        """The fields declared here, by name."""
        return {name: getattr(self, name) for name in Rates.model_fields}


class Telemetry(StepValues, Rates):
    """The state of a run after `step` completed steps. Times are seconds since the epoch."""

    run: str
    info: dict[str, str | int | float]
    """Labels of `detour_run_info`."""
    objectives: list[str]
    """Objective of each phase, in order."""
    total_steps: int
    time: float = 0.0
    """When this document was written."""
    start_time: float = 0.0
    """When the run was first started."""
    step: int = 0
    resume_time: float = 0.0
    """When training was started or last resumed."""
    step_time: float | None = None
    """When the latest step since `resume_time` ended. None before that step."""
    phase: int = 0
    """Index of the current phase, from 0."""
    loss: dict[str, Number] = {}
    """Training loss by objective, at the latest step of each. Empty before the first step."""
    bits_per_byte: dict[str, Number] = {}
    """Bits of training loss per byte of the predicted text, by objective, at the latest step of each."""
    gradient_norms: dict[str, dict[str, Number]] = {}
    """The gradient's norm before clipping by objective and part of the model, at the latest logged step of each."""
    eval_loss: dict[str, Number] = {}
    """Held-out loss by objective. Empty without a held-out set."""
    eval_accuracy: dict[str, Number] = {}
    """Held-out accuracy by objective, from 0 to 1."""
    eval_bits_per_byte: dict[str, Number] = {}
    """Bits of held-out loss per byte of the predicted text, by objective."""
    tokens_per_second_per_device: Number = 0.0
    step_seconds: Number = math.nan
    """Mean of the latest steps, from which the time left is estimated."""
    epochs: dict[str, int] = {}
    """Epoch that each source has reached, from 0."""
    workers: list[WorkerRecord] = []
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    checkpoint_interval_seconds: Number = math.nan
    """Configured interval; an interval in steps or tokens is converted by the run's mean step time."""
    counters: Counters = Counters()
    unwritten: dict[str, int] = {}
    """Events that a full disk has not taken yet, by kind."""

    @property
    def objective(self) -> str:
        """Objective of the current phase."""
        return self.objectives[self.phase]

    def stopped(self) -> Self:
        """Return a copy without workers and with rates of 0."""
        idle = Rates().rates() | {"tokens_per_second_per_device": 0.0, "workers": []}
        return self.model_copy(update=idle)

    def shifted(self, seconds: float) -> Self:
        """Return a copy whose times are given by a clock that is `seconds` ahead of the writer's."""
        times = {name: getattr(self, name) for name in ("time", "start_time", "resume_time")}
        times |= {name: at for name in ("step_time", "checkpoint_time") if (at := getattr(self, name)) is not None}
        return self.model_copy(update={name: at + seconds for name, at in times.items()})

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Read the latest telemetry of a run; None if it is missing, damaged or unreadable."""
        try:
            return cls.model_validate_json(RunDirectory(directory).telemetry.read_bytes())
        except (OSError, ValidationError):
            return None

    @staticmethod
    def write(directory: Path, document: str) -> None:
        """Replace telemetry.json by `model_dump_json()`; a reader sees the old document or the new one.

        A full disk has no room for a second file, so the document then overwrites the old one in place. If that fails
        too, the file is only touched: the launcher takes a change of its time as a sign that the workers do not hang.
        """
        path = RunDirectory(directory).telemetry
        content = document.encode()
        content = content.ljust((len(content) // DISK_BLOCK + 1) * DISK_BLOCK)
        with surviving_full_disk(path):
            write_atomically(path, content)
            return
        with surviving_full_disk(path), path.open("r+b") as file:
            file.write(content.ljust(path.stat().st_size))
        os.utime(path)


def highest(left: Any, right: Any) -> Any:
    """Merge two trees of counts, taking the larger count of each leaf and every key of either tree.

    Lists of different lengths are histograms of different versions of Detour. The left list is taken then.
    """
    if isinstance(left, dict):
        return {key: highest(left.get(key, right.get(key)), right.get(key, left.get(key))) for key in left | right}
    if isinstance(left, list):
        return [highest(*pair) for pair in zip(left, right, strict=True)] if len(left) == len(right) else left
    return max(left, right)
