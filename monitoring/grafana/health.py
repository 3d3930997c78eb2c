"""The dashboard of what needs a person."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders

from monitoring.grafana.board import BAD, ME, RUN, WARN, annotate, fill, new_board, run_variable
from monitoring.grafana.panels import figure, graph, ranking


def health() -> builders.Dashboard:
    """What needs a person: alerts, stragglers, memory, data, checkpoints, interruptions."""
    board = new_board("detour-health", "Detour: health", "What needs a person, over all chosen runs.")
    board.with_variable(run_variable(several=True))
    annotate(board, several=True)
    healthy = f"0 * group by (run) (detour_run_info{RUN})"
    age = f"run:detour_checkpoint_age_seconds{RUN}"
    slowdown = f"detour_worker_step_seconds{RUN} / {ME} group_left () run:detour_worker_step_seconds:typical{RUN}"
    slowest = f"topk(10, {slowdown})"
    fill(
        board,
        figure(
            "Alerts firing",
            "Sum over the chosen runs.",
            "none",
            ('count(ALERTS{alertname=~"Detour.+",alertstate="firing",run=~"$run"}) or vector(0)', "alerts"),
            width=6,
            thresholds=[(1, BAD)],
            decimals=0,
        ),
        figure(
            "Since the last step",
            "The longest of the chosen runs.",
            "s",
            (f"max(time() - detour_train_step_timestamp_seconds{RUN})", "longest"),
            width=6,
            thresholds=[(300, WARN), (900, BAD)],
            decimals=0,
        ),
        figure(
            "Oldest checkpoint",
            "The longest training without one, of the chosen runs that are alive.",
            "s",
            (f"max({age})", "oldest"),
            width=6,
            thresholds=[(1800, WARN), (7200, BAD)],
            decimals=1,
        ),
        figure(
            "Interruptions",
            "In the time shown.",
            "none",
            (
                'sum(increase(detour_events_total{run=~"$run",event=~"worker_failed|preempted"}[$__range]))',
                "interruptions",
            ),
            width=6,
            thresholds=[(1, WARN), (5, BAD)],
            decimals=0,
        ),
        graph(
            "Alerts by run",
            "Firing ones by name; none is zero.",
            "none",
            (
                'count by (run, alertname) (ALERTS{alertname=~"Detour.+",alertstate="firing",run=~"$run"}) '
                f"or on (run) {healthy}",
                "{{run}} {{alertname}}",
            ),
            low=0,
            thresholds=[(1, BAD)],
        ),
        graph(
            "Stragglers",
            "Slowest rank over the median rank; of two ranks, over the other.",
            "none",
            (f"run:detour_worker_straggler:ratio{RUN}", "{{run}}"),
            thresholds=[(1.15, WARN), (1.3, BAD)],
            low=1,
        ),
        graph(
            "Step time of the ranks",
            "Each one's own part of the step.",
            "s",
            (f"max by (run, instance) (detour_worker_step_seconds{RUN})", "{{run}} slowest"),
            (f"run:detour_worker_step_seconds:typical{RUN}", "{{run}} median"),
            low=0,
        ),
        ranking(
            "Slowest ranks",
            "The ten that take longest, as a multiple of the median rank.",
            {"run": "Run", "instance": "Endpoint", "rank": "Rank"},
            {
                "Times the median": (f"max by (run, instance, rank) ({slowest})", "none"),
                "Step time": (f"max by (run, instance, rank) (detour_worker_step_seconds{RUN} and ({slowest}))", "s"),
                "Memory": (f"max by (run, instance, rank) (detour_worker_memory_bytes{RUN} and ({slowest}))", "bytes"),
            },
            width=12,
        ),
        graph(
            "Memory of the ranks",
            "On a GPU the most its allocator has held at once, else what the process holds.",
            "bytes",
            (f"max by (run, instance) (detour_worker_memory_bytes{RUN})", "{{run}} most"),
            (f"quantile by (run, instance) (0.5, detour_worker_memory_bytes{RUN})", "{{run}} median"),
            width=6,
            low=0,
        ),
        graph(
            "GPU utilisation of the ranks",
            "Share of the time in which a kernel ran; empty without GPUs.",
            "percentunit",
            (f"min by (run, instance) (detour_worker_gpu_utilization_ratio{RUN})", "{{run}} least"),
            (f"quantile by (run, instance) (0.5, detour_worker_gpu_utilization_ratio{RUN})", "{{run}} median"),
            width=6,
            low=0,
            high=1,
        ),
        graph(
            "Checkpoint age",
            "Training since the newest one, and how often one is asked for.",
            "s",
            (age, "{{run}}"),
            (f"detour_checkpoint_interval_seconds{RUN}", "{{run}} interval"),
            low=0,
        ),
        graph(
            "Interruptions by reason",
            "In total.",
            "none",
            (f"detour_launcher_restarts_total{RUN}", "{{run}} {{reason}}"),
            low=0,
        ),
        graph(
            "Failures among the events",
            "Of workers, checkpoints and steps, in total.",
            "none",
            ('detour_events_total{run=~"$run",event=~".*(failed|damaged|skipped|spike)"}', "{{run}} {{event}}"),
            low=0,
        ),
        graph(
            "Data wait",
            "Share of the step spent waiting for data.",
            "percentunit",
            (f"run:detour_train_data_wait:ratio{RUN}", "{{run}}"),
            width=12,
            low=0,
            thresholds=[(0.05, WARN), (0.1, BAD)],
        ),
        graph(
            "Documents left out",
            "Damaged ones, where data.on_error is skip.",
            "none",
            (f"detour_data_skipped_documents_total{RUN}", "{{run}} {{source}}"),
            width=12,
            low=0,
            thresholds=[(1, WARN)],
        ),
    )
    return board
