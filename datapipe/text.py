"""Reading documents from text files of any supported format, in order and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from configs.errors import InputError
from configs.schema import Reading
from datapipe.archives import read_tar, read_zip
from datapipe.decoding import DAMAGE
from datapipe.input_file import InputFile, format_of, printable, without_secrets
from datapipe.notes import Notes
from datapipe.plain_text import read_lines
from datapipe.records import Content, Record, Text
from datapipe.tables import read_table


def read_texts(file: InputFile | Path, reading: Reading | None = None) -> Iterator[Text]:
    """Yield the documents of one file in order.

    Raises:
        InputError: The file is unreadable or wrong; the message names file and line. A reading that skips faults
            leaves them out.
    """
    if isinstance(file, Path):
        file = InputFile(file.name, printable(file), format_of(file.name) or "txt", 0, file)
    reading = reading or Reading()
    for record in read_records(file, reading, Notes()):
        if isinstance(record, InputError) and reading.on_error == "stop":
            raise record
        if isinstance(record, Text):
            yield record


def read_records(file: InputFile, reading: Reading, notes: Notes) -> Iterator[Record]:
    """Yield what becomes of each record of a file, in order.

    Args:
        file: The file.
        reading: Columns, condition, encoding.
        notes: Receives encodings that were detected, control characters, and members that are not read.
    """
    try:
        with file.open() as raw:
            content = Content(file.name, raw.tell, reading, notes, file.annotations, file.partition)
            records = _read(content, file.format, raw)
            first = next(records, None)
            if first is None:
                notes.add("no record in it", file.name)
            else:
                yield first
            yield from records
    except DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        yield InputError(f"{file.name} cannot be read: {without_secrets(reason)}", code="not-readable")
    except Exception as error:
        if file.system is None:
            raise
        # every store's client has its own family of errors
        reason = without_secrets(f"{type(error).__name__}: {error}")
        yield InputError(f"{file.name} cannot be read: {reason}", code="not-readable")


def _read(content: Content, kind: str, raw: IO[bytes]) -> Iterator[Record]:
    if kind in ("parquet", "arrow"):
        return read_table(content, kind, raw)
    if kind == "zip":
        return read_zip(content, _read, raw)
    if kind == "tar":
        return read_tar(content, _read, raw)
    return read_lines(content, kind, raw)
