"""The dashboard of one run."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders

from monitoring.grafana.board import (
    BAD,
    CURRENT,
    ONE,
    WARN,
    annotate,
    current_loss,
    fill,
    last,
    new_board,
    run_variable,
)
from monitoring.grafana.panels import figure, graph


def run() -> builders.Dashboard:
    """One screen for one run: healthy, how fast, what it has learned, when it ends."""
    board = new_board(
        "detour-run", "Detour: run", "Is it healthy, how fast is it, what has it learned, when does it end."
    )
    board.with_variable(run_variable(several=False))
    annotate(board, several=False)
    fill(
        board,
        figure(
            "Progress",
            "Completed steps over planned steps.",
            "percentunit",
            (f"max({last(f'detour_train_step{ONE}')} / {last(f'detour_train_steps_planned{ONE}')})", "progress"),
            decimals=1,
        ),
        figure(
            "Time left",
            "Steps left times the mean step of the last five minutes.",
            "s",
            (f"max(run:detour_train_eta_seconds{ONE})", "left"),
            decimals=1,
        ),
        figure(
            "Objective",
            "Of the phase that is trained now.",
            "none",
            (
                f"group by (objective) (detour_train_phase{ONE} == 1) "
                f"or on () group by (objective) ({last(f'detour_train_phase{ONE}')} == 1)",
                "{{objective}}",
            ),
            by_name=True,
        ),
        figure(
            "Loss",
            "Of the current objective.",
            "none",
            (current_loss(ONE), "loss"),
            decimals=3,
        ),
        figure(
            "Tokens trained",
            "Real tokens, of all objectives.",
            "short",
            (f"max(sum by (instance, job) ({last(f'detour_train_tokens_total{ONE}')}))", "tokens"),
            decimals=1,
        ),
        figure(
            "Tokens a second",
            "Real tokens over all devices.",
            "short",
            (f"max(detour_train_tokens_per_second{ONE})", "tokens a second"),
            decimals=1,
        ),
        figure(
            "Alerts firing",
            "The Health board says which.",
            "none",
            ('count(ALERTS{alertname=~"Detour.+",alertstate="firing",run="$run"}) or vector(0)', "alerts"),
            thresholds=[(1, BAD)],
            decimals=0,
        ),
        figure(
            "Since the last step",
            "Or since training was resumed after it.",
            "s",
            (f"min(time() - detour_train_step_timestamp_seconds{ONE})", "since"),
            thresholds=[(300, WARN), (900, BAD)],
            decimals=0,
        ),
        figure(
            "Checkpoint age",
            "Training since the newest checkpoint: work that a failure would cost now.",
            "s",
            (f"max(run:detour_checkpoint_age_seconds{ONE})", "age"),
            thresholds=[(1800, WARN), (7200, BAD)],
            decimals=0,
        ),
        figure(
            "Interruptions",
            "Times the workers had to be started again.",
            "none",
            (f"max(sum by (instance, job) ({last(f'detour_launcher_restarts_total{ONE}')}))", "interruptions"),
            thresholds=[(1, WARN), (5, BAD)],
            decimals=0,
        ),
        figure(
            "Step time",
            "Median of the last five minutes.",
            "s",
            (f"max(run:detour_train_step_seconds:p50{ONE})", "p50"),
            decimals=2,
        ),
        figure(
            "MFU",
            "Share of the devices' peak spent on the model's own operations.",
            "percentunit",
            (f"max(detour_train_mfu_ratio{ONE})", "MFU"),
            decimals=1,
        ),
    )
    board.with_row(builders.Row("Learning"))
    fill(
        board,
        graph(
            "Training loss",
            "By objective; the switch starts a new curve.",
            "none",
            (f"detour_train_loss{ONE} {CURRENT}", "{{objective}}"),
            width=12,
        ),
        graph(
            "Held-out loss",
            "Of both objectives in either phase; empty without data.evaluation.",
            "none",
            (f"detour_eval_loss{ONE}", "{{objective}}"),
            width=12,
        ),
        graph(
            "Held-out accuracy",
            "Share of the paying positions whose token the model finds likeliest.",
            "percentunit",
            (f"detour_eval_accuracy_ratio{ONE}", "{{objective}}"),
            width=6,
            low=0,
        ),
        graph(
            "Learning rate",
            "Restarts at the switch.",
            "sci",
            (f"detour_train_learning_rate{ONE}", "learning rate"),
            width=6,
            low=0,
        ),
        graph("Gradient norm", "Before clipping.", "none", (f"detour_train_grad_norm{ONE}", "norm"), width=6, low=0),
        graph(
            "Tokens trained",
            "Real tokens by objective.",
            "short",
            (f"detour_train_tokens_total{ONE}", "{{objective}}"),
            width=6,
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
            (f"detour_train_tokens_per_second{ONE}", "all devices"),
            (f"detour_train_tokens_per_second_per_device{ONE}", "one device"),
            width=6,
            low=0,
        ),
        graph(
            "Model FLOPs utilisation",
            "Share of the devices' peak.",
            "percentunit",
            (f"detour_train_mfu_ratio{ONE}", "MFU"),
            width=6,
            low=0,
        ),
        graph(
            "Step time",
            "Quantiles over the steps of the five minutes before.",
            "s",
            *(
                (f"histogram_quantile({q}, rate(detour_train_step_seconds_bucket{ONE}[5m]))", f"p{int(q * 100)}")
                for q in (0.5, 0.95, 0.99)
            ),
            width=6,
            low=0,
        ),
        graph(
            "Data wait",
            "Share of the step spent waiting for its data.",
            "percentunit",
            (f"run:detour_train_data_wait:ratio{ONE}", "waiting"),
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
            (f"detour_data_documents_total{ONE}", "{{source}}"),
            width=6,
            low=0,
        ),
        graph(
            "Packing",
            "Real tokens as a share of the token slots.",
            "percentunit",
            (f"detour_data_packing_ratio{ONE}", "packing"),
            width=6,
            low=0,
            high=1,
        ),
        graph(
            "Epochs",
            "That each source has reached, from 0.",
            "none",
            (f"detour_data_epoch{ONE}", "{{source}}"),
            width=6,
            low=0,
        ),
        graph(
            "Time to save a checkpoint",
            "Mean of the saves so far and their 95th percentile.",
            "s",
            (f"detour_checkpoint_seconds_sum{ONE} / (detour_checkpoint_seconds_count{ONE} > 0)", "mean"),
            (f"histogram_quantile(0.95, detour_checkpoint_seconds_bucket{ONE})", "p95"),
            width=6,
            low=0,
        ),
        graph(
            "Steps and checkpoints",
            "What a failure would cost is the gap.",
            "none",
            (f"detour_train_step{ONE}", "step"),
            (f"detour_checkpoint_step{ONE}", "newest checkpoint"),
            low=0,
        ),
        graph(
            "Interruptions",
            "By reason, in total.",
            "none",
            (f"detour_launcher_restarts_total{ONE}", "{{reason}}"),
            low=0,
            thresholds=[(5, BAD)],
        ),
        graph(
            "Events",
            "Lines of events.jsonl in the interval, by kind.",
            "none",
            (f"increase(detour_events_total{ONE}[$__rate_interval]) > 0", "{{event}}"),
            low=0,
        ),
    )
    return board
