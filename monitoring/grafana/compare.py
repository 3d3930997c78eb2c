"""The dashboard that puts runs side by side."""

from __future__ import annotations

from monitoring.grafana.board import LABELLED, ME, RUNS, STEP_TIME, current_loss, last, new_board
from monitoring.grafana.panels import Json, against, graph, ranking, row
from monitoring.metrics import CURRENT

HELD_OUT = 'detour_eval_loss{run=~"$run",id=~"$id",objective="mlm"}'
TOKENS = f"max by (run, id) (sum by (run, id, instance) (detour_train_tokens_total{RUNS}))"
PER_DEVICE = f"detour_train_tokens_per_second_per_device{RUNS}"
OBJECTIVE = f"{ME} group_left (objective) (detour_train_phase{RUNS} == 1)"
SPEED = f"({PER_DEVICE} * {OBJECTIVE} * {LABELLED})"


def compare() -> Json:
    """Runs side by side: model size, nodes, precision, the detour and its matched MLM baseline."""
    return new_board(
        "detour-compare",
        "Detour: compare and scale",
        "Runs side by side: speed, scaling and learning.",
        _panels(),
        several=True,
    )


def _panels() -> list[Json]:
    return [
        ranking(
            "Runs",
            "What each run is and where it stands or ended; speeds are the last ones of the time shown.",
            {
                "run": "Run",
                "id": "Id",
                "model": "Model",
                "phases": "Phases",
                "nodes": "Nodes",
                "precision": "Precision",
            },
            {
                "Progress": (
                    f"max by (run, id) ({last(f'detour_train_step{RUNS}')} "
                    f"/ {last(f'detour_train_steps_planned{RUNS}')})",
                    "percentunit",
                ),
                "Training loss": (current_loss(RUNS), "none"),
                "Held-out MLM loss": (f"max by (run, id) ({last(HELD_OUT)})", "none"),
                "Tokens": (
                    f"max by (run, id) (sum by (run, id, instance) ({last(f'detour_train_tokens_total{RUNS}')}))",
                    "short",
                ),
                "Tokens per second": (_last_speed("detour_train_tokens_per_second"), "short"),
                "Tokens per second per device": (_last_speed("detour_train_tokens_per_second_per_device"), "short"),
                "MFU": (_last_speed("detour_train_mfu_ratio"), "percentunit"),
            },
            describing="max by (run, id, model, nodes, precision, phases) "
            '(last_over_time(detour_run_info{run=~"$run",id=~"$id",model!=""}[$__range]))',
        ),
        against(
            "Held-out masked loss against tokens",
            "Compares a detour with its matched MLM baseline: the same objective on the same text.",
            "none",
            y=f"max by (run, id) ({HELD_OUT})",
            x=TOKENS,
            x_name="tokens",
            by=("run", "id"),
        ),
        against(
            "Training loss against tokens",
            "Loss of each run's current objective over its real tokens; a jump is the switch.",
            "none",
            y=f"max by (run, id) (detour_train_loss{RUNS} {CURRENT})",
            x=TOKENS,
            x_name="tokens",
            by=("run", "id"),
        ),
        graph(
            "Masked training loss",
            "MLM loss by run; the legend gives each run's phases.",
            "none",
            (
                f'(detour_train_loss{{run=~"$run",id=~"$id",objective="mlm"}} {CURRENT}) * {LABELLED}',
                "{{run}} {{id}} ({{phases}})",
            ),
            width=12,
        ),
        graph(
            "Training loss",
            "Loss of each run's current objective.",
            "none",
            (f"detour_train_loss{RUNS} {CURRENT}", "{{run}} {{id}} {{objective}}"),
            width=12,
        ),
        row("Speed and scaling"),
        graph(
            "Tokens per second",
            "All devices of a run.",
            "short",
            (f"detour_train_tokens_per_second{RUNS} * {LABELLED}", "{{run}} {{id}} (nodes: {{nodes}})"),
            low=0,
        ),
        graph(
            "Tokens per second per device",
            "By model and precision.",
            "short",
            (f"{PER_DEVICE} * {LABELLED}", "{{run}} {{id}} ({{model}}, {{precision}})"),
            low=0,
        ),
        graph(
            "Scaling efficiency",
            "Tokens per second per device, over the best of the chosen runs of that model, precision and objective.",
            "percentunit",
            (
                f"{SPEED} / on (model, precision, objective) group_left () "
                f"max by (model, precision, objective) {SPEED}",
                "{{run}} {{id}} {{objective}} (nodes: {{nodes}})",
            ),
            low=0,
            high=1.05,
        ),
        graph(
            "Model FLOPs utilisation",
            "By model and precision.",
            "percentunit",
            (f"detour_train_mfu_ratio{RUNS} * {LABELLED}", "{{run}} {{id}} ({{model}}, {{precision}})"),
            width=12,
            low=0,
        ),
        graph("Step time", "Mean of five minutes.", "s", (STEP_TIME, "{{run}} {{id}}"), width=12, low=0),
    ]


def _last_speed(metric: str) -> str:
    """The latest speed while the run was at work, because a run without workers has a speed of 0."""
    return f"max by (run, id) (last_over_time(({metric}{RUNS} > 0)[$__range:$__interval]))"
