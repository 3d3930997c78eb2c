"""The lines of metrics.jsonl, sent on to a tracking tool. The file stays the source of truth."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from configs.errors import InputError
from configs.schema import RunConfig

Line = dict[str, Any]


class Writer(Protocol):
    """Takes every logged step, in order."""

    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


class TensorBoardWriter:
    """Event files in `tensorboard/` of the run directory. A resumed run hides the steps it repeats."""

    def __init__(self, config: RunConfig, directory: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            str(directory / "tensorboard"), purge_step=step + 1 if step else None, filename_suffix=f".from-{step}"
        )

    def write(self, line: Line) -> None:
        for tag, value in _scalars(line).items():
            self._writer.add_scalar(tag, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """One Weights & Biases run a run directory, in the project `detour`. It ignores the steps that a resume repeats.

    Account, server and offline mode are wandb's own settings (`wandb login`, WANDB_BASE_URL, WANDB_MODE).
    """

    def __init__(self, config: RunConfig, directory: Path, step: int) -> None:
        import wandb

        self._run = wandb.init(
            project="detour",
            name=config.name,
            id=hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16],
            resume="allow",
            dir=directory,
            config=config.model_dump(mode="json", exclude_none=True),
        )

    def write(self, line: Line) -> None:
        self._run.log(_scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


_WRITERS: dict[str, Callable[[RunConfig, Path, int], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
}


class Writers:
    """Those of `monitoring.writers`, for a run resumed at `step`. Training is worth more: one that fails is dropped.

    Raises InputError where a package is missing.
    """

    def __init__(self, config: RunConfig, directory: Path, step: int) -> None:
        self._writers: dict[str, Writer] = {}
        for name in config.monitoring.writers:
            try:
                self._writers[name] = _WRITERS[name](config, directory, step)
            except ModuleNotFoundError as error:
                raise InputError(
                    f"monitoring.writers: {name} needs the package {error.name}; pip install 'detour-train[{name}]'"
                ) from None
            except Exception as error:
                _warn(name, error)

    def write(self, line: Line) -> None:
        self._each(lambda writer: writer.write(line))

    def close(self) -> None:
        self._each(lambda writer: writer.close())

    def _each(self, act: Callable[[Writer], None]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                act(writer)
            except Exception as error:
                del self._writers[name]
                _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    logging.getLogger(__name__).warning(
        "monitoring.writers: %s gets no more of this run until it is resumed: %s: %s", name, type(error).__name__, error
    )


def _scalars(line: Line) -> dict[str, float]:
    """Tags by objective for the loss, so that the switch starts a new curve."""
    values = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
    if "loss" in values:
        values[f"loss/{line['objective']}"] = values.pop("loss")
    held_out = {
        f"{key}/{objective}": value
        for key in ("eval_loss", "eval_accuracy")
        for objective, value in line.get(key, {}).items()
        if math.isfinite(value)
    }
    return values | held_out
