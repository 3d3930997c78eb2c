"""Which documents are kept, and in which shard."""

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
from datapipe.disk import writing
from datapipe.text import Text, read_texts

HELD_OUT = "held-out"
"""Directory, inside the output, of the documents kept from training."""


@dataclass(frozen=True)
class Selection:
    """Which documents are kept, and where."""

    dedup: bool = False
    """Leave out every document whose text appeared before, to the byte."""
    min_tokens: int = 1
    max_tokens: int | None = None
    """Documents outside these bounds are left out."""
    held_out: float = 0.0
    """Share of the documents, chosen by a hash of their text, that goes to `held-out/` instead."""


EVERYTHING = Selection()
"""But documents without any token."""


class Block(NamedTuple):
    """The documents of one shard."""

    name: str
    """Of the shard, relative to the output."""
    texts: list[tuple[str, Text]]
    """With the name of their source."""
    position: int
    """Bytes of input read until the block's end."""


def blocks(files: list[tuple[str, Path]], size: int, selection: Selection, duplicates: Counter[str]) -> Iterator[Block]:
    """Documents by shard, each of about `size` bytes of text. Counts the duplicates that it leaves out, by source."""
    texts: dict[str, list[tuple[str, Text]]] = {"": [], f"{HELD_OUT}/": []}
    held = dict.fromkeys(texts, 0)
    numbers = dict.fromkeys(texts, 0)
    before = position = 0

    def block(folder: str) -> Block:
        result = Block(f"{folder}{numbers[folder]:06d}.tar", texts[folder], position)
        texts[folder], held[folder], numbers[folder] = [], 0, numbers[folder] + 1
        return result

    with Seen() as seen:
        for source, file in files:
            for text in read_texts(file):
                position = before + text.position
                digest = hashlib.blake2b(text.text, digest_size=16).digest()
                if selection.dedup and seen.before(digest):
                    duplicates[source] += 1
                    continue
                # Chosen by content, so that equal texts never stand on both sides.
                away = int.from_bytes(digest[:8], "little") < selection.held_out * 2**64
                folder = f"{HELD_OUT}/" if away else ""
                texts[folder].append((source, text))
                held[folder] += len(text.text)
                if held[folder] >= size:
                    yield block(folder)
            position = before = before + file.stat().st_size
    for folder, rest in list(texts.items()):
        if rest:
            yield block(folder)


class Seen:
    """The texts met so far, by digest: on disk, since there may be more of them than fit into memory."""

    def __enter__(self) -> Seen:
        with writing(Path(tempfile.gettempdir())):
            self._file = tempfile.NamedTemporaryFile(prefix="detour-dedup-")
        self._table = sqlite3.connect(self._file.name, isolation_level=None)
        self._table.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-131072;"
            "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._file.close()

    def before(self, digest: bytes) -> bool:
        """Whether it was asked for already. Raises InputError where the disk of the table is full."""
        try:
            return self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 0
        except sqlite3.Error as error:
            raise InputError(
                f"{self._file.name} cannot be written: {error}; free some space there, or set TMPDIR to another "
                "directory, and run the same command again: it continues"
            ) from None
