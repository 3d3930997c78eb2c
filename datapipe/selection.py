"""The choice of documents, and their division into shards."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import Reading
from datapipe.disk import disk_errors_as_input_errors
from datapipe.input_file import InputFile
from datapipe.notes import Notes
from datapipe.records import Filtered, Text
from datapipe.text import read_records

HELD_OUT = "held-out"
"""Folder inside the output for documents kept from training."""
FAULTS_NAMED = 10
"""Faults that one message names."""
LOOKED_AT = 20
"""Records of each file that are read before any is tokenized."""
LOOK_AHEAD = 64 * 2**20
"""Bytes of input after a fault in which further faults are looked for, to name them at once."""


@dataclass(frozen=True)
class Selection:
    """Rules for the documents to keep."""

    dedup: bool = False
    """Leave out a document if the same bytes of text appeared before."""
    min_tokens: int = 1
    max_tokens: int | None = None
    """Upper bound of tokens; documents outside the bounds are left out."""
    held_out: float = 0.0
    """Share of the documents that goes to `held-out/`, chosen by a hash of their group, or else of their text."""
    near_dedup: float | None = None
    """Similarity, from 0 to 1, from which a document is left out for an earlier one."""


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

    @property
    def digest(self) -> str:
        """Identity of the documents."""
        hashed = hashlib.blake2b(digest_size=16)
        for source, text in self.texts:
            head = f"{source}\0{text.id}\0{text.group}\0{len(text.text)}\0".encode("utf-8", "surrogatepass")
            hashed.update(head)
            hashed.update(text.text)
            if text.identifiers:
                hashed.update(repr([(one.start, one.end) for one in text.identifiers]).encode())
        return hashed.hexdigest()


class Intake:
    """The outcome of the records that were read: counts per source, and the faults that were left out.

    Args:
        on_error: `stop` ends the reading at a fault, `skip` leaves it out.
    """

    def __init__(self, on_error: str = "stop") -> None:
        self.skips = on_error == "skip"
        self.left_out: dict[str, Counter[str]] = {}
        """Per source the records left out, by reason."""
        self.faults: dict[str, tuple[int, str]] = {}
        """Per file the number of its faults, and the first of them."""
        self._collected: list[InputError] = []

    def leave_out(self, source: str, reason: str) -> None:
        """Count a record that is left out."""
        self.left_out.setdefault(source, Counter())[reason] += 1

    def fault(self, file: InputFile, error: InputError) -> None:
        """Count a fault, or collect it, as far as FAULTS_NAMED, if a fault ends the reading."""
        if self.skips:
            count, first = self.faults.get(file.name, (0, str(error)))
            self.faults[file.name] = count + 1, first
            self.leave_out(file.source, "faulty")
            return
        self._collected.append(error)
        if len(self._collected) == FAULTS_NAMED:
            self.require_sound()

    @property
    def stopping(self) -> bool:
        """Whether a fault has been met that ends the reading."""
        return bool(self._collected)

    def require_sound(self) -> None:
        """Raise InputError if faults have been collected; the message names them all."""
        if not self._collected:
            return
        first, *others = self._collected
        if not others:
            raise first
        lines = "\n".join(str(error) for error in self._collected)
        more = " or more" if len(self._collected) == FAULTS_NAMED else ""
        raise InputError(
            f"{len(self._collected)}{more} faults in the text\n{lines}\n"
            "mend them and run the same command again: it continues; --on-error skip leaves such records out",
            code=first.code,
        )


def is_held_out(text: Text, share: float) -> bool:
    """Whether a document is kept from training.

    It goes by group or content, so that the texts of a group or equal texts never fall on both sides.
    """
    content = text.text if text.group is None else text.group.encode("utf-8", "replace")
    size = 16 if text.group is None else 64
    return int.from_bytes(hashlib.blake2b(content, digest_size=size).digest()[:8], "little") < share * 2**64


def look_at(files: Sequence[InputFile], reading: Reading) -> None:
    """Read the beginning of every file, so that a fault there is told before any text is tokenized.

    Raises:
        InputError: Some files cannot be read; the message names as many as FAULTS_NAMED.
    """
    intake = Intake()
    for file in files:
        for record in islice(read_records(file, reading, Notes()), LOOKED_AT):
            if isinstance(record, InputError):
                intake.fault(file, record)
                break
    intake.require_sound()


def blocks(
    files: Sequence[InputFile],
    size: int,
    selection: Selection,
    reading: Reading,
    intake: Intake,
    notes: Notes,
    near_duplicates: NDArray[np.bool_] | None = None,
) -> Iterator[Block]:
    """Divide the documents of files into shards.

    Args:
        files: The files in order.
        size: Bytes of text per shard, about.
        selection: Documents to keep.
        reading: Columns, condition, encoding.
        intake: Receives what is left out.
        notes: Receives facts about the files.
        near_duplicates: `[documents]`, those to leave out for an earlier one.

    Raises:
        InputError: A record is wrong and `intake` does not skip; the message names further faults that follow it.
    """
    texts: dict[str, list[tuple[str, Text]]] = {"": [], f"{HELD_OUT}/": []}
    sizes = dict.fromkeys(texts, 0)
    numbers = dict.fromkeys(texts, 0)
    before = position = 0
    stopped_at = number = 0

    def block(folder: str) -> Block:
        result = Block(f"{folder}{numbers[folder]:06d}.tar", texts[folder], position)
        texts[folder], sizes[folder], numbers[folder] = [], 0, numbers[folder] + 1
        return result

    with DigestSet() as seen:
        for file in files:
            for record in read_records(file, reading, notes):
                if isinstance(record, InputError):
                    intake.fault(file, record)
                    stopped_at = stopped_at or position
                    continue
                position = before + record.position
                if intake.stopping:
                    if position > stopped_at + LOOK_AHEAD:
                        break
                    continue
                if isinstance(record, Filtered):
                    intake.leave_out(file.source, "filtered")
                    continue
                number += 1
                digest = hashlib.blake2b(record.text, digest_size=16).digest()
                if selection.dedup and record.text and not seen.add(digest):
                    intake.leave_out(file.source, "duplicates")
                    continue
                if near_duplicates is not None and number > len(near_duplicates):
                    raise _changed(file.name)
                if near_duplicates is not None and near_duplicates[number - 1]:
                    intake.leave_out(file.source, "near-duplicates")
                    continue
                if selection.held_out and reading.group and record.group is None:
                    notes.add(f"no {reading.group}: chosen for training or held out alone", file.name, "documents")
                held_out = selection.held_out > 0 and is_held_out(record, selection.held_out)
                folder = f"{HELD_OUT}/" if held_out else ""
                texts[folder].append((file.source, record))
                sizes[folder] += len(record.text)
                if sizes[folder] >= size:
                    yield block(folder)
            if not intake.stopping and not _is_whole(file):
                raise _changed(file.name)
            position = before = before + file.size
            if intake.stopping and position > stopped_at + LOOK_AHEAD:
                break
    intake.require_sound()
    for folder, rest in list(texts.items()):
        if rest:
            yield block(folder)


def _is_whole(file: InputFile) -> bool:
    """Whether a local file has the size that it had when it was found."""
    try:
        return file.path is None or file.path.stat().st_size == file.size
    except OSError:
        return False


def _changed(name: str) -> InputError:
    return InputError(
        f"{name} was changed while it was read; run the same command again when it is whole: it continues",
        code="text-changed",
    )


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
