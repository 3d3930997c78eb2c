"""The table of metrics. Endpoint, table in docs/monitoring.md and panels of the Run dashboard are made from its rows.

A new metric is one row of `METRICS`; `python -m monitoring.docs` and `python -m monitoring.grafana.dashboards` then
write the document and the dashboard again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from monitoring.events import State
from monitoring.run_state import RunState
from monitoring.telemetry import Histogram, Telemetry

Type = Literal["gauge", "counter", "histogram"]
Section = Literal["Learning", "Speed", "Data and checkpoints", "Interruptions and events"]
Query = tuple[str, str]
"""PromQL, and the legend of its series."""
Steps = Sequence[tuple[float, str]]
"""Thresholds: from this value on the panel has this colour. Below the first value it is green."""

RUN = '{run="$run",id="$id"}'
"""PromQL selector of the run that the Run dashboard shows. A run's name is not a pattern there."""
CURRENT = "and on (instance, job, run, id, objective) detour_train_phase == 1"
"""PromQL that keeps the current objective, because the series of an earlier objective stands still."""
WARN, BAD = "orange", "red"

ByLabel = Mapping[str, float] | Mapping[int, float] | Mapping[tuple[str, str], float]
"""Numbers by the value of a label, or by the values of two labels."""
Value = float | Histogram | ByLabel | None
Sample = tuple[dict[str, str], float | Histogram]
"""Labels and value."""


@dataclass(frozen=True)
class Panel:
    """A graph of the Run dashboard."""

    section: Section
    title: str
    description: str
    legend: str = ""
    """Legend of the default query. Empty: the value of the metric's label."""
    queries: Sequence[Query] = ()
    """Empty: the metric itself, or the quantiles of a histogram."""
    width: int = 6
    """Number of columns, of the 24 of a dashboard."""
    format: str = ""
    """Grafana's name of a number format. Empty: derived from the metric's unit."""
    low: float | None = 0
    high: float | None = None
    thresholds: Steps = ()


@dataclass(frozen=True)
class Metric:
    """A row of the table. Every sample has the labels `run` and `id` besides those of the row.

    Args:
        name: Name on the endpoint; a counter's ends in `_total`.
        type: Prometheus' type.
        help: One line for endpoint and document.
        unit: Unit of the value, in words; empty for a bare number.
        value: Computes the value from the telemetry. The metric is absent before the first telemetry.
        run_value: Takes the place of `value` in a metric that exists before the first telemetry.
        labels: Labels besides `run` and `id`. With labels, the value is a mapping from their values to numbers.
        free_labels: The value is a mapping from labels to their values, and the metric is always 1.
        panel: Graph on the Run dashboard; None: no graph.
    """

    name: str
    type: Type
    help: str
    unit: str = ""
    value: Callable[[Telemetry], Value] | None = None
    run_value: Callable[[RunState], ByLabel | float] | None = None
    labels: tuple[str, ...] = ()
    free_labels: Callable[[Telemetry], Mapping[str, object]] | None = None
    panel: Panel | None = None

    def samples(self, run: RunState) -> list[Sample] | None:
        """Compute the samples. None: the metric does not exist before the first telemetry."""
        if self.free_labels:
            labels = self.free_labels(run.telemetry) if run.telemetry else {}
            return [({key: str(value) for key, value in labels.items()}, 1.0)]
        if self.run_value:
            value: Value = self.run_value(run)
        elif run.telemetry is None or self.value is None:
            return None
        else:
            value = self.value(run.telemetry)
        if value is None:
            return []
        return self._labelled(value) if isinstance(value, Mapping) else [({}, value)]

    def _labelled(self, values: ByLabel) -> list[Sample]:
        return [
            (dict(zip(self.labels, key if isinstance(key, tuple) else (str(key),), strict=True)), value)
            for key, value in values.items()
        ]


def _after_step(value: Callable[[Telemetry], float]) -> Callable[[Telemetry], float | None]:
    """Leave a value out before the first step, because it is NaN then and NaN would mean a broken step."""
    return lambda now: value(now) if now.loss else None


