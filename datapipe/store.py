"""Places of shards: a local directory, or the remote directory of `RemoteStore`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import Data
from datapipe.manifest import NAME, Manifest, Shard, read_manifest
from datapipe.paths import local_path
from datapipe.remote_store import SCHEMES, RemoteStore
from datapipe.shards import REMEDY, read_index
from datapipe.tar_members import DamagedError


class Store(Protocol):
    """A directory of shards."""

    name: str
    """The directory as the user named it."""

    def manifest(self) -> Manifest | None:
        """Read the manifest; None if there is no manifest.json.

        Raises:
            InputError: It is wrong.
        """
        ...

    def read(self, name: str) -> bytes | None:
        """Read a small file beside the manifest; None if it is not there.

        Raises:
            InputError: It cannot be read.
        """
        ...

    def tars(self) -> list[str]:
        """Names of the tars, in order.

        Raises:
            InputError: They cannot be listed.
        """
        ...

    def open(self, shard: Shard) -> IO[bytes]:
        """Open a shard, unbuffered.

        Raises:
            DamagedError: The shard is not there.
            InputError: The machine cannot read it.
        """
        ...

    def index(self, shard: Shard) -> NDArray[np.int64] | None:
        """Spans of the documents, if they are known without reading the shard."""
        ...

    def prefetch(self, shard: Shard) -> None:
        """Start fetching a shard that will be needed soon."""
        ...

    def close(self) -> None:
        """Cancel what is under way."""
        ...


def open_store(reference: str, data: Data, cancelled: threading.Event) -> tuple[Store, str]:
    """The store that `source.shards` names, and the glob that its shards must match.

    Args:
        reference: Directory or URL; its last part may be a glob of tars.
        data: Settings of the cache.
        cancelled: When set, a wait for a remote store ends with StoreClosedError.

    Raises:
        InputError: There is no such store.
    """
    directory, slash, last = reference.rstrip("/").rpartition("/")
    pattern = last if last.endswith(".tar") else "*"
    directory = directory + slash if last.endswith(".tar") else reference
    scheme = reference.partition("://")[0] if "://" in reference else ""
    if scheme in SCHEMES:
        return RemoteStore(directory.rstrip("/"), data, cancelled), pattern
    if scheme not in ("", "package"):
        raise InputError(
            f"{reference}: Detour reads shards from local directories and {', '.join(SCHEMES)} URLs",
            code="unknown-scheme",
        )
    return LocalStore(local_path(directory or ".")), pattern


class LocalStore:
    """Shards in a directory of this machine."""

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        self._directory = directory
        if not directory.is_dir():
            raise InputError(
                f"no directory {directory}; make it with `detour prepare`, or give the source `text`",
                code="no-such-directory",
            )

    def manifest(self) -> Manifest | None:
        """Read manifest.json, if there is one."""
        return read_manifest(self._directory) if (self._directory / NAME).is_file() else None

    def read(self, name: str) -> bytes | None:
        """Read a file of the directory."""
        path = self._directory / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}", code="not-readable") from None

    def tars(self) -> list[str]:
        """List the directory."""
        return sorted(path.name for path in self._directory.glob("*.tar"))

    def open(self, shard: Shard) -> IO[bytes]:
        """Open the file."""
        path = self._directory / shard.name
        try:
            return path.open("rb", buffering=0)
        except FileNotFoundError:
            raise DamagedError(f"shard {path} is missing; {REMEDY}", code="shard-missing") from None
        except OSError as error:  # a fault of the machine, not of the shard, so that no document is skipped for it
            raise InputError(f"shard {path} cannot be read: {error.strerror}", code="not-readable") from None

    def index(self, shard: Shard) -> NDArray[np.int64] | None:
        """Read the .idx beside the shard, if there is one."""
        return read_index((self._directory / shard.name).with_suffix(".idx"), shard)

    def prefetch(self, shard: Shard) -> None:
        """Do nothing, because the file is here."""

    def close(self) -> None:
        """Do nothing, because nothing is under way."""
