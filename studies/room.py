"""The disk that a study needs, and what its finished trials give back."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from configs.errors import InputError
from configs.files import partial_path
from configs.schema import RunConfig
from monitoring.run_directory import RunDirectory
from studies.derived import parameters_of
from studies.plan import Trial

EXPORT_BYTES = 4
"""Bytes per parameter of an export."""


def require_room(output: Path, trials: Sequence[Trial], trunks: Mapping[str, Trial], at_once: int) -> str:
    """Require that the disk holds all checkpoints of the trials to come.

    A running trial holds its newest checkpoints, those at the ends of phases and one that is being written. A finished
    trial holds what `thin` leaves.

    Args:
        output: Folder of the study, or where it will be.
        trials: Trials to run.
        trunks: Address of a trial -> its trunk.
        at_once: Trials that run together.

    Returns:
        A sentence on what is needed and what is free.

    Raises:
        InputError: The disk is too small.
    """
    from engine.planning.memory import WIDTH, checkpoint_bytes

    used = [trunks[trial.address] for trial in trials if trial.address in trunks]
    runs = {trial.address: trial for trial in [*used, *trials]}
    shared, kept, running = {trunk.address for trunk in trunks.values()}, 0, []
    for address, trial in runs.items():
        size, config = parameters_of(trial.config), trial.config
        checkpoint = checkpoint_bytes(size, WIDTH["fp32"])  # the largest precision
        # A branch shares the files of its trunk's checkpoint, and a trunk keeps the one at its end.
        ends = 1 if address in shared else 0 if address in trunks else len(config.phases) - 1
        extra = config.total_steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
        kept += size * EXPORT_BYTES + checkpoint * (ends + extra)
        running.append(checkpoint * (config.checkpoint.keep + 1))
    needed = kept + sum(sorted(running)[-at_once:])
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    told = f"needs about {needed / 1e9:.2f} GB of disk, {free / 1e9:.1f} GB are free in {place}"
    if needed > free:
        raise InputError(
            f"--output {output}: the study {told}; free some space, choose another --output, or run fewer trials",
            key="--output",
            code="disk-too-small",
        )
    return told


def thin(directory: Path, config: RunConfig, kept: Collection[int]) -> None:
    """Delete a finished run's checkpoints, except those at the given steps and at multiples of `keep_every`.

    The export in `hf` holds the final weights, which probes, drift and transplant read. Without one nothing is deleted.
    """
    from engine.checkpoint import clear_partial, list_checkpoints, step_of

    every, checkpoints = config.checkpoint.keep_every, RunDirectory(directory).checkpoints
    if not (RunDirectory(directory).export / "config.json").is_file():
        return
    for path in list_checkpoints(checkpoints):
        step = step_of(path)
        if step in kept or (every and step % every == 0):
            continue
        hidden = partial_path(path)
        path.rename(hidden)  # because a half-deleted checkpoint must not look like a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)
    clear_partial(checkpoints)
