"""The events of a run: one type per kind of line in events.jsonl.

The class attributes of a type say how metrics, report, dashboards and documents treat its events. They derive their
lists from `EVENT_TYPES`, so a new kind is one class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from monitoring.log import append_event

EventLine = dict[str, Any]
"""A line of events.jsonl."""

State = Literal["not_started", "running", "stopped", "failed", "finished"]
"""State of a run. `not_started`: no worker has started yet."""

Reason = Literal["died", "out_of_memory", "node_lost", "exception", "hung", "preempted"]
"""Why the workers were interrupted."""
REASONS: tuple[Reason, ...] = get_args(Reason)

Layer = Literal["Phases", "Checkpoints", "Interruptions", "Run"]
"""A set of vertical lines on the dashboards, which Grafana shows or hides together."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A line of events.jsonl. The line holds the time, the kind and the fields of the event."""

    KIND: ClassVar[str]
    """Value of `event` in the line, and label of `detour_events_total`."""
    STATE: ClassVar[State | None] = None
    """State of the run from this event on. None: the event does not change the state."""
    INTERRUPTS: ClassVar[bool] = False
    """The workers are started again after the event. Its field `reason` is a `Reason`."""
    ENDS_WORKERS: ClassVar[bool] = False
    """No worker trains after the event until new workers start."""
    FAULT: ClassVar[bool] = False
    """Something went wrong. The report marks the event in red."""
    WARNING: ClassVar[bool] = False
    """Training continues as before, but a person should know. The Health dashboard counts faults and warnings."""
    LAYER: ClassVar[Layer | None] = None
    """Layer of the dashboards that marks the event. None: the dashboards do not mark it."""
    TEXT: ClassVar[str]
    """Sentence about the event, for `tell`: a format of its fields and of `_parts`."""


@dataclass(frozen=True, kw_only=True)
class WorkersStarted(Event):
    """The worker processes are ready; `workers` holds the address of each, `spares` counts those that had waited."""

    KIND = "workers_started"
    TEXT = "{count} started on {nodes}, ready after {seconds:.1f} s{waited}"
    STATE = "running"
    workers: list[str]
    seconds: float
    spares: int = 0


@dataclass(frozen=True, kw_only=True)
class Branched(Event):
    """This run continues from the checkpoint after `step` completed steps of the run in the directory `run`."""

    KIND = "branched"
    TEXT = "branched off {run} at step {step:,}"
    LAYER = "Run"
    step: int
    run: str


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The first training of this run begins."""

    KIND = "started"
    TEXT = "training begins, in {precision}"
    LAYER = "Run"
    STATE = "running"
    step: int
    precision: str


@dataclass(frozen=True, kw_only=True)
class InitialModel(Event):
    """A new run starts from the weights of `init`; `sha256` identifies them, wherever they lie later."""

    KIND = "initial_model"
    TEXT = "starts from the weights of {init}"
    init: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event):
    """Phase `phase`, counted from 0, begins after `step` completed steps."""

    KIND = "phase_started"
    TEXT = "phase {number} begins after step {step:,}: {objective}"
    LAYER = "Phases"
    step: int
    phase: int
    objective: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is complete. Training stood still for `stall_seconds` of the `seconds` that it took."""

    KIND = "checkpoint_saved"
    TEXT = "checkpoint saved at step {step:,} in {seconds:.1f} s"
    LAYER = "Checkpoints"
    step: int
    seconds: float
    stall_seconds: float
    path: str
    """Path of the checkpoint, relative to the run directory if it lies inside."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint could not be written or mirrored. Older checkpoints are untouched."""

    KIND = "checkpoint_failed"
    TEXT = "checkpoint failed: {reason}"
    LAYER = "Interruptions"
    FAULT = True
    reason: str


@dataclass(frozen=True, kw_only=True)
class CheckpointDamaged(Event):
    """A checkpoint failed its check at a resume and was set aside."""

    KIND = "checkpoint_damaged"
    TEXT = "checkpoint damaged and set aside: {reason}"
    LAYER = "Interruptions"
    FAULT = True
    reason: str


@dataclass(frozen=True, kw_only=True)
class WorkerFailed(Event):
    """A worker died, hung or raised an error. `step` is the last one reported; `cause` is Ray's account."""

    KIND = "worker_failed"
    TEXT = "worker failed after step {step:,}: {why}{who}: {detail}{because}"
    LAYER = "Interruptions"
    STATE = "running"
    INTERRUPTS = ENDS_WORKERS = FAULT = True
    step: int
    reason: Reason
    rank: int | None
    detail: str
    address: str | None = None
    """Address of the rank's node, where it is known."""
    cause: str | None = None
    collective: str | None = None
    """On a hang, the collective in which the other ranks wait."""


@dataclass(frozen=True, kw_only=True)
class Preempted(Event):
    """A node is about to be taken away. Everything is saved at `step`."""

    KIND = "preempted"
    TEXT = "preempted: a node is about to go; everything is saved at step {step:,}"
    LAYER = "Interruptions"
    STATE = "running"
    INTERRUPTS = ENDS_WORKERS = FAULT = True
    step: int
    reason: Reason = "preempted"


