"""What a directory of Detour's holds: shards, a checkpoint, or a run."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InputError
from datapipe.manifest import NAME as MANIFEST
from datapipe.shard_report import inspect_shards
from datapipe.tokenizer import load_tokenizer
from launcher.directory import CONFIG
from monitoring.log import read_events, read_metrics
from monitoring.run_directory import RunDirectory


def describe(target: Path) -> str:
    """A report for people. Raises InputError where `target` is none of the three, or is damaged."""
    if target.parts and target.parts[0].endswith(":"):  # what a Path leaves of a URL
        raise InputError(f"{target}: not on this machine; copy the directory here to inspect it")
    if (target / MANIFEST).is_file():
        return str(inspect_shards(target))
    if (target / CONFIG).is_file():
        return _run(target)
    if next(target.glob("*.tar"), None):
        raise InputError(
            f"{target} holds tars and no {MANIFEST} to compare them with: they are raw text, or the {MANIFEST} was lost"
        )
    return _checkpoint(target)


def export_model(source: Path, output: Path) -> str:
    """Export a run's newest valid checkpoint, or a checkpoint; what was written, in a line. Raises InputError."""
    from engine.checkpoint import describe as describe_checkpoint
    from engine.checkpoint import latest_valid
    from engine.export import export_hf

    checkpoint = source
    if (source / CONFIG).is_file():
        newest, damaged = latest_valid(RunDirectory(source).checkpoints)
        if newest is None:
            raise InputError("; ".join(damaged) or f"{source} has no checkpoint yet; nothing to export")
        checkpoint = newest
    meta = describe_checkpoint(checkpoint)
    if meta.config is None:
        raise InputError(f"{checkpoint} was imported from {meta.source} and never trained; that is its export")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; name a new directory for the model")
    export_hf(checkpoint, output, load_tokenizer(meta.config["tokenizer"]))
    return f"{output}: ModernBertForMaskedLM after step {meta.step:,}, from {checkpoint}"


def _checkpoint(directory: Path) -> str:
    from engine.checkpoint import verify as verify_checkpoint

    meta = verify_checkpoint(directory)
    shape = meta.architecture
    size = sum(file.stat().st_size for file in directory.iterdir())
    origin = meta.config["name"] if meta.config else meta.source
    return "\n".join(
        [
            f"{directory}: step {meta.step:,} of {origin}, {size / 1e6:,.1f} MB; every sha256 is right",
            f"  model       {shape['num_hidden_layers']} layers, hidden {shape['hidden_size']}, "
            f"{shape['num_attention_heads']} heads, vocabulary {shape['vocab_size']:,}",
            f"  optimizer   {'kept' if meta.optimizer else 'none'}",
        ]
    )


def _run(directory: Path) -> str:
    from configs.load import load_config
    from engine.checkpoint import latest_valid, list_checkpoints, step_of

    config = load_config(str(directory / CONFIG))
    newest, damaged = latest_valid(RunDirectory(directory).checkpoints)
    steps = [step_of(path) for path in list_checkpoints(RunDirectory(directory).checkpoints)]
    lines = read_metrics(directory)
    events = [event["event"] for event in read_events(directory)]
    done = RunDirectory(directory).export.is_dir()
    return "\n".join(
        [
            f"{directory}: run {config.name}, step {lines[-1]['step'] if lines else 0:,} of {config.total_steps:,}"
            + (", complete" if done else ""),
            f"  checkpoints  {', '.join(f'{step:,}' for step in sorted(steps)) or 'none'}"
            + (f"; newest valid {newest.name}" if newest else ""),
            *(f"  damaged      {complaint}" for complaint in damaged),
            *([f"  loss         {lines[-1]['objective']} {lines[-1]['loss']:.3f}"] if lines else []),
            f"  failures     {events.count('worker_failed')}, preemptions {events.count('preempted')}",
            f"  export       {RunDirectory(directory).export if done else 'none yet'}",
        ]
    )
