"""What a job says at its start and at its end."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console

from configs.schema import RunConfig
from configs.units import format_count
from launcher.group import Shape
from monitoring.log import read_metrics


def print_header(
    console: Console, config: RunConfig, directory: Path, shape: Shape, precision: str, metrics: str
) -> None:
    phases = ", ".join(f"{p.objective} {p.length(config.tokens_per_step):,}" for p in config.phases)
    data = shape.workers // (config.parallel.tensor * config.parallel.pipeline)
    most = "" if isinstance(config.cluster.nodes, int) else "at most "
    _print(
        console,
        f"[bold]{config.name}[/] in {directory}",
        {
            "steps": f"{config.total_steps:,} ({phases}) of {format_count(config.tokens_per_step)} token slots",
            "workers": f"{most}{shape.workers} on {shape.nodes} node{'s' * (shape.nodes > 1)} "
            f"({'GPU' if shape.gpu else 'CPU'}): data {data} x tensor {config.parallel.tensor} "
            f"x pipeline {config.parallel.pipeline}, precision {precision}",
            "metrics": metrics,
        },
    )


def print_summary(console: Console, config: RunConfig, directory: Path, export: Path, report: Path) -> None:
    lines = read_metrics(directory)
    shown = {}
    for index, phase in enumerate(config.phases):
        losses = [line["loss"] for line in lines if line["phase"] == index and line["loss"] is not None]
        if losses:
            label = f"phase {index + 1} {phase.objective}"
            shown[label] = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    speed = [line["tokens_per_second"] for line in lines if line["tokens_per_second"]]
    if speed:
        shown["speed"] = f"{format_count(statistics.median(speed))} tokens/s"
    shown |= {
        "model": str(export),
        "report": str(report),
        "metrics": str(directory / "metrics.jsonl"),
        "try it": f"python -c \"from transformers import pipeline; print(pipeline('fill-mask', '{export}')"
        "('The patient was treated with [MASK].'))\"",
        "next": "detour-train --output ANOTHER_DIRECTORY for another run; detour recipes lists what there is",
    }
    _print(console, f"[bold]{config.name}[/] is complete: {config.total_steps:,} steps", shown)


def _print(console: Console, title: str, rows: dict[str, str]) -> None:
    console.print(title, highlight=False, soft_wrap=True)
    width = max(map(len, rows)) + 2
    for key, value in rows.items():
        console.print(f"  {key:<{width}}{value}", highlight=False, soft_wrap=True, markup=False)
