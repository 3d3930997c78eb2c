"""Shards behind a URL, fetched by fsspec into a bounded local cache.

WebDataset's own openers are not used, because they build a shell command from the URL (`aws s3 cp`, `gsutil cat`,
`curl`) and read `pipe:` URLs. Here no URL reaches a shell.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError, RunFailedError
from configs.files import exclusive_lock, partial_path
from configs.schema import Data
from datapipe.disk import disk_errors_as_input_errors
from datapipe.manifest import NAME, Manifest, Shard, parse_manifest
from datapipe.shards import REMEDY
from datapipe.tar_members import DamagedError

CHUNK = 8 * 2**20
"""Bytes per request to a remote store: the most that a dropped connection costs."""
STALL = 30
"""Seconds without a byte after which a request is repeated."""
PAUSE = 0.25
"""Seconds before the first repetition of a request; the pause doubles each time."""
LONGEST_PAUSE = 30
LOCK_PAUSE = 0.1
"""Seconds between two attempts to take a lock of the cache."""
SCHEMES = ("s3", "gs", "https", "http")
"""URLs that are read."""
DENIED = (401, 403)
BEYOND_THE_END = 416
_log = logging.getLogger(__name__)


class StoreClosedError(Exception):
    """The store was closed while a thread waited for it; the thread ends, and nobody is told."""


class RemoteStore:
    """Shards behind a URL, fetched whole and checked against the manifest's sha256.

    A shard is fetched in pieces, and a failed piece is requested again. The processes of a machine share the cache. A
    cached file is named by its content, so it never passes for another shard. It may be removed while it is open,
    because its reader keeps the bytes.

    Args:
        url: The directory.
        data: Patience, cache and its bound.
        cancelled: When set, every wait ends with StoreClosedError; `close` sets it.
    """

    def __init__(self, url: str, data: Data, cancelled: threading.Event) -> None:
        self.name = url
        self._patience = data.patience
        self._limit = int(data.cache_gb * 1e9)
        self._cache = Path(data.cache).expanduser()
        self._system, self._root = _file_system(url, min(STALL, data.patience))
        self._prefetching = ThreadPoolExecutor(2, "detour-read-ahead")
        self._cancelled = cancelled
        self._damaged: dict[str, DamagedError] = {}
        """Faults of fetched shards by name, because fetching them again would give the same."""

    def manifest(self) -> Manifest | None:
        """Fetch manifest.json, if there is one."""
        content = self.read(NAME)
        return None if content is None else parse_manifest(content, f"{self.name}/{NAME}")

    def read(self, name: str) -> bytes | None:
        """Fetch a small file, if there is one."""
        try:
            content: bytes = self._patiently(lambda: self._system.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None
        return content

    def tars(self) -> list[str]:
        """Raise InputError, because a remote directory needs a manifest."""
        raise InputError(
            f"{self.name} has no {NAME}; make the shards with `detour prepare`, or copy it there as well",
            code="manifest-missing",
        )

    def open(self, shard: Shard) -> IO[bytes]:
        """Open the cached shard, and fetch it first if need be."""
        path = self._cache / f"{shard.sha256[:20]}-{shard.name}"
        with disk_errors_as_input_errors(
            self._cache,
            key="data.cache",
            if_full="free some space there, or lower data.cache_gb",
            remedy="set data.cache to a directory of yours",
        ):
            self._cache.mkdir(parents=True, exist_ok=True)
            with self._locked(path.with_suffix(".lock")) as lock:  # one download for all processes of this machine
                while True:
                    try:
                        file = path.open("rb", buffering=0)
                    except FileNotFoundError:  # not fetched yet, or just evicted by another process
                        self._fetch(shard, path, lock)
                        continue
                    fcntl.flock(file, fcntl.LOCK_SH)  # marks it as in use for as long as it is open
                    os.utime(file.fileno())
                    return file

    def index(self, shard: Shard) -> NDArray[np.int64] | None:
        """None, because walking through the headers costs nothing beside fetching the shard."""
        return None

    def prefetch(self, shard: Shard) -> None:
        """Fetch a shard in another thread. A fault is reported when the shard is opened."""
        self._prefetching.submit(lambda: self.open(shard).close())

    def close(self) -> None:
        """Cancel every wait and every fetch."""
        self._cancelled.set()
        self._prefetching.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, shard: Shard, path: Path, lock: BinaryIO) -> None:
        """Download the shard whose lock is held. Raises DamagedError, at once if it did so before."""
        if shard.name in self._damaged:
            raise self._damaged[shard.name].copy()
        lock.truncate(0)
        self._make_room(shard.bytes, lock)
        try:
            self.download(shard, path)
        except DamagedError as error:
            self._damaged[shard.name] = error.copy()
            raise

    def download(self, shard: Shard, path: Path) -> None:
        """Fetch a shard to `path`, which appears only when its sha256 is right.

        Raises:
            DamagedError: The shard is missing, or not the manifest's.
            InputError: Access is denied.
            RunFailedError: The store does not answer.
        """
        url = f"{self._root}/{shard.name}"
        partial = partial_path(path)
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
            raise DamagedError(
                f"shard {url} is truncated or was changed: its sha256 is not its manifest's; {REMEDY}",
                code="shard-changed",
            )
        partial.replace(path)

    def _piece(self, url: str, start: int, end: int) -> bytes:
        try:
            content: bytes = self._system.cat_file(url, start=start, end=end)
        except FileNotFoundError:
            raise DamagedError(f"shard {url} is missing; {REMEDY}", code="shard-missing") from None
        except Exception as error:
            if _status(error) == BEYOND_THE_END:
                return b""
            raise
        # A server without range requests answers with the whole file.
        return content[start:end] if len(content) > end - start else content

    def _patiently(self, request: Callable[[], bytes]) -> bytes:
        """Repeat a request with growing pauses until it is answered, for `patience` seconds at most.

        Raises:
            RunFailedError: The time is over.
            InputError: Waiting cannot help.
        """
        began, pause = time.monotonic(), PAUSE
        while True:
            try:
                return request()
            except (FileNotFoundError, DamagedError):
                raise
            except Exception as error:  # every store's client has its own family of errors
                reason = f"{type(error).__name__}: {error}"
                if _denied(error):
                    raise InputError(
                        f"{self.name}: access denied ({reason}); check the credentials", code="access-denied"
                    ) from None
                if time.monotonic() - began + pause > self._patience:
                    raise RunFailedError(
                        f"{self.name}: no answer for {self._patience} s ({reason}); check the network and the store, "
                        "or raise data.patience; the run continues from its last checkpoint"
                    ) from None
                if pause == PAUSE:
                    _log.warning("%s: %s; repeating the request for up to %s s", self.name, reason, self._patience)
                self._pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _pause(self, seconds: float) -> None:
        if self._cancelled.wait(seconds):
            raise StoreClosedError(self.name)

    @contextmanager
    def _locked(self, path: Path) -> Iterator[BinaryIO]:
        """Hold an exclusive lock; unlike a blocking `flock`, the wait for it can be cancelled."""
        with ExitStack() as stack:
            while True:
                try:
                    lock = stack.enter_context(exclusive_lock(path, wait=False))
                    break
                except BlockingIOError:
                    self._pause(LOCK_PAUSE)
            yield lock

    def _make_room(self, needed: int, lock: BinaryIO) -> None:
        """Delete the shards used longest ago until `needed` bytes fit, and reserve the bytes in `lock`."""
        if needed > self._limit:
            raise InputError(
                f"data.cache_gb: a shard of {needed / 1e9:.2f} GB is larger than the whole cache; raise it",
                key="data.cache_gb",
                code="cache-too-small",
            )
        while True:
            with exclusive_lock(self._cache / "room"):
                if self._evict(needed):
                    lock.write(str(needed).encode())
                    lock.flush()
                    return
            self._pause(LOCK_PAUSE)  # downloads under way fill the cache, and can be deleted when they are done

    def _evict(self, needed: int) -> bool:
        # Reservations are read first: a download that ends meanwhile counts twice then, and not zero times.
        reserved = sum(map(_reserved, self._cache.glob("*.lock")))
        cached = [(path, path.stat()) for path in self._cache.glob("*.tar")]
        # Open shards go last, because their bytes stay on the disk until they are closed.
        shards = sorted((_in_use(path), stat.st_mtime, stat.st_size, path) for path, stat in cached)
        excess = sum(size for _, _, size, _ in shards) + reserved + needed - self._limit
        for _, _, size, path in shards:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
        return excess <= 0


def _reserved(path: Path) -> int:
    """Bytes that a download under way will take: those noted in its lock, if the lock is held."""
    try:
        with exclusive_lock(path, wait=False):
            return 0
    except BlockingIOError:
        return int(path.read_bytes() or 0)


def _in_use(path: Path) -> bool:
    """Whether a process of this machine has a cached shard open."""
    with path.open("rb") as file:  # not `exclusive_lock`, which would create a shard that is gone
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _status(error: Exception) -> int | None:
    """HTTP status behind an error: a number in aiohttp and gcsfs, in the answer's headers in botocore."""
    for exception in (error, error.__cause__):
        answer = getattr(exception, "response", None)
        if isinstance(answer, dict):
            return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", None) or getattr(error, "code", None)


def _denied(error: Exception) -> bool:
    """Whether the store refuses this user, or there are no credentials."""
    return isinstance(error, PermissionError) or _status(error) in DENIED or "Credentials" in type(error).__name__


def _file_system(url: str, stall: int) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    scheme = url.partition("://")[0]
    try:
        if scheme == "s3":
            # `_patiently` repeats requests, so that patience means the same for every store.
            config = {"connect_timeout": stall, "read_timeout": stall, "retries": {"max_attempts": 1}}
            options = {"config_kwargs": config}
        elif scheme in ("http", "https"):
            import aiohttp

            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=stall, sock_read=stall)}}
        system, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise InputError(f"{url}: {error}; pip install 'detour-train[remote]'", code="not-installed") from None
    return system, root
