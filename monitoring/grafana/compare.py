"""The dashboard that puts runs side by side."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders

from monitoring.grafana.board import CURRENT, LABELLED, RUN, STEP_TIME, fill, new_board, run_variable
from monitoring.grafana.panels import against, graph, ranking


def compare() -> builders.Dashboard:
    """Runs side by side: model size, nodes, precision, the detour and its twin."""
    board = new_board("detour-compare", "Detour: compare and scale", "Runs side by side: speed, scaling and learning.")
    board.with_variable(run_variable(several=True))
    loss = f"sum by (run) (detour_train_loss{RUN} {CURRENT})"
    tokens = f"sum by (run) (detour_train_tokens_total{RUN})"
    per_device = f"detour_train_tokens_per_second_per_device{RUN}"
    fill(
        board,
        ranking(
            "Runs",
            "What each run is and where it stands.",
            {
                "Description": (f"max by (run, model, nodes, precision, phases) (detour_run_info{RUN})", "none"),
                "Progress": (f"max by (run) (detour_train_step{RUN} / detour_train_steps_planned{RUN})", "percentunit"),
                "Loss": (loss, "none"),
                "Tokens": (tokens, "short"),
                "Tokens a second": (f"sum by (run) (detour_train_tokens_per_second{RUN})", "short"),
                "Tokens a second a device": (f"sum by (run) ({per_device})", "short"),
                "MFU": (f"max by (run) (detour_train_mfu_ratio{RUN})", "percentunit"),
            },
            by="run",
        ),
        against(
            "Loss against tokens",
            "Each run's current objective over the real tokens it has trained on.",
            "none",
            y=loss,
            x=tokens,
            x_name="tokens",
            by="run",
        ),
        graph(
            "Masked loss: the detour and its twin",
            "MLM loss by run; the legend gives each run's phases.",
            "none",
            (f'(detour_train_loss{{run=~"$run",objective="mlm"}} {CURRENT}) * {LABELLED}', "{{run}} ({{phases}})"),
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
            (f"detour_train_tokens_per_second{RUN} * {LABELLED}", "{{run}} ({{nodes}} nodes)"),
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
            "Tokens a second on one device, over the best of the chosen runs of that model and precision.",
            "percentunit",
            (
                f"({per_device} * {LABELLED}) / on (model, precision) group_left () "
                f"max by (model, precision) ({per_device} * {LABELLED})",
                "{{run}} ({{nodes}} nodes)",
            ),
            low=0,
            high=1.05,
        ),
        graph(
            "Model FLOPs utilisation",
            "By model and precision.",
            "percentunit",
            (f"detour_train_mfu_ratio{RUN} * {LABELLED}", "{{run}} ({{model}}, {{precision}})"),
            low=0,
        ),
        graph("Step time", "Mean of the interval.", "s", (STEP_TIME, "{{run}}"), low=0),
        graph(
            "Loss",
            "Each run's current objective.",
            "none",
            (f"detour_train_loss{RUN} {CURRENT}", "{{run}} {{objective}}"),
        ),
    )
    return board
