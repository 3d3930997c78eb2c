"""The dashboard of what needs a person."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders

from monitoring.grafana.board import BAD, RUN, WARN, annotate, fill, new_board, run_variable
from monitoring.grafana.panels import figure, graph


def health() -> builders.Dashboard:
    """What needs a person: alerts, stragglers, memory, data, checkpoints, interruptions."""
    board = new_board("detour-health", "Detour: health", "What needs a person, over all chosen runs.")
    board.with_variable(run_variable(several=True))
    annotate(board)
    healthy = f"0 * group by (run) (detour_run_info{RUN})"
    age = f"time() - (detour_checkpoint_timestamp_seconds{RUN} or detour_run_start_timestamp_seconds{RUN})"
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
            "The longest of the chosen runs.",
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
            "Firing alerts.",
            "none",
            (f'sum by (run) (ALERTS{{alertname=~"Detour.+",alertstate="firing",run=~"$run"}}) or {healthy}', "{{run}}"),
            low=0,
            thresholds=[(1, BAD)],
        ),
        graph(
            "Stragglers",
            "Slowest rank over the median rank.",
            "none",
            (
                f"max by (run) (detour_worker_step_seconds{RUN}) "
                f"/ quantile by (run) (0.5, detour_worker_step_seconds{RUN})",
                "{{run}}",
            ),
            thresholds=[(1.15, WARN), (1.3, BAD)],
            low=1,
        ),
        graph(
            "Step time of each rank",
            "Its own part of the step.",
            "s",
            (f"detour_worker_step_seconds{RUN}", "{{run}} rank {{rank}}"),
            low=0,
        ),
        graph(
            "Memory of each rank",
            "Of its GPU where there is one, else of its process.",
            "bytes",
            (f"detour_worker_memory_bytes{RUN}", "{{run}} rank {{rank}}"),
            low=0,
        ),
        graph(
            "GPU utilisation of each rank",
            "Share of the time in which a kernel ran; empty without GPUs.",
            "percentunit",
            (f"detour_worker_gpu_utilization_ratio{RUN}", "{{run}} rank {{rank}}"),
            low=0,
            high=1,
        ),
        graph(
            "Checkpoint age",
            "And how often one is asked for.",
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
            width=12,
            low=0,
        ),
        graph(
            "Failures among the events",
            "Checkpoints and workers, in total.",
            "none",
            ('detour_events_total{run=~"$run",event=~".*(failed|damaged|skipped)"}', "{{run}} {{event}}"),
            width=12,
            low=0,
        ),
        graph(
            "Data wait",
            "Share of the step spent waiting for data.",
            "percentunit",
            (
                f"rate(detour_train_data_wait_seconds_total{RUN}[$__rate_interval]) / "
                f"(rate(detour_train_step_seconds_sum{RUN}[$__rate_interval]) > 0)",
                "{{run}}",
            ),
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
