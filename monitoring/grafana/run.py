"""The dashboard of one run."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders

from monitoring.grafana.board import BAD, CURRENT, RUN, STEP_TIME, WARN, annotate, fill, new_board, run_variable
from monitoring.grafana.panels import figure, graph


def run() -> builders.Dashboard:
    """One screen for one run: healthy, how fast, what it has learned, when it ends."""
    board = new_board(
        "detour-run", "Detour: run", "Is it healthy, how fast is it, what has it learned, when does it end."
    )
    board.with_variable(run_variable(several=False))
    annotate(board)
    fill(
        board,
        figure(
            "Progress",
            "Completed steps over planned steps.",
            "percentunit",
            (f"detour_train_step{RUN} / detour_train_steps_planned{RUN}", "{{run}}"),
            decimals=1,
        ),
        figure(
            "Time left",
            "Steps left times the recent mean step.",
            "s",
            (f"sum by (run) (detour_train_steps_planned{RUN} - detour_train_step{RUN}) * ({STEP_TIME})", "{{run}}"),
            decimals=1,
        ),
        figure(
            "Phase",
            "The phase that is trained now.",
            "none",
            (f"detour_train_phase{RUN} == 1", "{{phase}}: {{objective}}"),
            by_name=True,
        ),
        figure(
            "Loss",
            "Of the current objective.",
            "none",
            (f"detour_train_loss{RUN} {CURRENT}", "{{objective}}"),
            decimals=3,
        ),
        figure(
            "Tokens a second",
            "Real tokens over all devices.",
            "short",
            (f"detour_train_tokens_per_second{RUN}", "{{run}}"),
            decimals=1,
        ),
        figure(
            "MFU",
            "Share of the devices' peak spent on the model's own operations.",
            "percentunit",
            (f"detour_train_mfu_ratio{RUN}", "{{run}}"),
            decimals=1,
        ),
        figure(
            "Checkpoint age",
            "Work that a failure would cost now.",
            "s",
            (
                f"time() - (detour_checkpoint_timestamp_seconds{RUN} or detour_run_start_timestamp_seconds{RUN})",
                "{{run}}",
            ),
            thresholds=[(1800, WARN), (7200, BAD)],
            decimals=1,
        ),
        figure(
            "Interruptions",
            "Times the workers had to be started again.",
            "none",
            (f"sum by (run) (detour_launcher_restarts_total{RUN})", "{{run}}"),
            thresholds=[(1, WARN), (5, BAD)],
            decimals=0,
        ),
    )
    board.with_row(builders.Row("Learning"))
    fill(
        board,
        graph(
            "Training loss",
            "By objective; the switch starts a new curve.",
            "none",
            (f"detour_train_loss{RUN} {CURRENT}", "{{objective}}"),
            width=12,
        ),
        graph(
            "Held-out loss",
            "Of both objectives in either phase; empty without data.evaluation.",
            "none",
            (f"detour_eval_loss{RUN}", "{{objective}}"),
            width=12,
        ),
        graph(
            "Held-out accuracy",
            "Share of the paying positions whose token the model finds likeliest.",
            "percentunit",
            (f"detour_eval_accuracy_ratio{RUN}", "{{objective}}"),
            low=0,
        ),
        graph(
            "Learning rate",
            "Restarts at the switch.",
            "sci",
            (f"detour_train_learning_rate{RUN}", "learning rate"),
            low=0,
        ),
        graph("Gradient norm", "Before clipping.", "none", (f"detour_train_grad_norm{RUN}", "norm"), low=0),
        graph(
            "Tokens trained",
            "Real tokens by objective.",
            "short",
            (f"detour_train_tokens_total{RUN}", "{{objective}}"),
            low=0,
        ),
    )
    board.with_row(builders.Row("Speed"))
    fill(
        board,
        graph(
            "Throughput",
            "Real tokens a second.",
            "short",
            (f"detour_train_tokens_per_second{RUN}", "all devices"),
            (f"detour_train_tokens_per_second_per_device{RUN}", "one device"),
            width=6,
            low=0,
        ),
        graph(
            "Model FLOPs utilisation",
            "Share of the devices' peak.",
            "percentunit",
            (f"detour_train_mfu_ratio{RUN}", "MFU"),
            width=6,
            low=0,
        ),
        graph(
            "Step time",
            "Quantiles over the steps of the interval.",
            "s",
            *(
                (
                    f"histogram_quantile({q}, sum by (run, le) "
                    f"(rate(detour_train_step_seconds_bucket{RUN}[$__rate_interval])))",
                    f"p{int(q * 100)}",
                )
                for q in (0.5, 0.95, 0.99)
            ),
            width=6,
            low=0,
        ),
        graph(
            "Data wait",
            "Share of the step spent waiting for its data.",
            "percentunit",
            (
                f"sum by (run) (rate(detour_train_data_wait_seconds_total{RUN}[$__rate_interval])) / "
                f"sum by (run) (rate(detour_train_step_seconds_sum{RUN}[$__rate_interval]) > 0)",
                "waiting",
            ),
            width=6,
            low=0,
            thresholds=[(0.05, WARN), (0.1, BAD)],
        ),
    )
    board.with_row(builders.Row("Data and checkpoints"))
    fill(
        board,
        graph(
            "Documents drawn",
            "That entered the streams, by source.",
            "short",
            (f"detour_data_documents_total{RUN}", "{{source}}"),
            width=6,
            low=0,
        ),
        graph(
            "Packing and epochs",
            "Real tokens in the token slots; epoch of each source.",
            "none",
            (f"detour_data_packing_ratio{RUN}", "packing ratio"),
            (f"detour_data_epoch{RUN}", "epoch of {{source}}"),
            width=6,
            low=0,
        ),
        graph(
            "Time to save a checkpoint",
            "Mean of the saves so far and their 95th percentile.",
            "s",
            (f"detour_checkpoint_seconds_sum{RUN} / (detour_checkpoint_seconds_count{RUN} > 0)", "mean"),
            (f"histogram_quantile(0.95, detour_checkpoint_seconds_bucket{RUN})", "p95"),
            width=6,
            low=0,
        ),
        graph(
            "Steps and checkpoints",
            "What a failure would cost is the gap.",
            "none",
            (f"detour_train_step{RUN}", "step"),
            (f"detour_checkpoint_step{RUN}", "newest checkpoint"),
            width=6,
            low=0,
        ),
        graph(
            "Interruptions",
            "By reason, in total.",
            "none",
            (f"detour_launcher_restarts_total{RUN}", "{{reason}}"),
            width=12,
            low=0,
            thresholds=[(5, BAD)],
        ),
        graph(
            "Events",
            "Lines of events.jsonl in the interval.",
            "none",
            (f"increase(detour_events_total{RUN}[$__rate_interval])", "{{event}}"),
            width=12,
            low=0,
        ),
    )
    return board
