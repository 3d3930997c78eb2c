"""The command line, `detour` and `detour-train`: it parses and prints, and calls the rooms that do the work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launcher.exits import STOPPED, run_command

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from datapipe.tokenizer import Tokenizer

EXPORTS = {"encoder": "ModernBertForMaskedLM", "decoder": "ModernBertDecoderForCausalLM"}
"""Class of each kind of export."""

app = typer.Typer(name="detour", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from configs.versions import version_line

        print(version_line())
        raise typer.Exit


Output = Annotated[Path, typer.Option(help="Directory to write.")]
Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
]


@app.callback()
def detour(version: Version = False) -> None:
    """Adapt a ModernBERT encoder to its domain by the CLM detour."""


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
    from configs.load import load_config
    from launcher import stop

    if stop_with_parent:
        stop.stop_with_parent()
    overrides = list(arguments or ())
    recipe = overrides.pop(0) if overrides and "=" not in overrides[0] else None
    config = load_config(recipe, overrides)
    if nodes is not None:
        config = _with_nodes(config, nodes)
    directory = output or Path("runs") / config.name
    if branch_from is not None:
        from launcher.branch import with_origin

        config = with_origin(config, branch_from, directory)
    from launcher.supervisor import run_job  # imports Ray; a wrong configuration is reported sooner

    result = run_job(config, directory)
    if not result.finished:
        print(f"stopped ({result.reason}) after step {result.step:,}, all saved; the same command again continues")
        raise typer.Exit(STOPPED)


def _with_nodes(config: RunConfig, nodes: int) -> RunConfig:
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"nodes": nodes})})


@app.command()
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="As for train; with cluster.gpus_per_node=8."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the cluster.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a run for a cluster that is not here: memory, traffic, speed. Needs no GPU, no Ray and no hub."""
    from configs.load import load_config

    overrides = list(arguments or ())
    recipe = overrides.pop(0) if overrides and "=" not in overrides[0] else None
    config = load_config(recipe, overrides)
    if nodes is not None:
        config = _with_nodes(config, nodes)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # before torch and the hub's client are imported
    from launcher.plan import plan_run, plan_text

    planned, unchecked = plan_run(config)
    if as_json:
        print(json.dumps({**planned.to_json(), "not_checked": unchecked}, indent=2))
    else:
        print(plan_text(planned, unchecked))


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, s3://, gs:// and https:// URLs, or - for standard input: json, jsonl, csv, "
            "tsv, txt, parquet, Arrow; .gz, .bz2, .xz, .zst; in zip and tar."
        ),
    ],
    output: Output,
    tokenizer: Annotated[str, typer.Option(help="Directory, hub id, or package://tokenizer/modernbert.")],
    text: Annotated[str, typer.Option(help="Column with the text; a.b is the key b inside column a.")] = "text",
    id_: Annotated[str | None, typer.Option("--id", help="Column with the names of documents. Default: id.")] = None,
    group: Annotated[str | None, typer.Option(help="Column of what belongs together, such as a patient.")] = None,
    where: Annotated[str | None, typer.Option(help="Records to read: 'score >= 3 and lang == \"fr\"'.")] = None,
    spans: Annotated[
        str | None,
        typer.Option(help="Column with identifiers, [[start, end, label], ...]. Default: spans, and .ann beside .txt."),
    ] = None,
    identifiers: Annotated[
        str | None, typer.Option(help="File of regular expressions, one per line, whose matches are identifiers.")
    ] = None,
    mask_spans: Annotated[bool, typer.Option("--mask-spans", help="Put [LABEL] in place of identifiers.")] = False,
    split: Annotated[str | None, typer.Option(help="Split to read where splits are named. Default: train.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a .txt file is a document.")] = False,
    encoding: Annotated[str | None, typer.Option(help="Encoding, such as cp1252. Default: detected.")] = None,
    format_: Annotated[
        Literal["json", "csv", "tsv", "txt", "parquet", "arrow"] | None,
        typer.Option("--format", help="json, csv, tsv, txt, parquet or arrow, where no name tells it."),
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="stop, or skip: count faulty records and leave them out.")
    ] = "stop",
    strict: Annotated[bool, typer.Option("--strict", help="A file that is not read is an error.")] = False,
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out texts that appeared before, to the byte.")] = False,
    near_dedup: Annotated[
        float | None,
        typer.Option(min=0.3, max=1, help="Leave out texts with this share of an earlier text's word pairs: 0.8."),
    ] = None,
    min_tokens: Annotated[int, typer.Option(min=1, help="Leave out shorter documents.")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Leave out longer documents.")] = None,
    held_out: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the documents, or groups, that goes to OUTPUT/held-out.")
    ] = 0.0,
    canaries: Annotated[
        int, typer.Option(min=0, max=10_000, help="Random secrets to plant, by which `detour audit` finds leaks: 50.")
    ] = 0,
    processes: Annotated[int, typer.Option(min=0, help="0: as many as there are cores and memory for.")] = 0,
) -> None:
    """Tokenize text into shards and a manifest. An interrupted preparation continues where it was."""
    from rich.console import Console

    from configs.schema import Reading
    from datapipe.manifest import NAME
    from datapipe.prepare import prepare as run
    from datapipe.selection import HELD_OUT, Selection
    from datapipe.tokenizer import load_tokenizer
    from launcher.status_line import status_line

    reading = Reading(
        text=text,
        id=id_,
        group=group,
        where=where,
        spans=spans,
        identifiers=identifiers,
        mask_spans=mask_spans,
        split=split,
        lines=lines,
        encoding=encoding,
        format=format_,
        on_error=on_error,
        strict=strict,
        canaries=canaries,
    )
    loaded = load_tokenizer(tokenizer)
    console = Console()
    with status_line(console, "reading") as show:
        run(
            inputs,
            loaded,
            output,
            show,
            selection=Selection(dedup, min_tokens, max_tokens, held_out, near_dedup),
            reading=reading,
            report=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
            processes=processes,
        )
    for directory in (output, output / HELD_OUT):
        if (directory / NAME).exists():
            _print_prepared(directory, loaded)
    if (output / HELD_OUT / NAME).exists():
        apart = f"0 values of {group} on both sides, because the choice goes by them"
        print(f"  groups      {apart if group else 'not kept apart; --group COLUMN holds out whole patients'}")


