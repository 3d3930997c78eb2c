"""The events of a run: one type per kind of line in events.jsonl.

What metrics, report, dashboards and alerts need to know of a kind is said here, by its class: they derive their lists
from `EVENT_TYPES`. A new kind is one class.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from monitoring.log import append_event

State = Literal["unborn", "running", "stopped", "failed", "finished"]
"""Where a run stands. `unborn`: no worker has started yet."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A line of events.jsonl; its fields are the line's, after `time` and `event`."""

    KIND: ClassVar[str]
    STATE: ClassVar[State | None] = None
    """State of the run from this event on; None: the event does not change it."""
    INTERRUPTS: ClassVar[bool] = False
    """The workers are started again after it."""
    ENDS_WORKERS: ClassVar[bool] = False
    """No worker trains after it, until others start."""
    FAULT: ClassVar[bool] = False
    """Something went wrong: reports mark it, and dashboards annotate it."""


@dataclass(frozen=True, kw_only=True)
class WorkersStarted(Event):
    """Worker processes stand ready on these addresses, one per worker."""

    KIND = "workers_started"
    STATE = "running"
    workers: list[str]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The first training of this run begins."""

    KIND = "started"
    STATE = "running"
    step: int
    precision: str


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """Training goes on after `step` completed steps."""

    KIND = "resumed"
    STATE = "running"
    step: int
    precision: str


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event):
    """Phase `phase`, counted from 0, begins after `step` completed steps."""

    KIND = "phase_started"
    step: int
    phase: int
    objective: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is complete; training stood still for `stall_seconds` of the `seconds` it took."""

    KIND = "checkpoint_saved"
    step: int
    seconds: float
    stall_seconds: float
    path: str
    """Relative to the run directory where it lies in it."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint could not be written or mirrored; older ones are untouched."""

    KIND = "checkpoint_failed"
    FAULT = True
    reason: str


@dataclass(frozen=True, kw_only=True)
class CheckpointDamaged(Event):
    """A checkpoint failed its check at a resume and was set aside."""

    KIND = "checkpoint_damaged"
    FAULT = True
    reason: str


@dataclass(frozen=True, kw_only=True)
class WorkerFailed(Event):
    """A worker died, hung or raised; `step` is the last one reported."""

    KIND = "worker_failed"
    STATE = "running"
    INTERRUPTS = ENDS_WORKERS = FAULT = True
    step: int
    reason: str
    rank: int | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class Preempted(Event):
    """A node is about to be taken away; everything is saved at `step`."""

    KIND = "preempted"
    STATE = "running"
    INTERRUPTS = ENDS_WORKERS = FAULT = True
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Resized(Event):
    """The workers ended at `step` to go on with another number of nodes."""

    KIND = "resized"
    ENDS_WORKERS = True
    step: int


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run ended early with everything saved at `step`."""

    KIND = "stopped"
    STATE = "stopped"
    ENDS_WORKERS = FAULT = True
    step: int
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The run was given up."""

    KIND = "failed"
    STATE = "failed"
    ENDS_WORKERS = FAULT = True
    step: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class Exported(Event):
    """The final model was written to `path`, relative to the run directory."""

    KIND = "exported"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The run has trained its last step and exported its model."""

    KIND = "finished"
    STATE = "finished"
    ENDS_WORKERS = True
    step: int


@dataclass(frozen=True, kw_only=True)
class StepSkipped(Event):
    """A step's loss or gradient was not finite, so the weights stayed; `where` names the sequences."""

    KIND = "step_skipped"
    FAULT = True
    step: int
    loss: float
    grad_norm: float
    where: str


@dataclass(frozen=True, kw_only=True)
class LossSpike(Event):
    """The loss was far above `usual`, its running mean."""

    KIND = "loss_spike"
    step: int
    loss: float
    usual: float


@dataclass(frozen=True, kw_only=True)
class DataDamaged(Event):
    """`data.on_error: skip` leaves out damaged shards of a source, found before training; `first` is one of them."""

    KIND = "data_damaged"
    source: str
    problems: int
    first: str


@dataclass(frozen=True, kw_only=True)
class DocumentsSkipped(Event):
    """Damaged documents of a source were left out since the event before."""

    KIND = "documents_skipped"
    step: int
    source: str
    documents: int


EVENT_TYPES: tuple[type[Event], ...] = tuple(Event.__subclasses__())


def record(directory: Path, event: Event) -> None:
    """Append an event to the run's events.jsonl, with the time of day; safe from several processes at once."""
    append_event(directory, event.KIND, **asdict(event))
