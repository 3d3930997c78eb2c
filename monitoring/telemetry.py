"""telemetry.json: the live state of a run in one small file, replaced atomically by the trainer.

The metrics endpoint, the progress line and `detour monitor` read nothing but this file and events.jsonl, so they
outlive the workers.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ValidationError

from monitoring.log import surviving_full_disk

TELEMETRY = "telemetry.json"
BLOCK = 4096
"""Of a disk: a document that ends within the last one of the old can replace it where there is no room for another."""

STEP_SECONDS = tuple(float(f"{0.01 * 30_000 ** (index / 46):.3g}") for index in range(47))
"""From 0.01 to 300, each a quarter more than the one before: as fine as a quantile of any run's steps needs."""
CHECKPOINT_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float that is null in JSON where it is not finite."""


class Histogram(BaseModel):
    """A Prometheus histogram. `counts[i]` observations were at most `bounds[i]` seconds, `count` there were in all."""

    bounds: tuple[float, ...]
    counts: list[int]
    count: int = 0
    sum: float = 0.0

    @classmethod
    def of(cls, bounds: tuple[float, ...]) -> Self:
        return cls(bounds=bounds, counts=[0] * len(bounds))

    def observe(self, value: float) -> None:
        self.count += 1
        self.sum += value
        for index, bound in enumerate(self.bounds):
            self.counts[index] += value <= bound


class Counters(BaseModel):
    """What only grows. Saved in checkpoints, so that a resumed run goes on from the exact totals of its step."""

    tokens: dict[str, int] = {}
    """Real tokens trained on, by objective."""
    data_wait_seconds: float = 0.0
    drawn: dict[str, tuple[int, int, int]] = {}
    """Of each source: tokens and documents that entered the streams, and damaged documents left out."""
    step_seconds: Histogram = Histogram.of(STEP_SECONDS)
    checkpoint_seconds: Histogram = Histogram.of(CHECKPOINT_SECONDS)


@dataclass(frozen=True)
class WorkerRecord:
    """One rank's own view of its last step."""

    rank: int
    step_seconds: float
    """Its own part: waiting for data, forward and backward, up to where it first waits for the data-parallel ranks."""
    memory_bytes: int
    gpu_utilization: float | None = None
    """Share of the last second in which its GPU ran a kernel, by NVML; None without one."""


class Telemetry(BaseModel):
    """The state of a run after `step` completed steps. Times are seconds since the epoch."""

    run: str
    info: dict[str, str | int | float]
    objectives: list[str]
    """Of each phase, in order."""
    total_steps: int
    time: float = 0.0
    """When this was written."""
    start_time: float = 0.0
    """When the run was first started."""
    step: int = 0
    resume_time: float = 0.0
    """When training was started or last resumed."""
    step_time: float | None = None
    """When the last step since then ended."""
    phase: int = 0
    loss: dict[str, Number] = {}
    """By objective, at the latest step that had it."""
    eval_loss: dict[str, Number] = {}
    """By objective, on the held-out set; empty without one."""
    eval_accuracy: dict[str, Number] = {}
    learning_rate: Number = math.nan
    grad_norm: Number = math.nan
    tokens_per_second: Number = 0.0
    tokens_per_second_per_device: Number = 0.0
    mfu: Number = 0.0
    """Means of the steps since the last writing, as the two above."""
    step_seconds: Number = math.nan
    """Mean of the latest steps, for the time left."""
    packing_ratio: Number = math.nan
    epochs: dict[str, int] = {}
    workers: list[WorkerRecord] = []
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    checkpoint_interval_seconds: Number = math.nan
    """As configured; an interval in steps or tokens at the run's mean step time."""
    counters: Counters = Counters()
    unwritten: dict[str, int] = {}
    """Events that a full disk has not taken yet, by kind."""

    @property
    def objective(self) -> str:
        return self.objectives[self.phase]

    def stopped(self) -> Self:
        """The same state with nobody working on it: no ranks, no throughput."""
        idle = {"workers": [], "tokens_per_second": 0.0, "tokens_per_second_per_device": 0.0, "mfu": 0.0}
        return self.model_copy(update=idle)

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """The latest telemetry of a run; None before the first, or where it is damaged or cannot be read."""
        try:
            return cls.model_validate_json((directory / TELEMETRY).read_bytes())
        except (OSError, ValidationError):
            return None

    @staticmethod
    def write(directory: Path, document: str) -> None:
        """Replace telemetry.json by `model_dump_json()`; a reader sees the old one or the new one, never a part.

        On a full disk it is written over the old one, which takes no more room, or else only touched: that it changes
        is how the launcher knows that the workers do not hang.
        """
        path, new = directory / TELEMETRY, directory / f".{TELEMETRY}.new"
        content = document.encode()
        content = content.ljust((len(content) // BLOCK + 1) * BLOCK)
        with surviving_full_disk(new):
            new.write_bytes(content)
            new.replace(path)
            return
        new.unlink(missing_ok=True)
        with surviving_full_disk(path), path.open("r+b") as file:
            file.write(content.ljust(path.stat().st_size))
        os.utime(path)


def highest(left: Any, right: Any) -> Any:
    """Element by element the larger of two equally shaped trees of counts; a key that one lacks is kept.

    Lists of different lengths are histograms of different versions of Detour: the left one counts.
    """
    if isinstance(left, dict):
        return {key: highest(left.get(key, right.get(key)), right.get(key, left.get(key))) for key in left | right}
    if isinstance(left, list):
        return [highest(*pair) for pair in zip(left, right, strict=True)] if len(left) == len(right) else left
    return max(left, right)
