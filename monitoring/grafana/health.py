"""The dashboard of what needs a person."""

from __future__ import annotations

from monitoring.events import kinds_where
from monitoring.grafana.board import ME, RUNS, event_annotations, events, new_board
from monitoring.grafana.panels import Json, figure, graph, ranking
from monitoring.metrics import BAD, WARN
from monitoring.run_state import INTERRUPTIONS

HEALTHY = f"0 * group by (run, id) (detour_run_info{RUNS})"
CHECKPOINT_AGE = f"run:detour_checkpoint_age_seconds{RUNS}"
TYPICAL = f"{ME} group_left () run:detour_worker_step_seconds:typical{RUNS}"
SLOWEST = f"topk(10, detour_worker_step_seconds{RUNS} / {TYPICAL})"


def health() -> Json:
    """Everything that needs a person: alerts, stragglers, memory, data, checkpoints, interruptions."""
    return new_board(
        "detour-health",
        "Detour: health",
        "What needs a person, over all chosen runs.",
        _panels(),
        several=True,
        annotations=event_annotations(RUNS),
    )


def _panels() -> list[Json]:
    return [
        figure(
            "Alerts firing",
            "Sum over the chosen runs.",
            "none",
            ('count(ALERTS{alertname=~"Detour.+",alertstate="firing",run=~"$run",id=~"$id"}) or vector(0)', "alerts"),
            width=6,
            thresholds=[(1, BAD)],
            decimals=0,
        ),
        figure(
            "Since the last step",
            "The longest time of the chosen runs.",
            "s",
            (f"max(detour_clock_seconds{RUNS} - detour_train_step_timestamp_seconds{RUNS})", "longest"),
            width=6,
            thresholds=[(300, WARN), (900, BAD)],
            decimals=0,
        ),
        figure(
            "Oldest checkpoint",
            "The longest training time without a checkpoint, over the chosen runs that are alive.",
            "s",
            (f"max({CHECKPOINT_AGE})", "oldest"),
            width=6,
            thresholds=[(1800, WARN), (7200, BAD)],
            decimals=1,
        ),
        figure(
            "Interruptions",
            "Interruptions of the workers in the time shown.",
            "none",
            (
                f"sum(increase({events(RUNS, INTERRUPTIONS)}[$__range]))",
                "interruptions",
            ),
            width=6,
            thresholds=[(1, WARN), (5, BAD)],
            decimals=0,
        ),
        graph(
            "Alerts by run",
            "Firing alerts by name; 0 without alerts.",
            "none",
            (
                'count by (run, id, alertname) (ALERTS{alertname=~"Detour.+",alertstate="firing",'
                'run=~"$run",id=~"$id"}) '
                f"or on (run, id) {HEALTHY}",
                "{{run}} {{id}} {{alertname}}",
            ),
            low=0,
            thresholds=[(1, BAD)],
        ),
        graph(
            "Stragglers",
            "Slowest rank over the median rank; with two ranks, over the other rank.",
            "none",
            (f"run:detour_worker_straggler:ratio{RUNS}", "{{run}} {{id}}"),
            thresholds=[(1.15, WARN), (1.3, BAD)],
            low=1,
        ),
        graph(
            "Step time of the ranks",
            "Time of each rank's own work in the step.",
            "s",
            (f"max by (run, id, instance) (detour_worker_step_seconds{RUNS})", "{{run}} {{id}} slowest"),
            (f"run:detour_worker_step_seconds:typical{RUNS}", "{{run}} {{id}} median"),
            low=0,
        ),
        ranking(
            "Slowest ranks",
            "The ten slowest ranks, as a multiple of the median rank.",
            {"run": "Run", "id": "Id", "rank": "Rank", "node": "Node"},
            {
                "Times the median": (f"max by (run, id, rank, node) ({SLOWEST})", "none"),
                "Step time": (f"max by (run, id, rank, node) (detour_worker_step_seconds{RUNS} and ({SLOWEST}))", "s"),
                "Memory": (f"max by (run, id, rank, node) (detour_worker_memory_bytes{RUNS} and ({SLOWEST}))", "bytes"),
            },
            width=12,
        ),
        graph(
            "Memory of the ranks",
            "On a GPU the peak of its allocator, else the resident memory of the process.",
            "bytes",
            (f"max by (run, id, instance) (detour_worker_memory_bytes{RUNS})", "{{run}} {{id}} most"),
            (f"quantile by (run, id, instance) (0.5, detour_worker_memory_bytes{RUNS})", "{{run}} {{id}} median"),
            width=6,
            low=0,
        ),
        graph(
            "GPU utilisation of the ranks",
            "Share of the time in which a kernel ran; empty without GPUs.",
            "percentunit",
            (f"min by (run, id, instance) (detour_worker_gpu_utilization_ratio{RUNS})", "{{run}} {{id}} least"),
            (
                f"quantile by (run, id, instance) (0.5, detour_worker_gpu_utilization_ratio{RUNS})",
                "{{run}} {{id}} median",
            ),
            width=6,
            low=0,
            high=1,
        ),
        graph(
            "Checkpoint age",
            "Training time since the newest checkpoint, and the configured interval.",
            "s",
            (CHECKPOINT_AGE, "{{run}} {{id}}"),
            (f"detour_checkpoint_interval_seconds{RUNS}", "{{run}} {{id}} interval"),
            low=0,
        ),
        graph(
            "Interruptions by reason",
            "Total by reason.",
            "none",
            (f"detour_launcher_restarts_total{RUNS}", "{{run}} {{id}} {{reason}}"),
            low=0,
        ),
        graph(
            "Failures among the events",
            "Total of the events that are faults or warnings, by kind.",
            "none",
            (events(RUNS, kinds_where(lambda event: event.FAULT or event.WARNING)), "{{run}} {{id}} {{event}}"),
            low=0,
        ),
        graph(
            "Data wait",
            "Share of the step spent waiting for data.",
            "percentunit",
            (f"run:detour_train_data_wait:ratio{RUNS}", "{{run}} {{id}}"),
            width=12,
            low=0,
            thresholds=[(0.05, WARN), (0.1, BAD)],
        ),
        graph(
            "Documents left out",
            "Damaged documents, with data.on_error: skip.",
            "none",
            (f"detour_data_skipped_documents_total{RUNS}", "{{run}} {{id}} {{source}}"),
            width=12,
            low=0,
            thresholds=[(1, WARN)],
        ),
    ]
