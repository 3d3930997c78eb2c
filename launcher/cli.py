"""The command line: `detour`, and `detour-train` for its most used command."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError, RunFailedError

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_STOPPED = 2, 3, 75

app = typer.Typer(
    name="detour",
    help="Adapt a ModernBERT encoder to its domain by the CLM detour.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Output = Annotated[Path, typer.Option(help="Directory to write.")]


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="A YAML file or a shipped recipe (default: ./detour.yaml, else demo), and overrides by dotted path, "
            "such as batch.sequences=8 phases.0.tokens=2M.",
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of the Ray cluster to use.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME. An old one resumes.")] = None,
) -> None:
    """Train a model, or go on with a run. Exit codes: 0 done, 2 bad input, 3 failed, 75 stopped early, all saved."""
    from configs.load import load_config

    words = list(arguments or ())
    recipe = words.pop(0) if words and "=" not in words[0] else None
    overrides = words if nodes is None else [*words, f"cluster.nodes={nodes}"]
    config = load_config(recipe, overrides)
    from launcher.job import run_job

    result = run_job(config, output or Path("runs") / config.name)
    if not result.finished:
        print(f"stopped ({result.reason}) after step {result.step:,}, all saved; the same command again continues")
        raise typer.Exit(EXIT_STOPPED)


@app.command()
def prepare(
    inputs: Annotated[list[str], typer.Argument(help="jsonl[.gz|.zst], txt or parquet files, or directories of them.")],
    output: Output,
    tokenizer: Annotated[str, typer.Option(help="Directory, hub id, or package://tokenizer/modernbert.")],
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out texts that appeared before, to the byte.")] = False,
    min_tokens: Annotated[int, typer.Option(min=1, help="Leave out shorter documents.")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Leave out longer documents.")] = None,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share that goes to OUTPUT/held-out.")] = 0.0,
    processes: Annotated[int, typer.Option(min=0, help="0: as many as there are cores and memory for.")] = 0,
) -> None:
    """Tokenize text into shards and a manifest. Interrupted, it goes on where it was."""
    from rich.console import Console

    from configs.units import format_count
    from datapipe.manifest import NAME, read_manifest
    from datapipe.prepare import prepare as run
    from datapipe.selection import HELD_OUT, Selection
    from datapipe.shard_report import source_lines
    from datapipe.tokenizer import load_tokenizer
    from launcher.status import status_line

    loaded = load_tokenizer(tokenizer)
    with status_line(Console(), "reading") as show:
        chosen = Selection(dedup, min_tokens, max_tokens, held_out)
        run(inputs, loaded, output, show, selection=chosen, processes=processes)
    for directory in (output, output / HELD_OUT):
        if (directory / NAME).exists():
            made = read_manifest(directory)
            total = f"{made.documents:,} documents, {format_count(made.tokens)} tokens in {len(made.shards)} shards"
            print("\n".join([f"{directory}: {total}", *source_lines(made)]))


@app.command()
def inspect(
    target: Annotated[Path, typer.Argument(help="A shard directory, a checkpoint or a run directory.")],
) -> None:
    """Say what a shard set, a checkpoint or a run holds, and whether it is whole."""
    from launcher.inspect import describe

    print(describe(target))


@app.command()
def monitor(
    target: Annotated[str, typer.Argument(help="A run directory, or its metrics endpoint (http://host:port).")],
    prometheus: Annotated[str, typer.Option(help="Asked for the alerts that fire.")] = "http://127.0.0.1:9090",
    once: Annotated[bool, typer.Option("--once", help="Print the state once.")] = False,
) -> None:
    """Show the live state of a run: phase, loss, throughput, time left, restarts, alerts."""
    from monitoring.monitor import watch

    watch(target, prometheus, once)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two to eight run directories.")],
    output: Annotated[Path, typer.Option(help="The page of curves to write.")] = Path("compare.html"),
) -> None:
    """Put runs side by side: a table here, and a page of curves."""
    from monitoring.compare import compare as compare_runs

    print(compare_runs(runs, output))


@app.command()
def targets(
    directory: Annotated[Path, typer.Argument(help="`monitoring.targets` of the runs.")] = Path("/tmp/detour/targets"),
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9463,
) -> None:
    """Tell a Prometheus elsewhere, over HTTP, which runs live on this machine."""
    from monitoring.discovery import serve_targets

    server = serve_targets(directory, address, port)
    print(f"http://{address}:{port}/ lists the runs; --address 0.0.0.0 opens it to other machines", flush=True)
    server.serve_forever()


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run directory (its newest checkpoint) or a checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
) -> None:
    """Write a Hugging Face ModernBertForMaskedLM: safetensors, tokenizer, model card."""
    from launcher.inspect import export_model

    print(export_model(source, output))


@app.command(name="import")
def import_(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub id of a ModernBERT.")],
    checkpoint: Annotated[Path, typer.Argument(help="Directory to write.")],
) -> None:
    """Turn a Hugging Face ModernBERT into a step-0 checkpoint; `model.init` does the same at the start of a run."""
    from engine.export import import_hf

    import_hf(model, checkpoint)
    print(f"{checkpoint}: step 0 of {model}; train from it with model.init={checkpoint}")


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from configs.load import RECIPES, shipped

    for name, text in shipped(RECIPES).items():
        about = " ".join(line.lstrip("# ") for line in text.splitlines()[:1] if line.startswith("#"))
        print(f"{name:<36}{about}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a run's configuration."""
    from configs.schema import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
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


