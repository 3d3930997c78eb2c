"""`detour-train --from RUN[@STEP]`: a run that continues another run's checkpoint into another future.

The branch takes over everything of the checkpoint: weights, moments, data positions, counters. Its recipe must tell the
same past, step by step, and may tell another future: a longer decay, another rate, other sources, one phase more.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path

from configs.errors import InputError
from configs.files import partial_path
from configs.load import changes_of_run, load_config, validate
from configs.schema import Origin, RunConfig
from configs.spans import PhaseSpan
from datapipe.targets import linear_rate
from launcher.same_inputs import spelt_as_before
from monitoring.events import Branched, record
from monitoring.log import LineWriter, iterate_metrics
from monitoring.run_directory import RunDirectory

FREE: tuple[str, ...] = (
    "phases.",
    "name:",
    "origin",
    "model.init:",
    "data.sources.",
    "data.evaluation",
    "data.sequence_length:",
    "model.max_position_embeddings:",
)
FREE += ("batch.sequences:", "optimizer.lr:")
"""Keys that may differ from the origin's. Those that decide past steps are compared step by step instead."""


def with_origin(config: RunConfig, reference: str, directory: Path) -> RunConfig:
    """Return the configuration of a branch.

    A branch that has begun continues without the run that it branched off.

    Args:
        config: The recipe of the branch.
        reference: `RUN` or `RUN@STEP`: a run directory, and a step of which it holds a checkpoint. Without a step: the
            step that `directory` branched off at if it is such a branch, else the newest valid checkpoint.
        directory: The run directory of the branch.

    Raises:
        InputError: There is no such run or checkpoint.
    """
    from engine.checkpoint import latest_of_run, list_checkpoints, step_of

    name, at, step = reference.rpartition("@")
    if not at or not step.isdigit():
        name, step = reference, ""
    run = RunDirectory(Path(name).expanduser().absolute())
    begun = RunDirectory(directory).config
    origin = load_config(str(begun)).origin if begun.is_file() else None
    if origin and Path(origin.run).resolve() == run.path.resolve() and step in ("", str(origin.step)):
        return config.model_copy(update={"origin": origin})
    if not run.config.is_file():
        raise InputError(
            f"--from {name}: no run directory (it has no {run.config.name}); for the weights of a model or a "
            "checkpoint without its optimizer set model.init",
            key="--from",
            code="no-such-run",
        )
    if run.path.resolve() == directory.resolve():
        raise InputError(
            f"--from {name} is the --output itself; give the branch another --output", key="--from", code="from-itself"
        )
    kept = sorted(step_of(path) for path in list_checkpoints(run.checkpoints))
    if step and int(step) not in kept:
        steps = ", ".join(f"{number:,}" for number in kept) or "none"
        raise InputError(
            f"--from {reference}: no checkpoint of step {int(step):,} is kept; kept are {steps}",
            key="--from",
            code="step-not-kept",
        )
    if not step:
        try:
            step = str(step_of(latest_of_run(run.path)))
        except InputError as error:
            raise InputError(f"--from {name}: {error}", key="--from", code=error.code) from None
    return config.model_copy(update={"origin": Origin(run=str(run.path), step=int(step))})


def check_branch(config: RunConfig, origin: Origin) -> Path:
    """Return the checkpoint that a branch starts from, if the recipe agrees with the steps before it.

    Raises:
        InputError: The checkpoint is damaged or gone, or the recipe tells another past than the origin's.
    """
    from engine.checkpoint import step_directory, verify

    checkpoint = step_directory(RunDirectory(Path(origin.run)).checkpoints, origin.step)
    meta = verify(checkpoint)
    if meta.config is None or not meta.optimizer:
        raise InputError(
            f"--from: {checkpoint} holds no optimizer state; set model.init to start from its weights",
            key="--from",
            code="no-optimizer-state",
        )
    past = validate(RunConfig, meta.config, str(checkpoint))
    changed = [
        line
        for line in changes_of_run(past, spelt_as_before(Path(origin.run), past, config))
        if not line.startswith(FREE)
    ]
    if config.total_steps < origin.step:
        changed.append(f"phases: {config.total_steps:,} steps in all, fewer than the {origin.step:,} of the past")
    else:
        changed += list(_changed_past(past, config, origin.step))
    if changed:
        raise InputError(
            f"--from {origin.run}@{origin.step}: the recipe tells another past\n  "
            + "\n  ".join(changed)
            + f"\nthe first {origin.step:,} steps must be those that were trained; change only what comes after, or "
            "set model.init to take the weights alone",
            key=changed[0].partition(":")[0],
            code="past-differs",
        )
    return checkpoint


