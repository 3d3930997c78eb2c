"""A copy of the newest checkpoints in a remote store, for machines whose disks go with them."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path

import fsspec

from configs.errors import InputError
from configs.files import partial_path
from configs.load import changes_of_run, validate
from configs.schema import RunConfig
from engine.checkpoint import CONFIG_FILE, beyond, partial_directory, set_aside, verify
from monitoring.events import CheckpointFailed, record
from monitoring.run_directory import RunDirectory

logger = logging.getLogger(__name__)


class Mirror:
    """A run's checkpoints under an fsspec URL (s3://, gs://, a shared path), by the run's name. Used by rank 0 alone.

    Credentials come from the environment, as the store's own tools read them. A checkpoint counts as there when its
    detour.json is, which is uploaded last. A store that fails never fails the training: that is an event.
    """

    def __init__(self, url: str, config: RunConfig, directory: Path) -> None:
        try:
            self._store, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"checkpoint.mirror: {url} cannot be used: {error}") from None
        self._root = f"{root.rstrip('/')}/{config.name}"
        self._config, self._directory = config, directory
        self._lock = threading.Lock()
        self._next: Path | None = None
        self._thread: threading.Thread | None = None

    def upload(self, checkpoint: Path) -> None:
        """Have a checkpoint copied behind the training; after the one under way, in the place of one that waits."""
        with self._lock:
            self._next = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._upload_all, name="detour-mirror", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Wait for what is under way, not so long that the worker seems to hang."""
        if thread := self._thread:
            patience = self._config.cluster.hang_timeout / 2
            thread.join(patience)
            if thread.is_alive():
                self._failed(
                    f"the last checkpoint was not copied within {patience:.0f} s (half of cluster.hang_timeout)"
                )

    def fetch(self, checkpoints: Path, newer_than: Path | None) -> Path | None:
        """Bring the newest whole checkpoint after a local one into the local folder, with the log up to it.

        Raises InputError where the store holds another run, or, without a local checkpoint, does not answer.
        """
        try:
            names = self._names()
            for name in names[:1]:
                self._require_same_run(name)
        except InputError:
            raise
        except Exception as error:  # each store raises its own
            if newer_than is None:
                raise InputError(f"checkpoint.mirror: {self._root} does not answer: {error}") from None
            self._failed(f"it does not answer ({error}), so the run goes on from the checkpoints here")
            return None
        for name in names:
            if newer_than and name <= newer_than.name:
                return None
            target = checkpoints / name
            hidden = partial_directory(target)
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
            if target.exists():  # or the newest whole one here would not be older
                set_aside(target)
            hidden.rename(target)
            return target
        return None

    def _names(self) -> list[str]:
        """Complete checkpoints, newest first."""
        self._store.invalidate_cache()
        found = self._store.glob(f"{self._root}/step-*/{CONFIG_FILE}")
        return sorted((str(path).split("/")[-2] for path in found), reverse=True)

    def _require_same_run(self, name: str) -> None:
        meta = json.loads(self._store.cat_file(f"{self._root}/{name}/{CONFIG_FILE}"))
        changed = changes_of_run(validate(RunConfig, meta["config"], f"{self._root}/{name}"), self._config)
        if changed:
            raise InputError(
                f"checkpoint.mirror: {self._root} holds a different run\n  "
                + "\n  ".join(changed)
                + "\nchoose another name or mirror for a new run, or restore these keys to continue that one"
            )

    def _fetch_log(self) -> None:
        """Lines of metrics.jsonl that this disk never had; those after the checkpoint are cut off as ever."""
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
                if checkpoint.exists():  # else it was pruned here meanwhile, and a newer one waits
                    self._failed(f"{checkpoint.name} was not copied: {error}")

    def _upload(self, checkpoint: Path) -> None:
        target = f"{self._root}/{checkpoint.name}"
        self._store.makedirs(target, exist_ok=True)
        if self._store.exists(f"{target}/{CONFIG_FILE}"):  # of a copy that counts as whole, and is about to change
            self._store.rm_file(f"{target}/{CONFIG_FILE}")
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            self._store.put_file(str(path), f"{target}/{path.name}")
        run = RunDirectory(self._directory)
        for path in (run.config, run.events, run.metrics):
            if path.exists():
                self._store.put_file(str(path), f"{self._root}/{path.name}")

    def _prune(self) -> None:
        settings = self._config.checkpoint
        for old in beyond([Path(name) for name in self._names()], settings.keep, settings.keep_every):
            self._store.rm_file(f"{self._root}/{old}/{CONFIG_FILE}")  # first, so that half of one counts as none
            self._store.rm(f"{self._root}/{old}", recursive=True)

    def _failed(self, reason: str) -> None:
        logger.warning("mirror: %s", reason)
        record(self._directory, CheckpointFailed(reason=f"mirror: {reason}"))
