"""Saves, restores, mirrors and expires the checkpoints of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import ModernBertConfig

from configs.errors import InputError, RunFailedError
from configs.schema import RunConfig
from configs.versions import software
from engine.checkpoint.format import (
    clear_partial,
    describe,
    list_checkpoints,
    load,
    prune,
    set_aside,
    step_directory,
    step_of,
    verify,
)
from engine.checkpoint.mirror import Mirror
from engine.checkpoint.writer import SaveFailedError, Writer
from engine.checkpoint_meta import CheckpointMeta
from engine.guards import Guards
from engine.megatron.fp8_state import load_fp8_state
from engine.train_state import TrainState
from monitoring.events import CheckpointDamaged, CheckpointFailed, record
from monitoring.recorder import Recorder
from monitoring.run_directory import RunDirectory

SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class CheckpointManager:
    """The one owner of a run's checkpoints; all ranks call its methods together.

    Args:
        config: The run's configuration.
        directory: The run directory.
        architecture: The model's configuration.
        model: This rank's bare model.
        optimizer: The distributed optimizer.
        clock: Seconds that only grow; decides when an interval in minutes is over.

    Attributes:
        recorder: Told of each saved checkpoint; on global rank 0 only, and set after `restore`.
        writer: Writes the tensors behind the training.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        architecture: ModernBertConfig,
        model: Any,
        optimizer: Any,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.recorder: Recorder | None = None
        self.clock = clock
        self.folder = RunDirectory(directory).checkpoints
        settings = config.checkpoint
        self.writer = Writer(on_published=partial(prune, self.folder, config))
        self._mirror: Mirror | None = None
        if settings.mirror is not None and dist.get_rank() == 0:
            self._mirror = Mirror(settings.mirror, config, directory)
        self._config, self._directory, self._architecture = config, directory, architecture
        self._model, self._optimizer = model, optimizer

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing the last checkpoint."""
        return self.writer.writing

    def is_due(self, state: TrainState) -> bool:
        """Return whether `checkpoint.every` asks for a checkpoint now, by this rank's clock."""
        span = self._config.span_at(state.step)
        return span.is_due(self._config.checkpoint.every, state.step, self.clock() - state.saved_at)

    def save(self, state: TrainState, guards: Guards, *, wait: bool, last: bool) -> None:
        """Start saving the current step behind the training.

        Args:
            state: Progress of the run; its `saved_at` is set.
            guards: Their running statistics are saved as well.
            wait: Return once the checkpoint is complete.
            last: No training follows, so the run fails without this checkpoint.

        Raises:
            RunFailedError: The last checkpoint could not be written.
        """
        self.wait()
        started = time.perf_counter()
        state.saved_at = self.clock()
        meta = self._meta(state, guards, self.recorder) if self.recorder else None
        path = step_directory(self.folder, state.step)
        self.writer.begin(path, self._model, self._optimizer, meta, state.data, started)
        if wait or last:
            self._finish(self.writer.wait, last)

    def poll(self, all_idle: bool) -> None:
        """Complete the save in progress, if no rank is writing any more.

        Args:
            all_idle: Whether `writing` is false on every rank; the same value on every rank.
        """
        if self.writer.pending and all_idle:
            self._finish(self.writer.complete)

    def wait(self) -> None:
        """Complete the save in progress, however long it takes."""
        if self.writer.pending:
            self._finish(self.writer.wait)

    def restore(self) -> CheckpointMeta | None:
        """Fill model and optimizer from the newest valid checkpoint, local or mirrored.

        Returns:
            The checkpoint's record; None where the run has no checkpoint, and nothing was filled.

        Raises:
            InputError: All checkpoints are damaged, or the newest does not fit the model.
        """
        checkpoint = self._newest()
        if checkpoint is None:
            return None
        meta = describe(checkpoint)
        require_same_shape(checkpoint, meta, self._architecture)
        load(checkpoint, self._model, self._optimizer if meta.optimizer else None)
        if not meta.optimizer:
            self._optimizer.reload_model_params()
        if self._model.config.fp8:
            load_fp8_state(checkpoint, self._model)
        return meta

    def close(self) -> None:
        """Wait for the mirror, within its time limit."""
        if self._mirror:
            self._mirror.close()

    def _meta(self, state: TrainState, guards: Guards, recorder: Recorder) -> CheckpointMeta:
        """The record of a checkpoint; the writer adds the files, and the data positions of all ranks."""
        now, initially = self._model.architecture.to_dict(), self._architecture.to_dict()
        return CheckpointMeta(
            **{**state.state_dict(), "data": {}},
            architecture=now,
            initial_architecture=None if now == initially else initially,
            config=self._config.model_dump(mode="json", exclude_none=True),
            recorder=recorder.state(),
            guards=guards.state(),
            optimizer=True,
            files={},
            software=software(),
        )

    def _finish(self, complete: Callable[[], tuple[Path, float]], last: bool = False) -> None:
        """Report a save that has ended. Without the last checkpoint the run fails; without another it continues."""
        try:
            path, seconds = complete()
        except SaveFailedError as error:
            if self.recorder:
                record(self._directory, CheckpointFailed(reason=str(error)))
            if last:
                raise RunFailedError(
                    f"{error}. Free space and run again: the run resumes from the checkpoint before"
                ) from None
            return
        if self.recorder:
            self.recorder.checkpoint_saved(step_of(path), seconds, path, self.writer.stall)
        if self._mirror:
            self._mirror.upload(path)

    def _newest(self) -> Path | None:
        """Choose the checkpoint to resume from; damaged ones that are newer are set aside."""
        choice: list[Any] = [None, []]
        if dist.get_rank() == 0:
            clear_partial(self.folder)
        valid, complaints = self._latest_valid()
        if dist.get_rank() == 0:
            damaged = list_checkpoints(self.folder)[: len(complaints)]
            newest = (self._mirror.fetch(self.folder, newer_than=valid) if self._mirror else None) or valid
            for path, complaint in zip(damaged, complaints, strict=True):
                record(self._directory, CheckpointDamaged(reason=complaint))
                if newest and newest != path:  # else retention would delete the next checkpoints before this one
                    set_aside(path)
            if complaints and newest is None:
                complaints = [*complaints, "no older checkpoint is left"]
            choice = [newest, complaints]
        dist.broadcast_object_list(choice)
        newest, complaints = choice
        if newest is None and complaints:
            raise InputError(
                "; ".join(complaints) + f"; remove {self.folder} to start over", code="no-valid-checkpoint"
            )
        return newest

    def _latest_valid(self) -> tuple[Path | None, list[str]]:
        """Do what `latest_valid` does, with every rank hashing a part of the files."""
        listed = [list_checkpoints(self.folder)]
        dist.broadcast_object_list(listed)
        complaints: list[str] = []
        for path in listed[0]:
            try:
                verify(path, dist.get_rank(), dist.get_world_size())
                complaint = None
            except InputError as error:
                complaint = str(error)
            gathered: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, complaint)
            found = [one for one in gathered if one]
            if not found:
                return path, complaints
            complaints.append(found[0])
        return None, complaints


def require_same_shape(checkpoint: Path, meta: CheckpointMeta, architecture: ModernBertConfig) -> None:
    """Raise InputError where a checkpoint holds a model of another size."""
    stored = meta.architecture
    differing = [
        f"{key} {stored[key]} -> {getattr(architecture, key)}"
        for key in SHAPE_KEYS
        if stored[key] != getattr(architecture, key)
    ]
    if differing:
        raise InputError(
            f"{checkpoint} holds a model of another size ({', '.join(differing)}); "
            "use another output directory or restore the model section",
            key="model",
            code="checkpoint-does-not-fit",
        )
