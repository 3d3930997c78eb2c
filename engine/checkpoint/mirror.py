"""Copies the newest checkpoints to a remote store, for machines that lose their disks when they go."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import fsspec

from configs.errors import InputError
from configs.files import partial_path
from configs.load import changes_of_run, validate
from configs.schema import RunConfig
from engine.checkpoint.format import expired, set_aside, verify
from engine.checkpoint_meta import CheckpointMeta
from engine.modernbert.config import CONFIG_FILE
from monitoring.events import CheckpointFailed, record
from monitoring.run_directory import RunDirectory

logger = logging.getLogger(__name__)


class Mirror:
    """The checkpoints of a run under an fsspec URL (s3://, gs://, a shared path). Used by rank 0 alone.

    Credentials come from the environment, as the store's own tools read them. A checkpoint is complete once its
    detour.json is in the store, which is uploaded last. A store that fails is an event and never fails the training.

    Args:
        url: Folder of the store; the run's name is the folder in it.
        config: The run's configuration.
        directory: The run directory.

    Raises:
        InputError: No fsspec file system takes the URL.
    """

    def __init__(self, url: str, config: RunConfig, directory: Path) -> None:
        try:
            self._store, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"checkpoint.mirror: {url} cannot be used: {error}", key="checkpoint.mirror") from None
        self._root = f"{root.rstrip('/')}/{config.name}"
        self._config, self._directory = config, directory
        self._lock = threading.Lock()
        self._next: Path | None = None
        self._thread: threading.Thread | None = None

    def upload(self, checkpoint: Path) -> None:
        """Copy a checkpoint behind the training, after the current one; it replaces one that still waits."""
        with self._lock:
            self._next = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._upload_all, name="detour-mirror", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Wait for the current copy, but less than the time after which a worker counts as hung."""
        if thread := self._thread:
            patience = self._config.cluster.hang_timeout / 2
            thread.join(patience)
            if thread.is_alive():
                self._failed(
                    f"the last checkpoint was not copied within {patience:.0f} s (half of cluster.hang_timeout)"
                )

    def fetch(self, checkpoints: Path, newer_than: Path | None) -> Path | None:
        """Download the newest complete checkpoint into the local folder, with the log up to it.

        Args:
            checkpoints: The local folder of checkpoints.
            newer_than: The newest valid local checkpoint. Only a newer one is downloaded.

        Returns:
            The local path of the downloaded checkpoint; None where the local one stays the newest.

        Raises:
            InputError: The store holds another run, or it does not answer and there is no local checkpoint.
        """
        try:
            names = self._names()
            for name in names[:1]:
                self._require_same_run(name)
        except InputError:
            raise
        except Exception as error:  # each store raises its own
            if newer_than is None:
                raise InputError(
                    f"checkpoint.mirror: {self._root} does not answer: {error}", key="checkpoint.mirror"
                ) from None
            self._failed(f"it does not answer ({error}), so the run resumes from the local checkpoints")
            return None
        for name in names:
            if newer_than and name <= newer_than.name:
                return None
            target = checkpoints / name
            hidden = partial_path(target)
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
            try:
                self._store.get(f"{self._root}/{name}/", f"{hidden}/", recursive=True)
                verify(hidden)
                self._fetch_log()
            except Exception as error:
                logger.warning("mirrored checkpoint %s is skipped: %s", name, error)
                shutil.rmtree(hidden, ignore_errors=True)
                continue
            if target.exists():  # it is damaged, because the newest valid local checkpoint is older
                set_aside(target)
            hidden.rename(target)
            return target
        return None

    def _names(self) -> list[str]:
        """Names of the complete checkpoints, newest first."""
        self._store.invalidate_cache()
        paths = self._store.glob(f"{self._root}/step-*/{CONFIG_FILE}")
        return sorted((str(path).split("/")[-2] for path in paths), reverse=True)

    def _require_same_run(self, name: str) -> None:
        meta = CheckpointMeta.model_validate_json(self._store.cat_file(f"{self._root}/{name}/{CONFIG_FILE}"))
        stored = validate(RunConfig, meta.config, f"{self._root}/{name}")
        changed = changes_of_run(stored, self._config)
        if changed:
            raise InputError(
                f"checkpoint.mirror: {self._root} holds a different run\n  "
                + "\n  ".join(changed)
                + "\nchoose another name or mirror for a new run, or restore these keys to continue that one",
                key="checkpoint.mirror",
            )

    def _fetch_log(self) -> None:
        """Take over the store's metrics.jsonl where it is longer. The resume cuts off lines after the checkpoint."""
        log = RunDirectory(self._directory).metrics
        copy = partial_path(log)
        if self._store.exists(f"{self._root}/{log.name}"):
            self._store.get_file(f"{self._root}/{log.name}", str(copy))
            if not log.exists() or copy.stat().st_size > log.stat().st_size:
                copy.replace(log)
            copy.unlink(missing_ok=True)

    def _upload_all(self) -> None:
        while True:
            with self._lock:
                checkpoint, self._next = self._next, None
                if checkpoint is None:
                    self._thread = None
                    return
            try:
                self._upload(checkpoint)
                self._prune()
            except Exception as error:
                if checkpoint.exists():  # else retention has deleted it, and a newer one waits
                    self._failed(f"{checkpoint.name} was not copied: {error}")

    def _upload(self, checkpoint: Path) -> None:
        target = f"{self._root}/{checkpoint.name}"
        self._store.makedirs(target, exist_ok=True)
        if self._store.exists(f"{target}/{CONFIG_FILE}"):  # because the copy is about to change
            self._store.rm_file(f"{target}/{CONFIG_FILE}")
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            self._store.put_file(str(path), f"{target}/{path.name}")
        run = RunDirectory(self._directory)
        for path in (run.config, run.events, run.metrics):
            if path.exists():
                self._store.put_file(str(path), f"{self._root}/{path.name}")

    def _prune(self) -> None:
        for old in expired([Path(name) for name in self._names()], self._config):
            self._store.rm_file(f"{self._root}/{old}/{CONFIG_FILE}")  # first, so that a half-deleted copy is incomplete
            self._store.rm(f"{self._root}/{old}", recursive=True)

    def _failed(self, reason: str) -> None:
        logger.warning("mirror: %s", reason)
        record(self._directory, CheckpointFailed(reason=f"mirror: {reason}"))
