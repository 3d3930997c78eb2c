"""Checkpoints: Megatron-Core's distributed format plus one JSON file, visible only when complete.

A checkpoint is a directory `step-00000500` with Megatron's files and `detour.json`, which holds what is not a tensor
(step, configuration, architecture, positions in the data) and the size and sha256 of every other file. It is written
under a hidden name and renamed when whole. Tensors are stored by their place in the whole model, so any tensor-,
pipeline- and data-parallel layout can load them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from engine.modernbert.config import CONFIG_FILE

FORMAT = 1


def step_directory(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The inverse of `step_directory`."""
    return int(checkpoint.name.removeprefix("step-"))


def partial_directory(checkpoint: Path) -> Path:
    """Where a checkpoint is written, or deleted, out of sight."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted(checkpoints.glob("step-????????"), reverse=True)


def latest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with each newer one."""
    damaged = []
    for path in list_checkpoints(checkpoints):
        try:
            verify(path)
        except InputError as error:
            damaged.append(str(error))
        else:
            return path, damaged
    return None, damaged


def describe(checkpoint: Path) -> dict[str, Any]:
    """The contents of a checkpoint's detour.json. InputError where it is no checkpoint of this format."""
    try:
        meta: dict[str, Any] = json.loads((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{checkpoint} is not a Detour checkpoint: it has no {CONFIG_FILE}") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{checkpoint / CONFIG_FILE} is damaged ({error}); use an older checkpoint") from None
    if meta.get("format") != FORMAT:
        raise InputError(f"{checkpoint} has checkpoint format {meta.get('format')}; this version reads {FORMAT}")
    return meta


def verify(checkpoint: Path) -> dict[str, Any]:
    """`describe`, after checking every file's size and sha256. InputError names the damaged file."""
    from engine.megatron.torch_index import verify_index

    meta = describe(checkpoint)
    for name, (size, digest) in meta["files"].items():
        path = checkpoint / name
        try:
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                there = "nothing" if found is None else f"{found} bytes"
                raise InputError(
                    f"{path} is damaged: {size} bytes were written, {there} found; use an older checkpoint"
                )
            if file_digest(path)[1] != digest:
                raise InputError(f"{path} is damaged: its sha256 is not the one written; use an older checkpoint")
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); use an older checkpoint") from None
    verify_index(checkpoint)
    return meta


def load(checkpoint: Path, model: Any, optimizer: Any | None) -> None:
    """Fill model and optimizer from a verified checkpoint, whatever layout wrote it; weights only without optimizer."""
    from megatron.core import dist_checkpointing

    from engine.megatron.torch_index import weights_only_loading

    wanted: dict[str, Any] = {"model": sharded_weights(model)}
    if optimizer is not None:
        wanted["optimizer"] = optimizer.sharded_state_dict(wanted["model"], is_loading=True, metadata=_sharding())
    with weights_only_loading():
        state = dist_checkpointing.load(wanted, str(checkpoint))
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    if unexpected or any(not key.endswith("_extra_state") for key in missing):
        raise InputError(f"{checkpoint} does not fit the model: missing {missing}, unexpected {unexpected}")
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


def prune(checkpoints: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete what interrupted saves left behind, and checkpoints beyond the newest `keep`.

    Those at a multiple of `keep_every` steps stay.
    """
    for path in beyond(list_checkpoints(checkpoints), keep, keep_every):
        doomed = partial_directory(path)
        path.rename(doomed)  # a half-deleted checkpoint must not look like one
        shutil.rmtree(doomed, ignore_errors=True)
    clear_partial(checkpoints)


def beyond(newest_first: Sequence[Path], keep: int, keep_every: int | None) -> list[Path]:
    """Checkpoints that need not be kept: not of the newest `keep`, nor at a multiple of `keep_every` steps."""
    return [path for path in newest_first[keep:] if not keep_every or step_of(path) % keep_every]


def clear_partial(checkpoints: Path) -> None:
    """Delete what interrupted saves left behind."""
    for path in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(checkpoint: Path) -> None:
    """Take a damaged checkpoint out of sight, so that it counts as none and its step can be saved again."""
    aside = checkpoint.with_name(f".{checkpoint.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def sharded_weights(model: Any) -> dict[str, Any]:
    """The model's parameters by place in the whole model; every rank its part."""
    sharded = model.sharded_state_dict(metadata=_sharding())
    return {name: entry for name, entry in sharded.items() if not name.endswith("_extra_state")}


def _sharding() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def file_digest(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
