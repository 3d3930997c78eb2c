"""`detour inspect`: the content of a shard set, a checkpoint or a run."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InputError
from configs.load import load_config
from datapipe.manifest import NAME as MANIFEST
from datapipe.shard_report import inspect_shards
from monitoring.events import Failed, Preempted, WorkerFailed
from monitoring.log import read_events, read_metrics
from monitoring.run_directory import RunDirectory


def describe(target: Path) -> str:
    """Report on a shard directory, a checkpoint or a run directory, for people.

    Raises:
        InputError: `target` is none of the three, or is damaged.
    """
    if target.parts and target.parts[0].endswith(":"):  # a Path keeps this much of a URL
        raise InputError(f"{target}: not on this machine; copy the directory here to inspect it", code="not-local")
    if target.is_file():
        raise InputError(
            f"{target} is a file; name the directory of shards, of a checkpoint or of a run", code="not-a-directory"
        )
    if (target / MANIFEST).is_file():
        return str(inspect_shards(target))
    if RunDirectory(target).config.is_file():
        return _describe_run(target)
    if next(target.glob("*.tar"), None):
        raise InputError(
            f"{target} holds tars and no {MANIFEST} to compare them with: they are raw text, or the {MANIFEST} was "
            "lost",
            code="no-manifest",
        )
    return _describe_checkpoint(target)


def _describe_checkpoint(directory: Path) -> str:
    from engine.checkpoint import verify

    meta = verify(directory)
    architecture = meta.architecture
    size = sum(file.stat().st_size for file in directory.iterdir())
    origin = meta.config["name"] if meta.config else meta.source
    return "\n".join(
        [
            f"{directory}: step {meta.step:,} of {origin}, {size / 1e6:,.1f} MB; every sha256 is right",
            f"  model       {architecture['num_hidden_layers']} layers, hidden {architecture['hidden_size']}, "
            f"{architecture['num_attention_heads']} heads, vocabulary {architecture['vocab_size']:,}",
            f"  optimizer   {'kept' if meta.optimizer else 'none'}",
        ]
    )


def _describe_run(directory: Path) -> str:
    from engine.checkpoint import latest_valid, list_checkpoints, step_of

    run = RunDirectory(directory)
    config = load_config(str(run.config))
    newest, damaged = latest_valid(run.checkpoints)
    steps = sorted(step_of(path) for path in list_checkpoints(run.checkpoints))
    lines = read_metrics(directory)
    events = read_events(directory)
    kinds = [event["event"] for event in events]
    complete = run.export.is_dir()
    return "\n".join(
        [
            f"{directory}: run {config.name}, step {lines[-1]['step'] if lines else 0:,} of {config.total_steps:,}"
            + (", complete" if complete else ""),
            *([f"  branched     off {config.origin.run} at step {config.origin.step:,}"] if config.origin else []),
            f"  checkpoints  {', '.join(f'{step:,}' for step in steps) or 'none'}"
            + (f"; newest valid {newest.name}" if newest else ""),
            *(f"  damaged      {complaint}" for complaint in damaged),
            *([f"  loss         {lines[-1]['objective']} {_loss(lines[-1]['loss'])}"] if lines else []),
            f"  failures     {kinds.count(WorkerFailed.KIND)}, preemptions {kinds.count(Preempted.KIND)}",
            *([f"  failed       {events[-1]['detail']}"] if kinds[-1:] == [Failed.KIND] else []),
            f"  export       {run.export if complete else 'none yet'}",
        ]
    )


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
