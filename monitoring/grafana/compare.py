"""The dashboard that puts runs side by side."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders

from monitoring.grafana.board import (
    CURRENT,
    LABELLED,
    ME,
    RUN,
    STEP_TIME,
    current_loss,
    fill,
    last,
    new_board,
    run_variable,
)
from monitoring.grafana.panels import against, graph, ranking


def compare() -> builders.Dashboard:
    """Runs side by side: model size, nodes, precision, the detour and its twin."""
    board = new_board("detour-compare", "Detour: compare and scale", "Runs side by side: speed, scaling and learning.")
    board.with_variable(run_variable(several=True))
    held_out = 'detour_eval_loss{run=~"$run",objective="mlm"}'
    tokens = f"max by (run) (sum by (run, instance) (detour_train_tokens_total{RUN}))"
    per_device = f"detour_train_tokens_per_second_per_device{RUN}"
    objective = f"{ME} group_left (objective) (detour_train_phase{RUN} == 1)"
    speed = f"({per_device} * {objective} * {LABELLED})"
    fill(
        board,
        ranking(
            "Runs",
            "What each run is and where it stands or ended; speeds are the last ones of the time shown.",
            {"run": "Run", "model": "Model", "phases": "Phases", "nodes": "Nodes", "precision": "Precision"},
            {
                "Progress": (
                    f"max by (run) ({last(f'detour_train_step{RUN}')} / {last(f'detour_train_steps_planned{RUN}')})",
                    "percentunit",
                ),
                "Training loss": (current_loss(RUN), "none"),
                "Held-out MLM loss": (f"max by (run) ({last(held_out)})", "none"),
                "Tokens": (
                    f"max by (run) (sum by (run, instance) ({last(f'detour_train_tokens_total{RUN}')}))",
                    "short",
                ),
                "Tokens a second": (_last_speed("detour_train_tokens_per_second"), "short"),
                "Tokens a second a device": (_last_speed("detour_train_tokens_per_second_per_device"), "short"),
                "MFU": (_last_speed("detour_train_mfu_ratio"), "percentunit"),
            },
            describing="max by (run, model, nodes, precision, phases) "
            '(last_over_time(detour_run_info{run=~"$run",model!=""}[$__range]))',
        ),
        against(
            "Held-out masked loss against tokens",
            "Where a detour and its twin compare: the same objective on the same text, whatever each trains on.",
            "none",
            y=f"max by (run) ({held_out})",
            x=tokens,
            x_name="tokens",
            by="run",
        ),
        against(
            "Training loss against tokens",
            "Each run's current objective over the real tokens it has trained on; a jump is the switch.",
            "none",
            y=f"max by (run) (detour_train_loss{RUN} {CURRENT})",
            x=tokens,
            x_name="tokens",
            by="run",
        ),
        graph(
            "Masked training loss",
            "MLM loss by run; the legend gives each run's phases.",
            "none",
            (f'(detour_train_loss{{run=~"$run",objective="mlm"}} {CURRENT}) * {LABELLED}', "{{run}} ({{phases}})"),
            width=12,
        ),
        graph(
            "Training loss",
            "Each run's current objective.",
            "none",
            (f"detour_train_loss{RUN} {CURRENT}", "{{run}} {{objective}}"),
            width=12,
        ),
    )
    board.with_row(builders.Row("Speed and scaling"))
    fill(
        board,
        graph(
            "Tokens a second",
            "All devices of a run.",
            "short",
            (f"detour_train_tokens_per_second{RUN} * {LABELLED}", "{{run}} (nodes: {{nodes}})"),
            low=0,
        ),
        graph(
            "Tokens a second on one device",
            "By model and precision.",
            "short",
            (f"{per_device} * {LABELLED}", "{{run}} ({{model}}, {{precision}})"),
            low=0,
        ),
        graph(
            "Scaling efficiency",
            "Tokens a second on one device, over the best of the chosen runs of that model, precision and objective.",
            "percentunit",
            (
                f"{speed} / on (model, precision, objective) group_left () "
                f"max by (model, precision, objective) {speed}",
                "{{run}} {{objective}} (nodes: {{nodes}})",
            ),
            low=0,
            high=1.05,
        ),
        graph(
            "Model FLOPs utilisation",
            "By model and precision.",
            "percentunit",
            (f"detour_train_mfu_ratio{RUN} * {LABELLED}", "{{run}} ({{model}}, {{precision}})"),
            width=12,
            low=0,
        ),
        graph("Step time", "Mean of five minutes.", "s", (STEP_TIME, "{{run}}"), width=12, low=0),
    )
    return board


def _last_speed(metric: str) -> str:
    """The latest while the run was at work: one that has ended or waits for workers has a speed of 0."""
    return f"max by (run) (last_over_time(({metric}{RUN} > 0)[$__range:$__interval]))"
