"""The lines that a job prints at its start and at its end."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console

from configs.schema import Phase, RunConfig
from configs.units import format_count
from launcher.topology import Topology
from monitoring.run_directory import RunDirectory
from monitoring.run_files import read_steps


def print_header(
    console: Console, config: RunConfig, directory: Path, topology: Topology, precision: str, metrics: str
) -> None:
    """Print the plan of a run that is about to start.

    Args:
        console: Console to print on.
        config: Configuration of the run.
        directory: The run directory.
        topology: Largest topology that the run may take.
        precision: Precision of the training, or `auto`.
        metrics: URL of the metrics endpoint.
    """
    from engine.schedule import PhaseSchedule

    schedule = PhaseSchedule(config)
    phases = {
        f"phase {span.index + 1}": f"{_objective(span.phase)}, {span.steps:,} steps of {span.sequences:,} x "
        f"{span.sequence_length:,} = {format_count(span.steps * span.tokens_per_step)} tokens, learning rate "
        f"{schedule.learning_rate(span.first):.3g} -> {schedule.learning_rate(span.last - 1):.3g}, "
        f"{', '.join(source.name for source in span.data.sources)}"
        for span in schedule.spans
    }
    slots = config.spans[-1].tokens(config.total_steps)
    data = topology.workers // (config.parallel.tensor * config.parallel.pipeline)
    at_most = "" if isinstance(config.cluster.nodes, int) else "at most "
    _print(
        console,
        f"[bold]{config.name}[/] in {directory}",
        {
            "steps": f"{config.total_steps:,}, {format_count(slots)} tokens, padding included",
            **({"from": f"step {config.origin.step:,} of {config.origin.run}"} if config.origin else {}),
            **phases,
            "workers": f"{at_most}{topology.workers} on {topology.nodes} node{'s' * (topology.nodes > 1)} "
            f"({'GPU' if topology.gpu else 'CPU'}): data {data} x tensor {config.parallel.tensor} "
            f"x pipeline {config.parallel.pipeline}, precision {precision}",
            "metrics": metrics,
        },
    )


def print_summary(
    console: Console, config: RunConfig, directory: Path, export: Path, report: Path, mask_token: str
) -> None:
    """Print the losses, the speed and the results of a complete run.

    Args:
        console: Console to print on.
        config: Configuration of the run.
        directory: The run directory.
        export: Directory of the Hugging Face model.
        report: The HTML report.
        mask_token: Text of the tokenizer's mask token.
    """
    lines = read_steps(directory)
    rows = {}
    for index, phase in enumerate(config.phases):
        losses = [line["loss"] for line in lines if line["phase"] == index and line["loss"] is not None]
        if losses:
            rows[f"phase {index + 1} {phase.objective_name}"] = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    speeds = [line["tokens_per_second"] for line in lines if line["tokens_per_second"]]
    if speeds:
        rows["speed"] = f"{format_count(statistics.median(speeds))} tokens/s"
    rows |= {
        "model": str(export),
        "report": str(report),
        "metrics": str(RunDirectory(directory).metrics),
        "try it": f"python -c \"from transformers import pipeline; print(pipeline('fill-mask', '{export}')"
        f"('The patient was treated with {mask_token}.'))\"",
        "next": "detour-train --output ANOTHER_DIRECTORY starts another run; detour recipes lists the shipped recipes",
    }
    _print(console, f"[bold]{config.name}[/] is complete: {config.total_steps:,} steps", rows)


def _objective(phase: Phase) -> str:
    if isinstance(phase.objective, str):
        return phase.objective
    shares = (f"{share:.1%} {name}" for name, share in phase.objectives.items())
    return f"{phase.objective_name} ({', '.join(shares)} of the sequences)"


def _print(console: Console, title: str, rows: dict[str, str]) -> None:
    console.print(title, highlight=False, soft_wrap=True)
    width = max(map(len, rows)) + 2
    for key, value in rows.items():
        console.print(f"  {key:<{width}}{value}", highlight=False, soft_wrap=True, markup=False)
