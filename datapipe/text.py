"""Reading documents from text files of any supported format, in order."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from configs.errors import InputError
from datapipe.paths import local_path

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet", ".arrow")
"""Formats. Parquet and Arrow files need a column `text`, JSON lines a key `text`; `id` is optional. A .txt file is one
document. The .arrow files are those of `datasets.save_to_disk`."""


class Text(NamedTuple):
    """A document of a text file."""

    id: str
    text: bytes
    """UTF-8"""
    position: int
    """Bytes of its file read so far; compressed bytes if the file is compressed."""


def find_files(reference: str) -> list[Path]:
    """The text files that a reference names, in order.

    Args:
        reference: A file, a directory or a `package://` sample.

    Raises:
        InputError: There is no such file, or no text file in the directory.
    """
    path = local_path(reference)
    if path.is_dir():
        files = list(_files_in(path))
        if not files:
            raise InputError(
                f"{path}: no text files in this directory; Detour reads {', '.join(SUFFIXES)}", code="no-text-files"
            )
        return files
    if not path.is_file():
        raise InputError(f"{path}: no such file or directory", code="no-such-file")
    if not path.name.endswith(SUFFIXES):
        raise InputError(
            f"{path}: not a text format that Detour reads; it reads {', '.join(SUFFIXES)}", code="unknown-format"
        )
    return [path]


def _files_in(directory: Path) -> Iterator[Path]:
    """Yield the text files in a directory, except hidden ones.

    Of a Hugging Face dataset only the files that it names are read, because files beside them are caches.
    """
    splits = _json_list(directory / "dataset_dict.json", "splits")
    if len(splits) > 1:
        raise InputError(
            f"{directory} is a dataset of the splits {', '.join(splits)}; name those to read, such as "
            f"{directory / splits[0]}",
            code="dataset-splits",
        )
    named = [directory / file["filename"] for file in _json_list(directory / "state.json", "_data_files")]
    for entry in named or sorted(directory.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _files_in(entry)
        elif entry.is_file() and entry.name.endswith(SUFFIXES):
            yield entry
        elif named:
            raise InputError(
                f"{entry} is missing, and {directory / 'state.json'} names it; copy the dataset again",
                code="dataset-incomplete",
            )


def _json_list(path: Path, key: str) -> list[Any]:
    """A list in a JSON file; empty if there is no such file or key."""
    try:
        return list(json.loads(path.read_bytes())[key])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read_texts(path: Path) -> Iterator[Text]:
    """Yield the documents of one file in order, in bounded memory.

    Raises:
        InputError: The file is unreadable or wrong; the message names file and line.
    """
    try:
        with path.open("rb") as file:
            if path.suffix in (".parquet", ".arrow"):
                yield from _table_rows(path, file)
            elif path.suffix == ".txt":
                yield _text_file(path, file)
            else:
                yield from _json_lines(path, file)
    except (OSError, EOFError) as error:  # gzip reports damage as both
        raise InputError(f"{path} cannot be read: {error}", code="not-readable") from None


def _text_file(path: Path, file: IO[bytes]) -> Text:
    content = file.read()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, byte {error.start}: not UTF-8; convert it, for instance with `iconv -f latin1 -t utf-8`",
            code="not-utf8",
        ) from None
    return Text(path.stem, content, file.tell())


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[Text]:
    lines: IO[bytes] = file
    errors: tuple[type[Exception], ...] = ()
    if path.suffix == ".gz":
        import zlib

        lines, errors = gzip.GzipFile(fileobj=file), (zlib.error,)  # type: ignore[assignment]
    elif path.suffix == ".zst":
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        lines, errors = io.BufferedReader(reader), (zstandard.ZstdError,)
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                yield _json_line(line, path, number, file.tell())
    except errors as error:
        raise InputError(f"{path} is damaged after line {number}: {error}", code="not-readable") from None


def _json_line(line: bytes, path: Path, number: int, position: int) -> Text:
    try:
        record = json.loads(line)
        text = record["text"]
        identity = str(record.get("id", number))
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not valid JSON ({error})", code="not-json") from None
    except (KeyError, TypeError, AttributeError):
        raise InputError(f'{path}, line {number}: expected an object with a key "text"', code="text-missing") from None
    if not isinstance(text, str):
        raise InputError(
            f'{path}, line {number}: "text" is {type(text).__name__}, not a string', code="text-not-a-string"
        )
    return Text(identity, text.encode("utf-8", "replace"), position)


def _table_rows(path: Path, file: IO[bytes]) -> Iterator[Text]:
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".arrow":
            reader = pyarrow.ipc.open_stream(file)
            schema, batches = reader.schema, iter(reader)
        else:
            parquet = pyarrow.parquet.ParquetFile(file)
            schema = parquet.schema_arrow
            columns = [name for name in ("id", "text") if name in schema.names]
            batches = parquet.iter_batches(batch_size=256, columns=columns)
        if "text" not in schema.names:
            raise InputError(f"{path}: no column `text`; it has {', '.join(schema.names)}", code="text-missing")
        number = 0
        for batch in batches:
            ids = batch.column("id") if "id" in schema.names else None
            for row, text in enumerate(batch.column("text")):
                number += 1
                try:
                    value = text.as_py()
                except UnicodeDecodeError:
                    raise InputError(
                        f"{path}, row {number}: `text` is not UTF-8; write the file again", code="not-utf8"
                    ) from None
                if value is None:
                    continue
                if not isinstance(value, str):
                    raise InputError(
                        f"{path}, row {number}: `text` is {type(value).__name__}, not a string",
                        code="text-not-a-string",
                    )
                identity = str(number) if ids is None else str(ids[row].as_py())
                yield Text(identity, value.encode("utf-8", "replace"), file.tell())
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{path} is no readable {path.suffix[1:]} file: {str(error).splitlines()[0]}", code="not-readable"
        ) from None
