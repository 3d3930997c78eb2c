"""One file of text: its format by its name, and how it is opened."""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import unquote

from datapipe.decoding import COMPRESSED, Forward

FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".zip": "zip",
    ".tar": "tar",
    ".tgz": "tar",
}
"""Formats by suffix. Any text format may be compressed: .gz, .bz2, .xz, .zst."""
ARCHIVES = ("zip", "tar")
"""Formats of files that hold files."""
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
"""Name of the folder of records without a value."""
_SMALL = 2**20
"""Bytes of a file that is fetched at once."""
_PARTITION = re.compile(r"([A-Za-z_]\w*)=(.*)")
_URL = re.compile(r"(\b[a-z][a-z0-9]*://)(?:[^/\s'\"@]*@)?([^\s?'\"]*)(\?[^\s'\")]*)?")


@dataclass(frozen=True)
class InputFile:
    """A file of text."""

    source: str
    """Name of the file or folder that was named, for the counts."""
    name: str
    """Path or URL, for messages; it can be printed anywhere."""
    format: str
    """A value of FORMATS."""
    size: int
    """Bytes."""
    path: Path | None = None
    """Local path."""
    system: Any = field(default=None, compare=False, repr=False)
    """fsspec's file system of a URL."""
    url: str = ""
    version: str = field(default="", compare=False, repr=False)
    """All that the store tells of the file behind a URL; it changes with the content."""
    spool: Any = field(default=None, compare=False, repr=False)
    """Temporary file with the content of a pipe."""

    def open(self) -> IO[bytes]:
        """Open it for reading at its start."""
        if self.spool is not None:
            return Path(self.spool.name).open("rb", buffering=0)
        if self.path is not None:
            return self.path.open("rb", buffering=0)
        if not self.url.startswith(("http:", "https:")) or self._takes_ranges():
            return self.system.open(self.url, "rb")
        import aiohttp

        forever = aiohttp.ClientTimeout(total=None, sock_read=300)  # it is read for as long as its text is tokenized
        # A size, whatever it is, keeps fsspec from another request for it, which takes no such timeout.
        stream = self.system.open(self.url, "rb", block_size=0, size=1, timeout=forever)
        return cast("IO[bytes]", io.BufferedReader(Forward(stream)))

    def _takes_ranges(self) -> bool:
        """Whether the web server sends parts of the file; one that does not must be read from start to end."""
        if 0 < self.size < _SMALL:
            return True
        with self.system.open(self.url, "rb", block_size=1, cache_type="none") as file:
            if file.size is None:
                return False
            try:
                file.seek(file.size - 1)
                file.read(1)
            except ValueError:
                return False
            return True

    @property
    def partition(self) -> dict[str, str | None]:
        """Columns that Hive names by folders: `year=2020/part-0.parquet` has the column `year`, of text."""
        parts = (_PARTITION.fullmatch(part) for part in PurePosixPath(str(self.path or self.url)).parts[:-1])
        return {part[1]: None if part[2] == HIVE_NULL else unquote(part[2]) for part in parts if part}

    def annotations(self) -> bytes | None:
        """The content of the brat .ann file beside a .txt file; None if there is none.

        Raises:
            OSError: It cannot be read.
        """
        if self.spool is not None or "?" in self.url:  # a signed URL is of one file
            return None
        if self.path is not None:
            beside = self.path.with_name(annotations_of(self.path.name))
            return beside.read_bytes() if beside.is_file() else None
        folder, _, name = self.url.rpartition("/")
        url = f"{folder}/{annotations_of(name)}"
        return self.system.cat_file(url) if self.system.exists(url) else None


def printable(path: str | Path) -> str:
    """A file name as text; bytes that are no UTF-8 are written in hexadecimal."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def without_secrets(text: str) -> str:
    """A text with its URLs cut to what may stand in a log: no password, and no query, which may be a signature."""
    return _URL.sub(lambda url: f"{url[1]}{url[2]}{'?...' if url[3] else ''}", text)


def format_of(name: str) -> str | None:
    """The format that the suffix of a file name tells, whatever its case."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def annotations_of(name: str) -> str:
    """Name of the brat file beside a text file: `a.ann` beside `a.txt` and `a.txt.gz`."""
    path = PurePosixPath(name)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).with_suffix(".ann").name


def formats() -> str:
    """The formats that are read, for messages."""
    return f"{', '.join(FORMATS)}, each also with {', '.join(COMPRESSED)}"
