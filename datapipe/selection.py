"""The choice of documents, and their division into shards."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configs.errors import InputError
from datapipe.disk import disk_errors_as_input_errors
from datapipe.text import Text, read_texts

HELD_OUT = "held-out"
"""Folder inside the output for documents kept from training."""


@dataclass(frozen=True)
class Selection:
    """Rules for the documents to keep."""

    dedup: bool = False
    """Leave out a document if the same bytes of text appeared before."""
    min_tokens: int = 1
    max_tokens: int | None = None
    """Upper bound of tokens; documents outside the bounds are left out."""
    held_out: float = 0.0
    """Share of the documents that goes to `held-out/`, chosen by a hash of their text."""


KEEP_ALL = Selection()
"""Keeps every document that has a token."""


class Block(NamedTuple):
    """The documents of one shard."""

    name: str
    """Path of the shard, relative to the output."""
    texts: list[tuple[str, Text]]
    """(name of the source, text) per document."""
    position: int
    """Bytes of input read until the block's end."""


def blocks(files: list[tuple[str, Path]], size: int, selection: Selection, duplicates: Counter[str]) -> Iterator[Block]:
    """Divide the documents of files into shards.

    Args:
        files: (name of the source, file) in order.
        size: Bytes of text per shard, about.
        selection: Documents to keep.
        duplicates: Receives the number of duplicates left out, per source.
    """
    texts: dict[str, list[tuple[str, Text]]] = {"": [], f"{HELD_OUT}/": []}
    sizes = dict.fromkeys(texts, 0)
    numbers = dict.fromkeys(texts, 0)
    before = position = 0

    def block(folder: str) -> Block:
        result = Block(f"{folder}{numbers[folder]:06d}.tar", texts[folder], position)
        texts[folder], sizes[folder], numbers[folder] = [], 0, numbers[folder] + 1
        return result

    with DigestSet() as seen:
        for source, file in files:
            for text in read_texts(file):
                position = before + text.position
                digest = hashlib.blake2b(text.text, digest_size=16).digest()
                if selection.dedup and not seen.add(digest):
                    duplicates[source] += 1
                    continue
                # By content, so that equal texts never fall on both sides.
                held_out = int.from_bytes(digest[:8], "little") < selection.held_out * 2**64
                folder = f"{HELD_OUT}/" if held_out else ""
                texts[folder].append((source, text))
                sizes[folder] += len(text.text)
                if sizes[folder] >= size:
                    yield block(folder)
            position = before = before + file.stat().st_size
    for folder, rest in list(texts.items()):
        if rest:
            yield block(folder)


class DigestSet:
    """A set of digests in a temporary file, because a corpus may have more of them than fit into memory.

    Args:
        max_pages: Most pages of 4 KB that the file may have; None for no limit but the disk's.
    """

    def __init__(self, max_pages: int | None = None) -> None:
        self._max_pages = max_pages

    def __enter__(self) -> DigestSet:
        with disk_errors_as_input_errors(Path(tempfile.gettempdir())):
            self._file = tempfile.NamedTemporaryFile(prefix="detour-dedup-")
        self._table = sqlite3.connect(self._file.name, isolation_level=None)
        self._table.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-131072;"
            "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN"
        )
        if self._max_pages is not None:
            self._table.execute(f"PRAGMA max_page_count={self._max_pages}")
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._file.close()

    def add(self, digest: bytes) -> bool:
        """Add a digest and return whether it is new.

        Raises:
            InputError: The disk of the file is full.
        """
        try:
            return self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1
        except sqlite3.Error as error:
            raise InputError(
                f"{self._file.name} cannot be written: {error}; free some space there, or set TMPDIR to another "
                "directory, and run the same command again: it continues",
                code="disk-full",
            ) from None
