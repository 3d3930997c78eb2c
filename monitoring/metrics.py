"""Every metric of the endpoint: its name, type, help, labels, and where its value comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from monitoring.telemetry import Histogram, Telemetry

Event = dict[str, Any]
Kind = Literal["gauge", "counter", "histogram"]
Sample = tuple[dict[str, str], float | Histogram]
"""Labels and value."""


@dataclass(frozen=True)
class Metric:
    """A metric of the endpoint. Every sample has the label `run` besides those given here."""

    name: str
    kind: Kind
    help: str
    samples: Sequence[Sample]


EVENTS = (
    *(
        "workers_started",
        "started",
        "phase_started",
        "checkpoint_saved",
        "checkpoint_failed",
        "checkpoint_damaged",
        "worker_failed",
    ),
    *("preempted", "resized", "resumed", "stopped", "failed", "exported", "finished", "step_skipped", "loss_spike"),
    *("data_damaged", "documents_skipped"),
)
"""Kinds of events counted from zero, so that a first one shows as a rise; any other is counted too."""
INTERRUPTIONS = ("worker_failed", "preempted")
"""Events after which the workers are started again."""
State = Literal["unborn", "running", "stopped", "failed", "finished"]
REASONS = ("died", "out_of_memory", "node_lost", "exception", "hung", "preempted")
"""Reasons counted from zero, as above."""


def state_of(events: Sequence[Event]) -> State:
    """Where a run stands by its events. One whose launcher was killed is `running` for all they know."""
    turns: dict[str, State] = {"stopped": "stopped", "failed": "failed", "finished": "finished"}
    turns |= dict.fromkeys(("workers_started", "started", "resumed", *INTERRUPTIONS), "running")
    states = [turns[event["event"]] for event in events if event["event"] in turns]
    return "finished" if "finished" in states else states[-1] if states else "unborn"


def seen_after(events: Sequence[Event], now: Telemetry | None) -> Telemetry | None:
    """The telemetry, with nobody at work where the events say that the workers have ended since it was written."""
    kinds = (*INTERRUPTIONS, "resized", "stopped", "failed", "finished")
    ends = [event["time"] for event in events if event["event"] in kinds]
    gone = bool(ends) and now is not None and datetime.fromisoformat(ends[-1]).timestamp() > now.time
    return now.stopped() if now is not None and gone else now


def run_metrics(now: Telemetry | None, events: Sequence[Event]) -> list[Metric]:
    """What is known of a run: without telemetry only its restarts and its name."""
    kinds = [event["event"] for event in events]
    kinds += [kind for kind, count in (now.unwritten if now else {}).items() for _ in range(count)]
    return [_restarts(events), _count_events(kinds), _info(now), *(_training_metrics(now) if now else [])]


def count_restarts(events: Iterable[Event]) -> Counter[str]:
    """Interruptions by the reason the event gives, else by its name."""
    counts = Counter(dict.fromkeys(REASONS, 0))
    counts.update(str(event.get("reason") or event["event"]) for event in events if event["event"] in INTERRUPTIONS)
    return counts


def _restarts(events: Iterable[Event]) -> Metric:
    samples = _each("reason", count_restarts(events))
    return Metric("detour_launcher_restarts_total", "counter", "Interruptions of the workers, by reason", samples)


def _count_events(kinds: Iterable[str]) -> Metric:
    counts = Counter(dict.fromkeys(EVENTS, 0))
    counts.update(kinds)
    return Metric("detour_events_total", "counter", "Lines of events.jsonl, by kind", _each("event", counts))


def _info(now: Telemetry | None) -> Metric:
    labels = {key: str(value) for key, value in now.info.items()} if now else {}
    return Metric("detour_run_info", "gauge", "What the run is; always 1", [(labels, 1)])


def _training_metrics(now: Telemetry) -> list[Metric]:
    begun = bool(now.loss)  # before the first step there is no norm or rate, which is not the same as one that is NaN
    return [
        Metric(
            "detour_train_loss",
            "gauge",
            "Training loss, mean over the paying positions, at the latest step of each objective",
            _each("objective", now.loss),
        ),
        Metric(
            "detour_eval_loss",
            "gauge",
            "Loss on the held-out set, mean over the paying positions, at its latest evaluation",
            _each("objective", now.eval_loss),
        ),
        Metric(
            "detour_eval_accuracy_ratio",
            "gauge",
            "Share of the held-out set's paying positions whose token the model finds likeliest",
            _each("objective", now.eval_accuracy),
        ),
        Metric(
            "detour_train_tokens_total",
            "counter",
            "Real tokens trained on, padding not counted",
            _each("objective", now.counters.tokens),
        ),
        Metric(
            "detour_run_start_timestamp_seconds",
            "gauge",
            "Unix time at which the run was first started",
            _one(now.start_time),
        ),
        Metric(
            "detour_run_resume_timestamp_seconds",
            "gauge",
            "Unix time at which training was started or last resumed",
            _one(now.resume_time),
        ),
        Metric("detour_train_step", "gauge", "Completed optimizer steps", _one(now.step)),
        Metric("detour_train_steps_planned", "gauge", "Optimizer steps of the whole run", _one(now.total_steps)),
        Metric(
            "detour_train_step_timestamp_seconds",
            "gauge",
            "Unix time at which the latest step ended, or training was resumed after it",
            _one(now.step_time or now.resume_time),
        ),
        Metric(
            "detour_train_tokens_per_second",
            "gauge",
            "Real tokens a second over all devices",
            _one(now.tokens_per_second),
        ),
        Metric(
            "detour_train_tokens_per_second_per_device",
            "gauge",
            "Real tokens a second on one device",
            _one(now.tokens_per_second_per_device),
        ),
        Metric(
            "detour_train_mfu_ratio",
            "gauge",
            "Model FLOPs utilisation: the share of the devices' peak spent on the model's own operations",
            _one(now.mfu),
        ),
        Metric(
            "detour_train_step_seconds",
            "histogram",
            "Wall time of a step, waiting for data included",
            _one(now.counters.step_seconds),
        ),
        Metric(
            "detour_train_data_wait_seconds_total",
            "counter",
            "Time steps waited for their data",
            _one(now.counters.data_wait_seconds),
        ),
        Metric(
            "detour_train_learning_rate",
            "gauge",
            "Learning rate of the latest step",
            _one(now.learning_rate if begun else None),
        ),
        Metric(
            "detour_train_grad_norm",
            "gauge",
            "Global gradient norm before clipping",
            _one(now.grad_norm if begun else None),
        ),
        Metric(
            "detour_train_phase",
            "gauge",
            "1 on the current phase, 0 on the others",
            [
                ({"phase": str(index), "objective": objective}, float(index == now.phase))
                for index, objective in enumerate(now.objectives)
            ],
        ),
        Metric(
            "detour_data_packing_ratio",
            "gauge",
            "Real tokens as a share of the token slots of the latest step",
            _one(now.packing_ratio if begun else None),
        ),
        Metric(
            "detour_data_epoch",
            "gauge",
            "Epoch each source has reached, from 0",
            _each("source", now.epochs),
        ),
        Metric(
            "detour_data_tokens_total",
            "counter",
            "Tokens of documents that entered the streams, special tokens included",
            _each("source", {source: drawn[0] for source, drawn in now.counters.drawn.items()}),
        ),
        Metric(
            "detour_data_documents_total",
            "counter",
            "Documents that entered the streams",
            _each("source", {source: drawn[1] for source, drawn in now.counters.drawn.items()}),
        ),
        Metric(
            "detour_data_skipped_documents_total",
            "counter",
            "Damaged documents left out (data.on_error: skip)",
            _each("source", {source: drawn[2] for source, drawn in now.counters.drawn.items()}),
        ),
        Metric(
            "detour_checkpoint_seconds",
            "histogram",
            "Time to save a checkpoint",
            _one(now.counters.checkpoint_seconds),
        ),
        Metric("detour_checkpoint_step", "gauge", "Step of the newest checkpoint", _one(now.checkpoint_step)),
        Metric(
            "detour_checkpoint_timestamp_seconds",
            "gauge",
            "Unix time at which the newest checkpoint was complete",
            _one(now.checkpoint_time),
        ),
        Metric(
            "detour_checkpoint_interval_seconds",
            "gauge",
            "Time between two checkpoints as configured; steps and tokens at the mean step time",
            _one(now.checkpoint_interval_seconds if begun else None),
        ),
        Metric(
            "detour_worker_step_seconds",
            "gauge",
            "Time each rank took for its own part of the latest logged step: until it first waits for the others",
            _each("rank", {worker.rank: worker.step_seconds for worker in now.workers}),
        ),
        Metric(
            "detour_worker_memory_bytes",
            "gauge",
            "Memory of each rank: on a GPU the most its allocator has held at once, else what its process holds",
            _each("rank", {worker.rank: worker.memory_bytes for worker in now.workers}),
        ),
        Metric(
            "detour_worker_gpu_utilization_ratio",
            "gauge",
            "Share of the time in which the rank's GPU ran a kernel",
            _each(
                "rank",
                {worker.rank: worker.gpu_utilization for worker in now.workers if worker.gpu_utilization is not None},
            ),
        ),
    ]


def _one(value: float | Histogram | None) -> list[Sample]:
    return [] if value is None else [({}, value)]


def _each(label: str, values: Mapping[Any, float]) -> list[Sample]:
    return [({label: str(key)}, value) for key, value in values.items()]