@dataclass(frozen=True, kw_only=True)
class Resized(Event):
    """The workers ended at `step` with everything saved, to start again on more nodes."""

    KIND = "resized"
    TEXT = "resized: nodes have become free; everything is saved at step {step:,}"
    ENDS_WORKERS = True
    step: int


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """Training continues from the checkpoint of `step`; `steps_lost` later steps are done again."""

    KIND = "resumed"
    TEXT = "resumed at step {step:,}{lost}, in {precision}"
    LAYER = "Run"
    STATE = "running"
    step: int
    precision: str
    steps_lost: int = 0


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run ended early, with everything saved at `step`."""

    KIND = "stopped"
    TEXT = "stopped early ({reason}); everything is saved at step {step:,}"
    LAYER = "Interruptions"
    STATE = "stopped"
    ENDS_WORKERS = True
    step: int
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The run was given up."""

    KIND = "failed"
    TEXT = "given up after step {step:,}: {detail}"
    LAYER = "Interruptions"
    STATE = "failed"
    ENDS_WORKERS = FAULT = True
    step: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class Exported(Event):
    """The final model was written to `path`, relative to the run directory."""

    KIND = "exported"
    TEXT = "the final model is in {path}"
    LAYER = "Run"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The run has trained its last step and exported its model."""

    KIND = "finished"
    TEXT = "finished: {step:,} steps"
    LAYER = "Run"
    STATE = "finished"
    ENDS_WORKERS = True
    step: int


@dataclass(frozen=True, kw_only=True)
class StepSkipped(Event):
    """The loss or the gradient was not finite, or no token had a label: the weights stayed. `where` names sequences."""

    KIND = "step_skipped"
    TEXT = "step {step:,} skipped: loss {loss}, gradient norm {grad_norm}; {where}"
    LAYER = "Interruptions"
    FAULT = True
    step: int
    loss: float
    grad_norm: float
    where: str


@dataclass(frozen=True, kw_only=True)
class LossSpike(Event):
    """The loss was far above `usual`, its running mean."""

    KIND = "loss_spike"
    TEXT = "loss spike at step {step:,}: {loss} after a mean of {usual}"
    WARNING = True
    LAYER = "Interruptions"
    step: int
    loss: float
    usual: float


@dataclass(frozen=True, kw_only=True)
class DataDamaged(Event):
    """`data.on_error: skip` leaves out `problems` damaged shards of a source; `first` names the first."""

    KIND = "data_damaged"
    TEXT = "data damaged: {problems:,} shards of {source} are left out; {first}"
    WARNING = True
    source: str
    problems: int
    first: str


@dataclass(frozen=True, kw_only=True)
class DocumentsSkipped(Event):
    """Damaged documents of a source were left out; `documents` counts them since the event before."""

    KIND = "documents_skipped"
    TEXT = "{documents:,} damaged documents of {source} left out"
    WARNING = True
    step: int
    source: str
    documents: int


EVENT_TYPES: tuple[type[Event], ...] = tuple(Event.__subclasses__())


def kinds_where(condition: Callable[[type[Event]], object]) -> tuple[str, ...]:
    """List the kinds of the event types that meet the condition, in the order of `EVENT_TYPES`."""
    return tuple(event.KIND for event in EVENT_TYPES if condition(event))


def record(directory: Path, event: Event) -> None:
    """Append an event to the run's events.jsonl, with the time. Several processes may do so at once."""
    append_event(directory, event.KIND, **asdict(event))


def tell(line: EventLine) -> str:
    """Return the time of day of an event and a sentence about it. An event of another version is told by its fields."""
    moment = datetime.fromisoformat(line["time"]).astimezone().strftime("%H:%M:%S")
    try:
        sentence = _TEXTS[line["event"]].format_map(line | _parts(line))
    except (KeyError, ValueError, TypeError):
        fields = (f"{key} {value}" for key, value in line.items() if key not in ("time", "event"))
        sentence = f"{line['event'].replace('_', ' ')}: {', '.join(fields)}"
    return f"{moment} {' '.join(sentence.split())}"


_TEXTS = {event.KIND: event.TEXT for event in EVENT_TYPES}


def _parts(line: EventLine) -> dict[str, str]:
    """Phrases that a format cannot make of the fields, because a field is a list, an index or None."""
    workers, rank, address, lost = (
        line.get("workers", ()),
        line.get("rank"),
        line.get("address"),
        line.get("steps_lost"),
    )
    return {
        "count": _counted(len(workers), "worker"),
        "nodes": _counted(len(set(workers)), "node"),
        "number": str(line.get("phase", 0) + 1),
        "why": str(line.get("reason")).replace("_", " "),
        "who": ("" if rank is None else f", rank {rank}") + (f" on {address}" if address else ""),
        "because": f" (Ray: {line['cause']})" if line.get("cause") else "",
        "waited": f"; {_counted(line['spares'], 'spare')} used" if line.get("spares") else "",
        "lost": f", {_counted(lost, 'step')} lost" if lost else "",
    }


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
