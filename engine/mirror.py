"""A copy of the newest checkpoints in a remote store, for machines whose disks go with them."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import fsspec

from configs.errors import InputError
from engine.checkpoint import CONFIG_FILE, verify

logger = logging.getLogger(__name__)


class Mirror:
    """Checkpoints under an fsspec URL (s3://, gs://, a shared path). Used by rank 0 alone.

    Credentials come from the environment, as the store's own tools read them. A checkpoint counts as there when its
    detour.json is, which is uploaded last.
    """

    def __init__(self, url: str, keep: int) -> None:
        try:
            self._store, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"checkpoint.mirror: {url} cannot be used: {error}") from None
        self._root, self._keep = root.rstrip("/"), keep
        self._thread: threading.Thread | None = None
        self.error: str | None = None
        """Why the last upload failed; None where it did not."""

    def names(self) -> list[str]:
        """Complete checkpoints, newest first. InputError where the store does not answer."""
        try:
            self._store.invalidate_cache()
            found = self._store.glob(f"{self._root}/step-*/{CONFIG_FILE}")
        except Exception as error:  # each store raises its own
            raise InputError(f"checkpoint.mirror: {self._root} does not answer: {error}") from None
        return sorted((str(path).split("/")[-2] for path in found), reverse=True)

    def upload(self, checkpoint: Path) -> None:
        """Start copying a checkpoint; one at a time, so this waits for the copy before."""
        self.wait()
        self._thread = threading.Thread(target=self._upload, args=(checkpoint,), name="detour-mirror")
        self._thread.start()

    def wait(self) -> None:
        """Until the upload under way has ended."""
        if self._thread:
            self._thread.join()

    def fetch(self, checkpoints: Path, newer_than: str) -> Path | None:
        """Bring the newest whole checkpoint after `newer_than` (a name, or "") into a local folder."""
        for name in self.names():
            if name <= newer_than:
                return None
            hidden = checkpoints / f".{name}.partial"
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
            try:
                self._store.get(f"{self._root}/{name}/", f"{hidden}/", recursive=True)
                verify(hidden)
            except (OSError, InputError) as error:
                logger.warning("mirrored checkpoint %s is skipped: %s", name, error)
                shutil.rmtree(hidden, ignore_errors=True)
                continue
            hidden.rename(checkpoints / name)
            return checkpoints / name
        return None

    def _upload(self, checkpoint: Path) -> None:
        target = f"{self._root}/{checkpoint.name}"
        try:
            files = sorted(checkpoint.iterdir(), key=lambda path: path.name == CONFIG_FILE)
            self._store.makedirs(target, exist_ok=True)
            for path in files:
                self._store.put_file(str(path), f"{target}/{path.name}")
            for old in self.names()[self._keep :]:
                self._store.rm_file(f"{self._root}/{old}/{CONFIG_FILE}")  # first, so that half of one counts as none
                self._store.rm(f"{self._root}/{old}", recursive=True)
            self.error = None
        except Exception as error:  # a store that fails must not fail the training
            logger.warning("checkpoint %s was not mirrored: %s", checkpoint.name, error)
            self.error = str(error)
