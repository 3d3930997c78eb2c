"""The directory of a checkpoint: where it lies, whether it is whole, and its tensors.

A checkpoint is a directory `step-00000500`. It holds Megatron-Core's distributed format and detour.json. That file is a
`CheckpointMeta`: everything that is not a tensor, and the size and sha256 of every other file. A checkpoint is written
under a hidden name and renamed when it is complete. Tensors are stored by their position in the whole model, so any
tensor-, pipeline- and data-parallel layout can load them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import file_sha256, partial_path
from configs.load import load_config
from configs.schema import RunConfig
from engine.checkpoint_meta import CheckpointMeta
from engine.modernbert.config import CONFIG_FILE
from monitoring.run_directory import RunDirectory


def step_directory(checkpoints: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` completed steps."""
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the completed steps of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints, newest first."""
    return sorted(checkpoints.glob("step-????????"), reverse=True)


def latest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and one complaint per newer, damaged one."""
    complaints = []
    for path in list_checkpoints(checkpoints):
        try:
            verify(path)
        except InputError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    return None, complaints


def latest_of_run(directory: Path) -> Path:
    """Return the newest undamaged checkpoint of a run directory.

    Raises:
        InputError: There is none, or the run went on to its end and a study has deleted its last checkpoint.
    """
    run = RunDirectory(directory)
    newest, damaged = latest_valid(run.checkpoints)
    if newest is None:
        raise InputError("; ".join(damaged) or f"{directory} has no checkpoint yet", code="no-checkpoint")
    if run.export.is_dir() and not damaged and step_of(newest) < load_config(str(run.config)).total_steps:
        raise InputError(
            f"{directory}: the last checkpoint of this finished run is deleted, and its model is {run.export}; name "
            f"that, or a checkpoint such as {newest}",
            code="checkpoint-thinned",
        )
    return newest


def describe(checkpoint: Path) -> CheckpointMeta:
    """Read a checkpoint's detour.json. No tensor is read.

    Raises:
        InputError: The directory is not a checkpoint of this format, or its detour.json is damaged.
    """
    path = checkpoint / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{checkpoint} is not a Detour checkpoint: it has no {CONFIG_FILE}", code="not-a-checkpoint"
        ) from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(f"{path} is damaged ({error})") from None
    return CheckpointMeta.from_json(content, path)


def verify(checkpoint: Path, part: int = 0, parts: int = 1) -> CheckpointMeta:
    """Read detour.json and check every file's size and sha256.

    Args:
        checkpoint: Directory of the checkpoint.
        part: Part of the files to check, from 0; part 0 checks the index of the tensors as well.
        parts: Number of parts of about equal size, because several processes share the work.

    Raises:
        InputError: A file is damaged or not trusted; the message names it.
    """
    from engine.megatron.torch_index import INDEX_FILE, verify_index

    meta = describe(checkpoint)
    # The index comes first, so that part 0 reads it after its sha256; then by size, so that the parts are alike.
    files = sorted(meta.files.items(), key=lambda item: (item[0] != INDEX_FILE, -item[1][0], item[0]))
    for name, (size, sha256) in files[part::parts]:
        _verify_file(checkpoint / name, size, sha256)
    if part == 0:
        verify_index(checkpoint)
    return meta


def _verify_file(path: Path, size: int, sha256: str) -> None:
    try:
        actual_size = path.stat().st_size if path.is_file() else None
        if actual_size != size:
            present = "nothing" if actual_size is None else f"{actual_size} bytes"
            raise _damaged(f"{path} is damaged: {size} bytes were written, {present} found")
        if file_sha256(path) != sha256:
            raise _damaged(f"{path} is damaged: its sha256 is not the one written")
    except OSError as error:
        raise _damaged(f"{path} cannot be read ({error.strerror})") from None


def load(checkpoint: Path, model: Any, optimizer: Any | None) -> None:
    """Fill model and optimizer from a verified checkpoint, whatever layout wrote it.

    Args:
        checkpoint: A verified checkpoint.
        model: This rank's bare model.
        optimizer: The distributed optimizer; None loads the weights alone.

    Raises:
        InputError: The checkpoint does not fit the model.
    """
    from megatron.core import dist_checkpointing

    from engine.megatron.torch_index import weights_only_loading

    wanted: dict[str, Any] = {"model": sharded_weights(model)}
    if optimizer is not None:
        wanted["optimizer"] = optimizer.sharded_state_dict(wanted["model"], is_loading=True, metadata=_sharding())
    with weights_only_loading():
        state = dist_checkpointing.load(wanted, str(checkpoint))
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    if unexpected or any(not key.endswith("_extra_state") for key in missing):
        raise InputError(
            f"{checkpoint} does not fit the model: missing {missing}, unexpected {unexpected}",
            code="checkpoint-does-not-fit",
        )
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


def prune(checkpoints: Path, config: RunConfig) -> None:
    """Delete a run's expired checkpoints in a folder, and what interrupted saves left behind."""
    for path in expired(list_checkpoints(checkpoints), config):
        hidden = partial_path(path)
        path.rename(hidden)  # because a half-deleted checkpoint must not look like a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)
    clear_partial(checkpoints)


def expired(newest_first: Sequence[Path], config: RunConfig) -> list[Path]:
    """Return the checkpoints beyond the newest `checkpoint.keep` that nothing else keeps."""
    staying = lasting(map(step_of, newest_first), config)
    return [path for path in newest_first[config.checkpoint.keep :] if step_of(path) not in staying]


def lasting(steps: Iterable[int], config: RunConfig) -> set[int]:
    """Return the steps whose checkpoints stay, however old they get.

    These are the multiples of `checkpoint.keep_every`, and the ends of phases, because other runs branch off there.
    """
    phase_ends, interval = {span.last for span in config.spans}, config.checkpoint.keep_every
    return {step for step in steps if step in phase_ends or (interval and step % interval == 0)}


def clear_partial(checkpoints: Path) -> None:
    """Delete what interrupted saves left behind."""
    for path in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(checkpoint: Path) -> None:
    """Hide a damaged checkpoint, so that its step can be saved again and retention does not count it."""
    aside = checkpoint.with_name(f".{checkpoint.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def sharded_weights(model: Any) -> dict[str, Any]:
    """Return this rank's parameters with their positions in the whole model."""
    sharded = model.sharded_state_dict(metadata=_sharding())
    return {name: entry for name, entry in sharded.items() if not name.endswith("_extra_state")}


def _sharding() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _damaged(message: str) -> InputError:
    return InputError(f"{message}; use an older checkpoint", code="checkpoint-damaged")