def _print_prepared(directory: Path, tokenizer: Tokenizer) -> None:
    from datapipe.manifest import read_manifest
    from datapipe.shard_report import framing_line, overlap_lines, size_line, source_lines

    manifest = read_manifest(directory)
    lines = [framing_line(manifest, tokenizer), *source_lines(manifest), *overlap_lines(manifest)]
    print("\n".join([size_line(directory, manifest), *lines]))


@app.command()
def inspect(
    target: Annotated[Path, typer.Argument(help="A shard directory, a checkpoint or a run directory.")],
) -> None:
    """Describe a shard set, a checkpoint or a run, and check its digests."""
    from launcher.describe import describe

    print(describe(target))


@app.command()
def monitor(
    target: Annotated[str, typer.Argument(help="A run directory, or its metrics endpoint (http://host:port).")],
    prometheus: Annotated[str, typer.Option(help="Prometheus that knows the firing alerts.")] = "http://127.0.0.1:9090",
    once: Annotated[bool, typer.Option("--once", help="Print the state once.")] = False,
) -> None:
    """Show the live state of a run: phase, loss, throughput, time left, restarts, alerts."""
    from monitoring.monitor import watch

    watch(target, prometheus, once)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two to 64 run directories.")],
    output: Annotated[Path, typer.Option(help="The page of curves to write.")] = Path("compare.html"),
) -> None:
    """Compare runs: print a table, and write a page of curves."""
    from monitoring.compare import compare as compare_runs

    print(compare_runs(runs, output))


