"""Where shards lie: a local directory, or a remote one behind a bounded local cache."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError, RunFailedError
from configs.schema import Data
from datapipe.manifest import NAME, Manifest, Shard, parse_manifest, read_manifest
from datapipe.samples import local_path
from datapipe.shards import DamagedError, read_index

CHUNK = 8 * 2**20
"""Bytes asked of a remote store at once: what a dropped connection costs."""
STALL = 30
"""Seconds without a byte after which a request is given up and made again."""
PAUSE = 0.25
"""Seconds before a request is made again for the first time; they double."""
SCHEMES = ("s3", "gs", "https", "http")
REMEDY = "copy it again, or run `detour prepare` into a new directory"
DENIED = (401, 403)
BEYOND_THE_END = 416
_log = logging.getLogger(__name__)


class Store(Protocol):
    """A directory of shards."""

    name: str
    """As the user named it."""

    def manifest(self) -> Manifest | None:
        """None where there is no manifest.json. Raises InputError."""
        ...

    def tars(self) -> list[str]:
        """Names of the tars there, in order. Raises InputError where they cannot be listed."""
        ...

    def open(self, shard: Shard) -> IO[bytes]:
        """The shard's bytes, unbuffered. Raises DamagedError where they are not there, InputError."""
        ...

    def index(self, shard: Shard) -> NDArray[np.int64] | None:
        """Where its documents lie, if that is known without reading the shard."""
        ...

    def ahead(self, shard: Shard) -> None:
        """The shard will be needed soon."""
        ...

    def close(self) -> None:
        """Give up what is under way."""
        ...


def open_store(reference: str, data: Data, closed: threading.Event) -> tuple[Store, str]:
    """The store that `source.shards` names, and the glob its shards must match. Raises InputError.

    closed: When set, whoever waits for a remote store gives up.
    """
    directory, slash, last = reference.rstrip("/").rpartition("/")
    pattern = last if last.endswith(".tar") else "*"
    directory = directory + slash if last.endswith(".tar") else reference
    scheme = reference.partition("://")[0] if "://" in reference else ""
    if scheme in SCHEMES:
        return RemoteStore(directory.rstrip("/"), data, closed), pattern
    if scheme not in ("", "package"):
        raise InputError(f"{reference}: Detour reads shards from local directories and {', '.join(SCHEMES)} URLs")
    return LocalStore(local_path(directory or ".")), pattern


class LocalStore:
    """Shards in a directory of this machine."""

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        self._directory = directory
        if not directory.is_dir():
            raise InputError(f"no directory {directory}; make it with `detour prepare`, or give the source `text`")

    def manifest(self) -> Manifest | None:
        return read_manifest(self._directory) if (self._directory / NAME).is_file() else None

    def tars(self) -> list[str]:
        return sorted(path.name for path in self._directory.glob("*.tar"))

    def open(self, shard: Shard) -> IO[bytes]:
        path = self._directory / shard.name
        try:
            return path.open("rb", buffering=0)
        except FileNotFoundError:
            raise DamagedError(f"shard {path} is missing; {REMEDY}") from None
        except OSError as error:  # the machine's fault, not the shard's, so nothing is skipped for it
            raise InputError(f"shard {path} cannot be read: {error.strerror}") from None

    def index(self, shard: Shard) -> NDArray[np.int64] | None:
        return read_index((self._directory / shard.name).with_suffix(".idx"), shard)

    def ahead(self, shard: Shard) -> None:
        pass

    def close(self) -> None:
        pass