METRICS: tuple[Metric, ...] = (
    Metric(
        "detour_launcher_restarts_total",
        "counter",
        "Interruptions of the workers, by reason",
        labels=("reason",),
        run_value=lambda run: run.restarts,
        panel=Panel(
            "Interruptions and events",
            "Interruptions",
            "Total by reason.",
            width=8,
            thresholds=[(5, BAD)],
        ),
    ),
    Metric(
        "detour_events_total",
        "counter",
        "Lines of events.jsonl, by kind",
        labels=("event",),
        run_value=lambda run: run.events,
        panel=Panel(
            "Interruptions and events",
            "Events",
            "New lines of events.jsonl per interval, by kind.",
            queries=[(f"increase(detour_events_total{RUN}[$__rate_interval]) > 0", "{{event}}")],
            width=8,
        ),
    ),
    Metric(
        "detour_run_state",
        "gauge",
        "1 on the state of the run, 0 on the others",
        labels=("state",),
        run_value=lambda run: {state: float(state == run.state) for state in get_args(State)},
    ),
    Metric(
        "detour_clock_seconds",
        "gauge",
        "Unix time of the endpoint's machine, to which every other time of the run refers",
        "seconds",
        run_value=lambda run: run.time,
    ),
    Metric(
        "detour_run_info",
        "gauge",
        "Description of the run in its labels; always 1",
        labels=("model", "phases", "nodes", "precision"),
        free_labels=lambda now: now.info,
    ),
    Metric(
        "detour_train_loss",
        "gauge",
        "Training loss, mean over the label positions, at the latest step of each objective",
        "nats",
        lambda now: now.loss,
        labels=("objective",),
        panel=Panel(
            "Learning",
            "Training loss",
            "Loss of the current objective; the switch starts a new curve.",
            queries=[(f"detour_train_loss{RUN} {CURRENT}", "{{objective}}")],
            width=12,
            low=None,
        ),
    ),
    Metric(
        "detour_eval_loss",
        "gauge",
        "Loss on the held-out set, mean over the label positions, at its latest evaluation",
        "nats",
        lambda now: now.eval_loss,
        labels=("objective",),
        panel=Panel(
            "Learning",
            "Held-out loss",
            "Loss of both objectives in either phase; empty without data.evaluation.",
            width=12,
            low=None,
        ),
    ),
    Metric(
        "detour_eval_accuracy_ratio",
        "gauge",
        "Share of the held-out set's label positions at which the likeliest token is the right one",
        "ratio",
        lambda now: now.eval_accuracy,
        labels=("objective",),
        panel=Panel(
            "Learning",
            "Held-out accuracy",
            "Share of the label positions at which the likeliest token is the right one.",
        ),
    ),
    Metric(
        "detour_train_bits_per_byte",
        "gauge",
        "Bits of training loss per byte of the predicted text, which compares tokenizers, at the latest step",
        "",
        lambda now: now.bits_per_byte,
        labels=("objective",),
    ),
    Metric(
        "detour_train_layer_gradient_norm",
        "gauge",
        "Norm of the gradient before clipping by layer, and of `embeddings` and `head`, at the latest logged step",
        "",
        lambda now: {
            (objective, part): norm for objective, norms in now.gradient_norms.items() for part, norm in norms.items()
        },
        labels=("objective", "layer"),
        panel=Panel(
            "Learning",
            "Gradient norm by layer",
            "Before clipping. It shows how deep an objective's signal reaches.",
            queries=[(f"detour_train_layer_gradient_norm{RUN} {CURRENT}", "{{objective}} {{layer}}")],
            width=12,
        ),
    ),
    Metric(
        "detour_eval_bits_per_byte",
        "gauge",
        "Bits of held-out loss per byte of the predicted text, which compares tokenizers",
        "",
        lambda now: now.eval_bits_per_byte,
        labels=("objective",),
    ),
    Metric(
        "detour_train_tokens_total",
        "counter",
        "Real tokens trained on, without padding",
        "tokens",
        lambda now: now.counters.tokens,
        labels=("objective",),
        panel=Panel("Learning", "Tokens trained", "Real tokens by objective."),
    ),
    Metric(
        "detour_run_start_timestamp_seconds",
        "gauge",
        "Unix time at which the run was first started",
        "seconds",
        lambda now: now.start_time,
    ),
    Metric(
        "detour_run_resume_timestamp_seconds",
        "gauge",
        "Unix time at which training was started or last resumed",
        "seconds",
        lambda now: now.resume_time,
    ),
    Metric("detour_train_step", "gauge", "Completed optimizer steps", "steps", lambda now: now.step),
    Metric(
        "detour_train_steps_planned", "gauge", "Optimizer steps of the whole run", "steps", lambda now: now.total_steps
    ),
    Metric(
        "detour_train_step_timestamp_seconds",
        "gauge",
        "Unix time at which the latest step ended, or training was resumed after it",
        "seconds",
        lambda now: now.step_time or now.resume_time,
    ),
    Metric(
        "detour_train_tokens_per_second",
        "gauge",
        "Real tokens per second over all devices",
        "tokens per second",
        lambda now: now.tokens_per_second,
        panel=Panel(
            "Speed",
            "Throughput",
            "Real tokens per second.",
            queries=[
                (f"detour_train_tokens_per_second{RUN}", "all devices"),
                (f"detour_train_tokens_per_second_per_device{RUN}", "per device"),
            ],
        ),
    ),
    Metric(
        "detour_train_tokens_per_second_per_device",
        "gauge",
        "Real tokens per second per device",
        "tokens per second",
        lambda now: now.tokens_per_second_per_device,
    ),
    Metric(
        "detour_train_mfu_ratio",
        "gauge",
        "Model FLOPs utilisation: the share of the devices' peak spent on the model's own operations",
        "ratio",
        lambda now: now.mfu,
        panel=Panel("Speed", "Model FLOPs utilisation", "Share of the devices' peak.", "MFU"),
    ),
    Metric(
        "detour_train_step_seconds",
        "histogram",
        "Wall time per step, with the wait for its data",
        "seconds",
        lambda now: now.counters.step_seconds,
        panel=Panel("Speed", "Step time", "Quantiles over the steps of the five minutes before."),
    ),
    Metric(
        "detour_train_data_wait_seconds_total",
        "counter",
        "Time that steps waited for their data",
        "seconds",
        lambda now: now.counters.data_wait_seconds,
        panel=Panel(
            "Speed",
            "Data wait",
            "Share of the step spent waiting for its data.",
            queries=[(f"run:detour_train_data_wait:ratio{RUN}", "waiting")],
            format="percentunit",
            thresholds=[(0.05, WARN), (0.1, BAD)],
        ),
    ),
    Metric(
        "detour_train_learning_rate",
        "gauge",
        "Learning rate of the latest step",
        "",
        _after_step(lambda now: now.learning_rate),
        panel=Panel("Learning", "Learning rate", "Restarts at the switch.", "learning rate", format="sci"),
    ),
    Metric(
        "detour_train_grad_norm",
        "gauge",
        "Global gradient norm before clipping",
        "",
        _after_step(lambda now: now.grad_norm),
        panel=Panel("Learning", "Gradient norm", "Global norm before clipping.", "norm"),
    ),
    Metric(
        "detour_train_clipped_ratio",
        "gauge",
        "Share of the steps of each phase whose gradient was clipped; absent with optimizer.clip: 0",
        "ratio",
        lambda now: {
            (phase, now.objectives[int(phase)]): share
            for phase, share in now.counters.clipped_shares().items()
            if int(phase) < len(now.objectives)
        },
        labels=("phase", "objective"),
        panel=Panel(
            "Learning",
            "Clipped steps",
            "Share of each phase's steps so far whose gradient was clipped; empty with optimizer.clip: 0.",
            "{{phase}} {{objective}}",
            high=1,
        ),
    ),
    Metric(
        "detour_train_phase",
        "gauge",
        "1 on the current phase, 0 on the others",
        "",
        lambda now: {(str(index), name): float(index == now.phase) for index, name in enumerate(now.objectives)},
        labels=("phase", "objective"),
    ),
    Metric(
        "detour_data_packing_ratio",
        "gauge",
        "Real tokens as a share of the token slots of the latest step",
        "ratio",
        _after_step(lambda now: now.packing_ratio),
        panel=Panel("Data and checkpoints", "Packing", "Real tokens as a share of the token slots.", "packing", high=1),
    ),
    Metric(
        "detour_data_epoch",
        "gauge",
        "Epoch that each source has reached, from 0",
        "epochs",
        lambda now: now.epochs,
        labels=("source",),
        panel=Panel("Data and checkpoints", "Epochs", "Epoch that each source has reached, from 0."),
    ),
    Metric(
        "detour_data_tokens_total",
        "counter",
        "Tokens of documents that entered the streams, with special tokens",
        "tokens",
        lambda now: {source: drawn[0] for source, drawn in now.counters.drawn.items()},
        labels=("source",),
    ),
    Metric(
        "detour_data_documents_total",
        "counter",
        "Documents that entered the streams",
        "documents",
        lambda now: {source: drawn[1] for source, drawn in now.counters.drawn.items()},
        labels=("source",),
        panel=Panel("Data and checkpoints", "Documents drawn", "Documents that entered the streams, by source."),
    ),
    Metric(
        "detour_data_skipped_documents_total",
        "counter",
        "Damaged documents left out (data.on_error: skip)",
        "documents",
        lambda now: {source: drawn[2] for source, drawn in now.counters.drawn.items()},
        labels=("source",),
    ),
    Metric(
        "detour_checkpoint_seconds",
        "histogram",
        "Time to save a checkpoint",
        "seconds",
        lambda now: now.counters.checkpoint_seconds,
        panel=Panel(
            "Data and checkpoints",
            "Time to save a checkpoint",
            "Mean and 95th percentile of the saves so far.",
            queries=[
                (f"detour_checkpoint_seconds_sum{RUN} / (detour_checkpoint_seconds_count{RUN} > 0)", "mean"),
                (f"histogram_quantile(0.95, detour_checkpoint_seconds_bucket{RUN})", "p95"),
            ],
        ),
    ),
    Metric(
        "detour_checkpoint_step",
        "gauge",
        "Step of the newest checkpoint",
        "steps",
        lambda now: now.checkpoint_step,
        panel=Panel(
            "Interruptions and events",
            "Steps and checkpoints",
            "A failure would cost the steps in the gap.",
            queries=[(f"detour_train_step{RUN}", "step"), (f"detour_checkpoint_step{RUN}", "newest checkpoint")],
            width=8,
        ),
    ),
    Metric(
        "detour_checkpoint_timestamp_seconds",
        "gauge",
        "Unix time at which the newest checkpoint was complete",
        "seconds",
        lambda now: now.checkpoint_time,
    ),
    Metric(
        "detour_checkpoint_interval_seconds",
        "gauge",
        "Configured time between two checkpoints; steps and tokens are converted by the mean step time",
        "seconds",
        _after_step(lambda now: now.checkpoint_interval_seconds),
    ),
    Metric(
        "detour_worker_step_seconds",
        "gauge",
        "Time of each rank's own work in the latest logged step, until it first waits for another rank",
        "seconds",
        run_value=lambda run: {key: worker.step_seconds for key, worker in run.workers.items()},
        labels=("rank", "node"),
    ),
    Metric(
        "detour_worker_memory_bytes",
        "gauge",
        "Memory of each rank: on a GPU the peak of its allocator, else the resident memory of the process",
        "bytes",
        run_value=lambda run: {key: float(worker.memory_bytes) for key, worker in run.workers.items()},
        labels=("rank", "node"),
    ),
    Metric(
        "detour_worker_gpu_utilization_ratio",
        "gauge",
        "Share of the time in which the rank's GPU ran a kernel",
        "ratio",
        run_value=lambda run: {
            key: worker.gpu_utilization for key, worker in run.workers.items() if worker.gpu_utilization is not None
        },
        labels=("rank", "node"),
    ),
)


def collect(run: RunState, metrics: Sequence[Metric] = METRICS) -> Iterator[tuple[Metric, list[Sample]]]:
    """Yield the metrics that exist now, with their samples."""
    for metric in metrics:
        samples = metric.samples(run)
        if samples or (samples is not None and run.telemetry):
            yield metric, samples