@app.command()
def doctor() -> None:
    """Say what this machine can do, and what to fix."""
    from launcher.doctor import examine

    if not examine():
        raise typer.Exit(1)


@app.command()
def drift(
    a: Annotated[str, typer.Argument(help="A run, a checkpoint or a Hugging Face model.")],
    b: Annotated[str, typer.Argument(help="What it became, or its twin.")],
    output: Output,
    texts: Annotated[str, typer.Option(help="Held-out text.")] = "package://corpus/tico19_en.jsonl.gz",
    count: Annotated[int, typer.Option(help="Documents read of it.")] = 500,
    noise: Annotated[list[str] | None, typer.Option(help="A from another seed, as the yardstick; repeat.")] = None,
) -> None:
    """Say how far two models are apart, layer by layer: CKA of their states, and change of their weights."""
    from rich.console import Console
    from rich.table import Table

    from studies.drift import drift as run

    rows = run(a, b, output, texts=texts, count=count, noise=noise or ())
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("-" if value is None else f"{value:.6g}" for value in row.values()))
    Console().print(table)
    print(f"{output / 'drift.svg'}, {output / 'drift.json'}, {output / 'weights.json'}")


@app.command()
def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [KEY=VALUE]...",
            help="Runs, checkpoints or Hugging Face models; the first is what the others are compared with. And "
            "overrides of the protocol, such as epochs=3 lr=1e-4, or files.test=null.",
        ),
    ],
    task: Annotated[str, typer.Option(help="A task YAML, or the name of a described task.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the task's files; default: the YAML's own.")] = None,
    seeds: Annotated[int, typer.Option(help="Fine-tunings of each model.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Directory of the results; default evaluations/TASK.")] = None,
    training_text: Annotated[
        list[str] | None, typer.Option(help="Text the models saw, searched for the test examples; repeat.")
    ] = None,
) -> None:
    """Fine-tune and score models on a task, with several seeds, and compare them in pairs."""
    from rich.console import Console

    from launcher.trials import open_trials
    from studies.evaluate import evaluate as run
    from studies.evaluate import print_summary
    from studies.tasks import EvaluatedTask, parse_overrides

    models, overrides = ([w for w in arguments if ("=" in w) == is_override] for is_override in (False, True))
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


@app.command()
def study(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY [KEY=VALUE]...",
            help="A study YAML or a shipped study (twin, freeze-low, freeze-mid, decay-length, scaling), and overrides "
            "of every trial by dotted path.",
        ),
    ],
    recipe: Annotated[str | None, typer.Option(help="Another recipe than the study's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory; default runs/NAME. An old one resumes.")] = None,
) -> None:
    """Run a grid of trials and report on it. Exit codes: 0 done, 2 bad input, 3 failed, 75 stopped early, all saved."""
    from launcher.trials import open_trials
    from studies.plan import load_study
    from studies.study import run_study

    loaded, folder = load_study(arguments[0], recipe, arguments[1:])
    with open_trials(at_once=1) as cluster:
        finished = run_study(loaded, folder, output or Path("runs") / loaded.name, cluster)
    if not finished:
        print("stopped, all saved; the same command again continues")
        raise typer.Exit(EXIT_STOPPED)


def main() -> None:
    """Entry point of `detour`."""
    _guarded(app)


def train_main() -> None:
    """Entry point of `detour-train`."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(train)
    _guarded(command)


def _guarded(command: Callable[[], None]) -> None:
    """Run a command; what goes wrong as foreseen is one message and an exit code, never a traceback."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STOPPED))  # nothing is trained yet
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    try:
        command()
    except InputError as error:
        _fail(error, EXIT_BAD_INPUT)
    except RunFailedError as error:
        _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except Exception:  # a fault of ours: its traceback is what a report of it needs
        traceback.print_exc()
        sys.exit(EXIT_FAILED)


def _fail(error: Exception, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)