def begin_branch(directory: Path, config: RunConfig, origin: Origin, checkpoint: Path) -> None:
    """Put the origin's checkpoint, and its log up to there, into a run directory that has no checkpoint yet."""
    run, source = RunDirectory(directory), RunDirectory(Path(origin.run))
    run.checkpoints.mkdir(exist_ok=True)
    target = run.checkpoints / checkpoint.name
    hidden = partial_path(target)
    shutil.rmtree(hidden, ignore_errors=True)
    shutil.copytree(checkpoint, hidden, copy_function=_link_or_copy)
    if source.tokenizer.is_dir() and not run.tokenizer.is_dir():
        shutil.copytree(source.tokenizer, run.tokenizer)
    run.metrics.unlink(missing_ok=True)
    with closing(LineWriter(run.metrics)) as writer:
        for line in iterate_metrics(source.path):
            if line["step"] <= origin.step:
                writer.append({**line, "phase": config.span_at(line["step"]).index})  # of the branch's own phases
    record(directory, Branched(step=origin.step, run=origin.run))
    hidden.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)  # files of a checkpoint never change, so both runs can share them
    except OSError:
        shutil.copy2(source, target)


def _changed_past(past: RunConfig, config: RunConfig, steps: int) -> Iterator[str]:
    """Yield `key: old -> new` for each setting in which the two recipes' first steps differ."""
    from engine.schedule import PhaseSchedule

    schedules = PhaseSchedule(past), PhaseSchedule(config)
    borders = sorted({0, steps, *(span.first for config in (past, config) for span in config.spans)})
    for first, end in pairwise(borders):
        if end > steps:
            return
        old, new = (next(span for span in run.spans if first < span.last) for run in (past, config))
        settings = _settings(old, first), _settings(new, first)
        for key, value in settings[0].items():
            if settings[1][key] != value:
                yield f"phases.{new.index}.{key}: {value} -> {settings[1][key]} from step {first + 1:,} on"
        changes: dict[str, list[Callable[[int], float]]] = {
            "lr": [schedule.learning_rate for schedule in schedules],
            "mask_rate": [partial(_mask_rate, span) for span in (old, new)],
        }
        for key, (before, after) in changes.items():
            step = next((step for step in range(first, end) if before(step) != after(step)), None)
            if step is not None:
                yield f"phases.{new.index}.{key}: {before(step):g} -> {after(step):g} at step {step + 1:,}"


def _mask_rate(span: PhaseSpan, step: int) -> float:
    """Return the mask rate of a 0-based step of the run."""
    rate = span.phase.mask_rate
    return linear_rate(*rate, (span.first, span.last), step) if isinstance(rate, tuple) else rate


def _settings(span: PhaseSpan, step: int) -> dict[str, object]:
    """Everything of a phase that decides a 0-based step of it, but for its learning rate and its mask rate."""
    others = {"tokens", "steps", "lr", "mask_rate", "sources", "sequence_length", "batch", "reset"}
    own = span.phase.model_dump(exclude=others)
    shares = {
        source.name: f"{source.upsample} times its tokens" if source.upsample else source.weight or 1.0
        for source in span.data.sources
    }
    return {
        **own,
        "reset": span.phase.reset if step == span.first else (),
        "sources": shares,
        "sequence_length": span.sequence_length,
        "batch.sequences": span.sequences,
    }
