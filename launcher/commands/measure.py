"""Commands that measure models, and run studies of them: drift, evaluate, probe, audit, study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.commands.options import Output, TaskData, split_models
from launcher.exits import STOPPED


def drift(
    a: Annotated[str, typer.Argument(help="A run, a checkpoint or a Hugging Face model.")],
    b: Annotated[str, typer.Argument(help="The model to compare with it.")],
    output: Output,
    texts: Annotated[str, typer.Option(help="Held-out text.")] = "package://corpus/tico19_en.jsonl.gz",
    count: Annotated[int, typer.Option(min=4, help="Documents to read.")] = 500,
    noise: Annotated[
        list[str] | None, typer.Option(help="A trained with another seed, as the noise level; repeatable.")
    ] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="B is a run: compare each of its checkpoints with A.")
    ] = False,
) -> None:
    """Measure how far two models differ per layer: CKA of their hidden states, and change of their weights."""
    from rich.console import Console
    from rich.table import Table

    from studies.drift import drift as run

    if trajectory:
        from studies.trajectory import trajectory as follow

        steps = follow(a, Path(b), output, texts=texts, count=count)
        print(f"{output / 'trajectory.svg'}, {output / 'trajectory.json'}: {len(steps)} checkpoints")
        return
    rows = run(a, b, output, texts=texts, count=count, noise=noise or ())
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("-" if value is None else f"{value:.6g}" for value in row.values()))
    Console().print(table)
    print(f"{output / 'drift.svg'}, {output / 'drift.json'}, {output / 'weights.json'}")


def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [KEY=VALUE]...",
            help="Runs, checkpoints or Hugging Face models; the others are compared with the first. And overrides of "
            "the protocol, such as epochs=3 lr=1e-4, or files.test=null.",
        ),
    ],
    task: Annotated[str, typer.Option(help="A task YAML, or the name of a described task.")],
    data: TaskData = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tunings per model.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Directory of the results; default evaluations/TASK.")] = None,
    training_text: Annotated[
        list[str] | None, typer.Option(help="Training text of the models, to search for the test examples; repeatable.")
    ] = None,
) -> None:
    """Fine-tune and score models on a task, with several seeds, and compare them in pairs."""
    from rich.console import Console

    from launcher.trials import open_trials
    from studies.evaluate import evaluate as run
    from studies.evaluate import print_summary
    from studies.tasks import EvaluatedTask, parse_overrides

    models, overrides = split_models(arguments)
    evaluated = EvaluatedTask(
        task=task,
        data=str(data) if data else None,
        seeds=tuple(range(17, 17 + seeds)),
        protocol=parse_overrides(overrides),
    )
    with open_trials() as cluster:
        summary = run(
            models,
            evaluated,
            output or Path("evaluations") / Path(task).stem,
            training_text=training_text or (),
            parallel=cluster.fine_tune,
        )
    print_summary(summary, Console())


def probe(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [KEY=VALUE]...",
            help="Runs, checkpoints or Hugging Face models; the others are compared with the first. And overrides of "
            "the protocol, such as length=256 examples=1000.",
        ),
    ],
    task: Annotated[str, typer.Option(help="A task YAML or a described task; `retention` measures forgetting.")],
    data: TaskData = None,
    output: Annotated[Path | None, typer.Option(help="Directory of the results; default probes/TASK.")] = None,
    processes: Annotated[
        int | None, typer.Option(help="Probes fitted at once; default: one for a small task, else one per core.")
    ] = None,
) -> None:
    """Measure frozen models: linear probes on every layer, or masked accuracy on general text (task retention)."""
    from rich.console import Console

    from studies.evaluate import require_libraries
    from studies.probe import print_probes
    from studies.probe import probe as run
    from studies.retention import print_retention, retention
    from studies.tasks import EvaluatedTask, load_task, parse_overrides

    require_libraries()
    models, overrides = split_models(arguments)
    evaluated = EvaluatedTask(task=task, data=str(data) if data else None, protocol=parse_overrides(overrides))
    described, protocol, folder = load_task(task, evaluated.protocol)
    results = output or Path("probes") / Path(task).stem
    if described.kind == "masked":
        print_retention(retention(models, described, protocol, data or folder, results), Console())
    else:
        print_probes(run(models, evaluated, results, processes=processes), Console())


def audit(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs; the others are compared with the first.")],
    checkpoint: Annotated[
        int | None, typer.Option(min=0, metavar="STEP", help="Default: the end of each phase, and the newest.")
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=15, max=20_000, help="Sentences to rank against. More show higher exposures.")
    ] = 1023,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure what a run memorised of the canaries that were planted in its text: their exposure by rank."""
    from rich.console import Console

    from launcher.status_line import status_line
    from studies.audit import audit as run
    from studies.audit import print_audit

    with status_line(Console(stderr=True), "reading") as show:
        result = run(runs, checkpoint=checkpoint, count=candidates, progress=show)
    if json_:
        print(json.dumps(result, indent=1))
    else:
        print_audit(result, Console())


def study(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY [KEY=VALUE]...",
            help="A study YAML or a shipped study (twin, freeze-low, freeze-mid, freeze-low-decay, decay-length, "
            "gain-by-size, forgetting, scaling), and overrides: of a grid key, of a study's key (arms.NAME.KEY, "
            "evaluate), or of every trial by dotted path.",
        ),
    ],
    recipe: Annotated[str | None, typer.Option(help="Another recipe than the study's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory; default runs/NAME. An old one resumes.")] = None,
    toy: Annotated[bool, typer.Option("--toy", help="Scale it down to minutes on two cores, on sample text.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Check everything, print plan, rule and power, and end.")
    ] = False,
) -> None:
    """Run a grid of trials and report on it. Exit codes: 0 done, 2 bad input, 3 failed, 75 stopped early, all saved."""
    from launcher.trials import open_trials
    from studies.plan import load_study
    from studies.study import run_study
    from studies.toy import toy_study

    loaded, folder = load_study(arguments[0], recipe, arguments[1:])
    output = output or Path("runs") / (f"{loaded.name}-toy" if toy else loaded.name)
    if toy:
        loaded, folder = toy_study(loaded, output)
    with open_trials(at_once=1) as cluster:
        finished = run_study(loaded, folder, output, cluster, plan=plan)
    if not finished:
        print("stopped, all saved; the same command again continues")
        raise typer.Exit(STOPPED)
