"""Commands that start a run, or tell beforehand how it would go: train, plan, profile, doctor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from launcher.commands.options import Version, load_run
from launcher.exits import STOPPED


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="A YAML file or a shipped recipe (default: ./detour.yaml, else demo), and overrides by dotted path, "
            "such as batch.sequences=8 phases.0.tokens=2M.",
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the Ray cluster to use.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME. An old one resumes.")] = None,
    branch_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN[@STEP]",
            help="Branch off another run's checkpoint, by default its newest: optimizer, data position and counters go "
            "on, and later phases may differ.",
        ),
    ] = None,
    stop_with_parent: Annotated[bool, typer.Option("--stop-with-parent", hidden=True)] = False,
    version: Version = False,
) -> None:
    """Train a model, or continue a run. Exit codes: 0 done, 2 bad input, 3 failed, 75 stopped early, all saved."""
    from launcher import stop

    if stop_with_parent:
        stop.stop_with_parent()
    config = load_run(arguments, nodes)
    directory = output or Path("runs") / config.name
    if branch_from is not None:
        from launcher.branch import with_origin

        config = with_origin(config, branch_from, directory)
    from launcher.job import run_job  # imports Ray; a wrong configuration is reported sooner

    result = run_job(config, directory)
    if not result.finished:
        print(f"stopped ({result.reason}) after step {result.step:,}, all saved; the same command again continues")
        raise typer.Exit(STOPPED)


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="As for train; with cluster.gpus_per_node=8."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the cluster.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a run for a cluster that is not here: memory, traffic, speed. Needs no GPU, no Ray and no hub."""
    config = load_run(arguments, nodes)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # before torch and the hub's client are imported
    from launcher.plan import plan_run, plan_text

    planned, unchecked = plan_run(config)
    if as_json:
        print(json.dumps({**planned.to_json(), "not_checked": unchecked}, indent=2))
    else:
        print(plan_text(planned, unchecked))


def profile(
    recipe: Annotated[str, typer.Argument(help="A YAML file or a shipped recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    output: Annotated[Path, typer.Option(help="Directory for trace.json.")] = Path("profile"),
    steps: Annotated[int, typer.Option(min=1, help="Steps measured, after a warm-up of two.")] = 5,
) -> None:
    """Show where the time of a recipe's training step goes, on one device of this machine."""
    from configs.load import load_config
    from datapipe.prepare import ensure_prepared
    from datapipe.tokenizer import load_tokenizer

    config = load_config(recipe, list(overrides or ()))
    ensure_prepared(config.data, load_tokenizer(config.tokenizer))
    from engine.profile import profile as run

    print(run(config, output, steps))


def doctor() -> None:
    """Report what this machine can do, and what to fix. Exit codes: 0 nothing to fix, 1 otherwise."""
    from launcher.doctor import examine

    is_well = True
    for finding in examine():
        print(f"{'FIX' if finding.remedy else 'ok '} {finding.subject:<14} {finding.text}", flush=True)
        if finding.remedy:
            is_well = False
            print(f"    {'':<14} -> {finding.remedy}")
    if not is_well:
        raise typer.Exit(1)