class RemoteStore:
    """Shards behind a URL, fetched whole, in pieces that are retried, and checked against the manifest's sha256.

    The cache is shared by the processes of a machine. A file there is named by its content, so a cached shard never
    passes for another; removing one that is open elsewhere is safe, since its reader keeps the bytes.
    """

    def __init__(self, url: str, data: Data, closed: threading.Event) -> None:
        self.name = url
        self._patience = data.patience
        self._limit = int(data.cache_gb * 1e9)
        self._cache = Path(data.cache).expanduser()
        self._system, self._root = _file_system(url, min(STALL, data.patience))
        self._ahead = ThreadPoolExecutor(2, "detour-read-ahead")
        self._closed = closed
        self._damaged: dict[str, str] = {}
        """Shards that were fetched and are not the manifest's, by name: fetching them again would cost as much."""

    def manifest(self) -> Manifest | None:
        try:
            content = self._patiently(lambda: self._system.cat_file(f"{self._root}/{NAME}"))
        except FileNotFoundError:
            return None
        return parse_manifest(content, f"{self.name}/{NAME}")

    def tars(self) -> list[str]:
        raise InputError(f"{self.name} has no {NAME}; make the shards with `detour prepare`, or copy it there as well")

    def open(self, shard: Shard) -> IO[bytes]:
        path = self._cache / f"{shard.sha256[:20]}-{shard.name}"
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".lock").open("a") as lock:
                while not _taken(lock):  # one download for all the processes of this machine
                    self._pause(0.1)
                while True:
                    try:
                        file = path.open("rb", buffering=0)
                    except FileNotFoundError:  # or evicted by another process since it was there
                        self._fetch(shard, path, lock)
                        continue
                    fcntl.flock(file, fcntl.LOCK_SH)  # in use, for as long as it is open
                    os.utime(file.fileno())
                    return file
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = (
                "free some space there, or lower data.cache_gb" if full else "set data.cache to a directory of yours"
            )
            raise InputError(f"data.cache: {self._cache} cannot be written: {error.strerror}; {remedy}") from None

    def index(self, shard: Shard) -> NDArray[np.int64] | None:
        return None  # against fetching the shard, the walk through its headers is nothing

    def ahead(self, shard: Shard) -> None:
        # Whatever goes wrong here goes wrong again, or is remembered, and is reported when the shard is needed.
        self._ahead.submit(lambda: self.open(shard).close())

    def close(self) -> None:
        self._closed.set()
        self._ahead.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, shard: Shard, path: Path, lock: IO[str]) -> None:
        """Download the shard whose lock is held. Raises DamagedError, at once if it did so before."""
        if shard.name in self._damaged:
            raise DamagedError(self._damaged[shard.name])
        lock.truncate(0)
        self._make_room(shard.bytes, lock)
        try:
            self._download(shard, path)
        except DamagedError as error:
            self._damaged[shard.name] = str(error)
            raise

    def _download(self, shard: Shard, path: Path) -> None:
        url = f"{self._root}/{shard.name}"
        partial = path.with_suffix(".partial")
        digest = hashlib.sha256()
        try:
            with partial.open("wb") as file:
                while (start := file.tell()) < shard.bytes:
                    end = min(start + CHUNK, shard.bytes)
                    content = self._patiently(lambda s=start, e=end: self._piece(url, s, e))  # type: ignore[misc]
                    file.write(content)
                    digest.update(content)
                    if len(content) < end - start:
                        break
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if digest.hexdigest() != shard.sha256:
            partial.unlink()
            raise DamagedError(f"shard {url} is truncated or was changed: its sha256 is not its manifest's; {REMEDY}")
        partial.replace(path)

    def _piece(self, url: str, start: int, end: int) -> bytes:
        try:
            content: bytes = self._system.cat_file(url, start=start, end=end)
        except FileNotFoundError:
            raise DamagedError(f"shard {url} is missing; {REMEDY}") from None
        except Exception as error:
            if _status(error) == BEYOND_THE_END:
                return b""
            raise
        # A server that knows no ranges answers with the whole file.
        return content[start:end] if len(content) > end - start else content

    def _patiently(self, request: Callable[[], bytes]) -> bytes:
        """The answer to a request, made again with growing pauses until `patience` seconds have passed.

        Raises RunFailedError then, InputError where waiting cannot help.
        """
        began, pause = time.monotonic(), PAUSE
        while True:
            try:
                return request()
            except (FileNotFoundError, DamagedError):
                raise
            except Exception as error:  # every store's client has its own family of errors
                what = f"{type(error).__name__}: {error}"
                if _denied(error):
                    raise InputError(f"{self.name}: access denied ({what}); check the credentials") from None
                if time.monotonic() - began + pause > self._patience:
                    raise RunFailedError(
                        f"{self.name}: no answer for {self._patience} s ({what}); check the network and the store, or "
                        "raise data.patience; the run continues from its last checkpoint"
                    ) from None
                if pause == PAUSE:
                    _log.warning("%s: %s; asked again for up to %s s", self.name, what, self._patience)
                self._pause(pause)
                pause = min(2 * pause, 30)

    def _pause(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise InputError(f"{self.name}: closed")

    def _make_room(self, needed: int, lock: IO[str]) -> None:
        """Delete the shards used longest ago until `needed` bytes fit, and note in `lock` that they are taken."""
        if needed > self._limit:
            raise InputError(
                f"data.cache_gb: a shard of {needed / 1e9:.2f} GB is larger than the whole cache; raise it"
            )
        with (self._cache / "room").open("w") as room:
            while True:
                fcntl.flock(room, fcntl.LOCK_EX)
                if self._evict(needed):
                    lock.write(str(needed))
                    lock.flush()
                    return
                fcntl.flock(room, fcntl.LOCK_UN)  # downloads under way fill the cache, and will be there to delete
                self._pause(0.1)

    def _evict(self, needed: int) -> bool:
        # First, since a download that ends meanwhile must count twice rather than not at all.
        reserved = sum(map(_reserved, self._cache.glob("*.lock")))
        found = [(path, path.stat()) for path in self._cache.glob("*.tar")]
        # One that is read now would go on taking up room, so it goes last.
        shards = sorted((_in_use(path), stat.st_mtime, stat.st_size, path) for path, stat in found)
        excess = sum(size for _, _, size, _ in shards) + reserved + needed - self._limit
        for _, _, size, path in shards:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
        return excess <= 0


def _reserved(path: Path) -> int:
    """Bytes that a download under way will take: those noted in its lock, if the lock is held."""
    with path.open() as lock:
        return 0 if _taken(lock) else int(lock.read() or 0)


def _in_use(path: Path) -> bool:
    """Whether a cached shard is open somewhere on this machine."""
    with path.open("rb") as file:
        return not _taken(file)


def _taken(file: IO[Any]) -> bool:
    """Lock a file until it is closed; False where another holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error: aiohttp and gcsfs have it as a number, botocore in the answer's headers."""
    for known in (error, error.__cause__):
        answer = getattr(known, "response", None)
        if isinstance(answer, dict):
            return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", None) or getattr(error, "code", None)


def _denied(error: Exception) -> bool:
    """Whether no patience helps: the store knows who asks and refuses, or there are no credentials to ask with."""
    return isinstance(error, PermissionError) or _status(error) in DENIED or "Credentials" in type(error).__name__


def _file_system(url: str, stall: int) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    scheme = url.partition("://")[0]
    try:
        if scheme == "s3":
            # The retries are ours, so that patience means the same for every store.
            config = {"connect_timeout": stall, "read_timeout": stall, "retries": {"max_attempts": 1}}
            options = {"config_kwargs": config}
        elif scheme in ("http", "https"):
            import aiohttp

            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=stall, sock_read=stall)}}
        system, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise InputError(f"{url}: {error}; pip install 'detour-train[remote]'") from None
    return system, root