@app.command()
def targets(
    directory: Annotated[Path, typer.Argument(help="`monitoring.targets` of the runs.")] = Path("/tmp/detour/targets"),
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, help="Port to listen on; 0: any free port.")] = 9463,
) -> None:
    """Serve the list of live runs on this machine over HTTP, for a Prometheus on another machine."""
    from monitoring.discovery import serve_targets

    server = serve_targets(directory, address, port)
    print(
        f"http://{address}:{server.server_address[1]}/ lists the runs; --address 0.0.0.0 opens it to other machines",
        flush=True,
    )
    server.serve_forever()


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run directory (its newest checkpoint) or a checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    kind: Annotated[
        Literal["encoder", "decoder"], typer.Option("--as", help="A masked model, or one that predicts the next token.")
    ] = "encoder",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="bf16 rounds the fp32 main weights.")] = "fp32",
) -> None:
    """Write a Hugging Face model: safetensors, tokenizer, model card."""
    from launcher.export import export_model

    exported = export_model(source, output, kind, dtype)
    print(f"{output}: {EXPORTS[kind]} after step {exported.step:,}, from {exported.checkpoint}")


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
def merge(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="One run with --steps; else runs, checkpoints or Hugging Face models."),
    ],
    output: Output,
    steps: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Merge the run's N newest checkpoints that are kept: N saved steps, not N steps back.",
        ),
    ] = None,
    weights: Annotated[
        Literal["mean", "1-sqrt"],
        typer.Option(
            help="Decay of the learning rate that the merge stands for, over the N checkpoints: mean (equal weights, a "
            "linear decay) or 1-sqrt. Several models have equal weights."
        ),
    ] = "mean",
) -> None:
    """Average the weights of a run's checkpoints, or of several models.

    Writes a Hugging Face model, OUTPUT/hf, and a checkpoint of step 0 for model.init, OUTPUT/checkpoint.
    """
    from rich.console import Console

    from engine.merge import merge as run
    from launcher.status_line import status_line

    with status_line(Console(), "reading") as show:
        merged = run(models, output, show, steps=steps, weights=weights)
    for name, coefficient in merged.shares:
        print(f"{coefficient:.6f}  {name}")
    for note in merged.notes:
        print(f"note: {note}")
    print(
        f"{output / 'hf'}: merge of {len(merged.shares)} models; train from it with model.init={output / 'checkpoint'}"
    )


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from configs.load import RECIPES, shipped

    texts = shipped(RECIPES)
    width = max(map(len, texts)) + 2
    for name, text in texts.items():
        first_line = text.partition("\n")[0]
        print(f"{name:<{width}}{first_line.lstrip('# ') if first_line.startswith('#') else ''}")


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


@app.command()
def drift(
    a: Annotated[str, typer.Argument(help="A run, a checkpoint or a Hugging Face model.")],
    b: Annotated[str, typer.Argument(help="The model to compare with it.")],
    output: Output,
    texts: Annotated[str, typer.Option(help="Held-out text.")] = "package://corpus/tico19_en.jsonl.gz",
    count: Annotated[int, typer.Option(help="Documents to read.")] = 500,
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


@app.command()
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
    data: Annotated[Path | None, typer.Option(help="Folder of the task's files; default: the YAML's own.")] = None,
    seeds: Annotated[int, typer.Option(help="Fine-tunings per model.")] = 5,
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
    data: Annotated[Path | None, typer.Option(help="Folder of the task's files; default: the YAML's own.")] = None,
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
    models, overrides = ([w for w in arguments if ("=" in w) == is_override] for is_override in (False, True))
    evaluated = EvaluatedTask(task=task, data=str(data) if data else None, protocol=parse_overrides(overrides))
    described, protocol, folder = load_task(task, evaluated.protocol)
    results = output or Path("probes") / Path(task).stem
    if described.kind == "masked":
        print_retention(retention(models, described, protocol, data or folder, results), Console())
    else:
        print_probes(run(models, evaluated, results, processes=processes), Console())


@app.command()
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


@app.command()
def transplant(
    a: Annotated[str, typer.Argument(help="A run, a checkpoint or a Hugging Face model: all other weights.")],
    b: Annotated[str, typer.Argument(help="The model that gives the layers.")],
    layers: Annotated[str, typer.Option(help="Layers from 0, such as 0-7 or 0-3,9.")],
    output: Output,
) -> None:
    """Write model A with some layers of model B, as a Hugging Face model to probe."""
    from studies.transplant import parse_layers
    from studies.transplant import transplant as run

    moved = run(a, b, parse_layers(layers), output)
    print(f"{output}: {a} with layers {layers} of {b} ({moved} weights)")


@app.command()
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


def main() -> None:
    """Run `detour`."""
    run_command(app)


def train_main() -> None:
    """Run `detour-train`."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(train)
    run_command(command)
