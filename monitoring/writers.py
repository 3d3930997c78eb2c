"""Tracking tools that get the lines of metrics.jsonl too. The file stays the source of truth."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from configs.errors import InputError
from configs.schema import RunConfig
from monitoring.run_directory import RunDirectory

Line = dict[str, Any]


class Writer(Protocol):
    """A tracking tool."""

    def write(self, line: Line) -> None:
        """Take one logged step; steps come in order."""

    def close(self) -> None:
        """Send what is still held."""


class TensorBoardWriter:
    """Writes event files in `tensorboard/` of the run directory. TensorBoard hides the steps that a resume repeats."""

    def __init__(self, config: RunConfig, directory: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            str(RunDirectory(directory).tensorboard),
            purge_step=step + 1 if step else None,
            filename_suffix=f".from-{step}",
        )

    def write(self, line: Line) -> None:
        """Take one logged step."""
        for tag, value in _scalars(line).items():
            self._writer.add_scalar(tag, value, line["step"])

    def close(self) -> None:
        """Write what is still held."""
        self._writer.close()


class WandbWriter:
    """Logs to Weights & Biases: one of its runs per run directory, in the project `detour`.

    It ignores the steps that a resume repeats. Account, server and offline mode are wandb's own settings
    (`wandb login`, WANDB_BASE_URL, WANDB_MODE).
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
        """Take one logged step."""
        self._run.log(_scalars(line), step=line["step"])

    def close(self) -> None:
        """Send what is still held."""
        self._run.finish()


TOOLS: dict[str, Callable[[RunConfig, Path, int], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
}


class Writers:
    """The tools of `monitoring.writers`. A tool that fails is dropped, because training is worth more.

    Args:
        config: The resolved configuration.
        directory: The run directory.
        step: Completed steps of the resumed checkpoint; 0 for a new run.
        tools: Makes each tool, by its name in the configuration.

    Raises:
        InputError: The package of a tool is missing.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        step: int,
        tools: Mapping[str, Callable[[RunConfig, Path, int], Writer]] = TOOLS,
    ) -> None:
        self._writers: dict[str, Writer] = {}
        for name in config.monitoring.writers:
            try:
                self._writers[name] = tools[name](config, directory, step)
            except ModuleNotFoundError as error:
                raise InputError(
                    f"monitoring.writers: {name} needs the package {error.name}; pip install 'detour-train[{name}]'",
                    key="monitoring.writers",
                ) from None
            except Exception as error:
                _warn(name, error)

    def write(self, line: Line) -> None:
        """Give every tool one logged step."""
        self._each(lambda writer: writer.write(line))

    def close(self) -> None:
        """Close every tool."""
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
        "monitoring.writers: %s has failed and gets no lines until the run is resumed: %s: %s",
        name,
        type(error).__name__,
        error,
    )


def _scalars(line: Line) -> dict[str, float]:
    """Name each value. Loss names hold the objective, so that the switch starts a new curve."""
    values = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
    if "loss" in values:
        values[f"loss/{line['objective']}"] = values.pop("loss")
    names = {"losses": "loss", **{key: key for key in ("eval_loss", "eval_accuracy", "eval_bits_per_byte")}}
    by_objective = {
        f"{name}/{objective}": value
        for key, name in names.items()
        for objective, value in line.get(key, {}).items()
        if math.isfinite(value)
    }
    return values | by_objective
