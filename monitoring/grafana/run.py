"""The dashboard of one run: large numbers on top, then the panels of the table of metrics, section by section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from monitoring.grafana.board import current_loss, event_annotations, last, new_board
from monitoring.grafana.panels import Json, figure, graph, row
from monitoring.metrics import BAD, METRICS, RUN, WARN, Metric, Query, Section

UNITS = {
    "seconds": "s",
    "bytes": "bytes",
    "ratio": "percentunit",
    "tokens": "short",
    "tokens per second": "short",
    "documents": "short",
}
"""Grafana's number format for each unit; a plain number for other units."""


def run(metrics: Sequence[Metric] = METRICS) -> Json:
    """One screen for one run: is it healthy, how fast is it, what has it learned, when does it end."""
    panels = _figures()
    for section in get_args(Section):
        panels += [
            row(section),
            *(_graph(metric) for metric in metrics if metric.panel and metric.panel.section == section),
        ]
    return new_board(
        "detour-run",
        "Detour: run",
        "Is it healthy, how fast is it, what has it learned, when does it end.",
        panels,
        several=False,
        annotations=event_annotations(RUN),
    )


def _graph(metric: Metric) -> Json:
    panel = metric.panel
    assert panel
    return graph(
        panel.title,
        panel.description,
        panel.format or UNITS.get(metric.unit, "none"),
        *(panel.queries or _default_queries(metric)),
        width=panel.width,
        thresholds=panel.thresholds,
        low=panel.low,
        high=panel.high,
    )


def _default_queries(metric: Metric) -> list[Query]:
    """The metric itself; of a histogram, quantiles over the five minutes before."""
    if metric.type == "histogram":
        buckets = f"rate({metric.name}_bucket{RUN}[5m])"
        return [(f"histogram_quantile({q}, {buckets})", f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)]
    legend = " ".join("{{" + label + "}}" for label in metric.labels)
    assert metric.panel
    return [(f"{metric.name}{RUN}", legend or metric.panel.legend or metric.panel.title.lower())]


def _figures() -> list[Json]:
    return [
        figure(
            "Progress",
            "Completed steps over planned steps.",
            "percentunit",
            (f"max({last(f'detour_train_step{RUN}')} / {last(f'detour_train_steps_planned{RUN}')})", "progress"),
            decimals=1,
        ),
        figure(
            "Time left",
            "Steps left times the wall time per step of the last 15 minutes, standstill included.",
            "s",
            (f"max(run:detour_train_eta_seconds{RUN})", "left"),
            decimals=1,
        ),
        figure(
            "Objective",
            "Objective of the current phase.",
            "none",
            (
                f"group by (objective) (detour_train_phase{RUN} == 1) "
                f"or on () group by (objective) ({last(f'detour_train_phase{RUN}')} == 1)",
                "{{objective}}",
            ),
            by_name=True,
        ),
        figure(
            "Loss",
            "Loss of the current objective.",
            "none",
            (current_loss(RUN), "loss"),
            decimals=3,
        ),
        figure(
            "Tokens trained",
            "Real tokens of all objectives.",
            "short",
            (f"max(sum by (instance, job) ({last(f'detour_train_tokens_total{RUN}')}))", "tokens"),
            decimals=1,
        ),
        figure(
            "Tokens per second",
            "Real tokens over all devices.",
            "short",
            (f"max(detour_train_tokens_per_second{RUN})", "tokens per second"),
            decimals=1,
        ),
        figure(
            "Alerts firing",
            "The Health dashboard names them.",
            "none",
            ('count(ALERTS{alertname=~"Detour.+",alertstate="firing",run="$run",id="$id"}) or vector(0)', "alerts"),
            thresholds=[(1, BAD)],
            decimals=0,
        ),
        figure(
            "Since the last step",
            "Or since training was resumed after that step.",
            "s",
            (f"min(detour_clock_seconds{RUN} - detour_train_step_timestamp_seconds{RUN})", "since"),
            thresholds=[(300, WARN), (900, BAD)],
            decimals=0,
        ),
        figure(
            "Checkpoint age",
            "Training time since the newest checkpoint, which a failure would cost now.",
            "s",
            (f"max(run:detour_checkpoint_age_seconds{RUN})", "age"),
            thresholds=[(1800, WARN), (7200, BAD)],
            decimals=0,
        ),
        figure(
            "Interruptions",
            "Number of times that the workers had to be started again.",
            "none",
            (f"max(sum by (instance, job) ({last(f'detour_launcher_restarts_total{RUN}')}))", "interruptions"),
            thresholds=[(1, WARN), (5, BAD)],
            decimals=0,
        ),
        figure(
            "Step time",
            "Median of the last five minutes.",
            "s",
            (f"max(run:detour_train_step_seconds:p50{RUN})", "p50"),
            decimals=2,
        ),
        figure(
            "MFU",
            "Share of the devices' peak spent on the model's own operations.",
            "percentunit",
            (f"max(detour_train_mfu_ratio{RUN})", "MFU"),
            decimals=1,
        ),
    ]
