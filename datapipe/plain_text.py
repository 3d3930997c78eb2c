"""Documents of text files: .txt, JSON and CSV, in any encoding."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from configs.errors import InputError
from datapipe.decoding import decompress, detect_encoding, likely_codec, require_codec
from datapipe.identifiers import NO_SPANS, Identifier, parse_brat
from datapipe.input_file import printable
from datapipe.records import Content, Record

MANY_LINES = 1000
"""Lines of a .txt file from which its reader is told that it is one document."""
LONGEST_CELL = 2**28
"""Characters of a cell of a CSV file; a longer one has a quote that is never closed."""
_ONE_OBJECT = 2**26
"""Characters of a JSON file that may be a single object over several lines."""
_DELIMITERS = ",;\t|"
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive or an Office document",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"%PDF-": "a PDF",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
}
"""Kinds of files that are no text, by their first bytes."""


def read_lines(content: Content, kind: str, raw: IO[bytes]) -> Iterator[Record]:
    """Yield the records of JSON, CSV or plain text, after decompression and by its encoding."""
    stream, head = decompress(raw, content.name)
    if other := next((name for magic, name in _NO_TEXT.items() if head.startswith(magic)), None):
        yield content.fault(f"it is {other}, whatever its name; rename or convert it", "not-text")
        return
    encoding = content.reading.encoding and require_codec(content.reading.encoding)
    if encoding is None:
        encoding = detect_encoding(head)
        if encoding is None or (encoding == "utf-8" and head.count(0) > len(head) / 4):
            yield content.fault("no text in any encoding that Detour knows; name it, such as --encoding cp1252")
            return
        if encoding not in ("utf-8", "utf-8-sig"):
            content.notes.add(f"encoding {encoding}, as detected (--encoding names another)", content.name)
    read = {"json": _json, "csv": _csv, "tsv": _csv, "txt": _txt}[kind]
    try:
        yield from read(content, stream, encoding, "\t" if kind == "tsv" else "")
    except UnicodeError as error:
        yield content.fault(f"not {encoding} ({error}); name its encoding, such as --encoding cp1252", "not-utf8")


def _characters(stream: IO[bytes], encoding: str, newline: str) -> io.TextIOWrapper:
    """Bytes that do not belong to the encoding become lone surrogates, so that they cost their record only."""
    return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline=newline)


def _not_in_encoding(content: Content, characters: str, encoding: str, place: str) -> InputError | None:
    """The fault of characters that were not in the encoding of the file."""
    try:
        characters.encode()
        return None
    except UnicodeEncodeError as error:
        label = "UTF-8" if encoding.startswith("utf-8") else encoding
        codec = likely_codec(characters.encode("utf-8", "surrogateescape"))
        remedy = f"it looks like {codec}: --encoding {codec}" if codec else "name its encoding by --encoding"
        return content.fault(f"byte {error.start} is not {label}; {remedy}", "not-utf8", place)


def _txt(content: Content, stream: IO[bytes], encoding: str, _: str) -> Iterator[Record]:
    annotations = content.annotations() if content.reading.spans != NO_SPANS else None
    if annotations is not None and content.reading.lines:
        yield content.fault("its .ann file counts from the start of the file; leave out --lines", "spans-invalid")
        return
    if content.reading.lines:
        for number, line in enumerate(_characters(stream, encoding, "\n"), 1):
            if line := line.strip("\r\n\ufeff"):
                place = f"line {number}"
                yield _not_in_encoding(content, line, encoding, place) or content.text(line, str(number), place)
        return
    text = _characters(stream, encoding, "").read()
    if text.count("\n") > MANY_LINES:
        content.notes.add(
            f"one document of more than {MANY_LINES:,} lines; --lines makes each line a document", content.name
        )
    stem = printable(PurePosixPath(content.name).stem)
    given: list[Identifier] = []
    if annotations is not None:
        content.notes.add("identifiers read from the .ann file beside it (--spans none leaves them out)", content.name)
        try:
            given = parse_brat(annotations.decode("utf-8-sig"), text)
        except ValueError as error:
            yield content.fault(str(error), "spans-invalid")
            return
    yield _not_in_encoding(content, text, encoding, "") or content.text(text, stem, "", given=given)


def _json(content: Content, stream: IO[bytes], encoding: str, _: str) -> Iterator[Record]:
    start = stream.peek(1)[:64].decode(encoding, "ignore")  # type: ignore[attr-defined]
    if start.lstrip("\ufeff \t\r\n").startswith("["):
        return _json_array(content, stream, encoding)
    return _json_lines(content, _characters(stream, encoding, "\n"), encoding)


def _json_lines(content: Content, stream: io.TextIOWrapper, encoding: str) -> Iterator[Record]:
    record = content.records("line")
    lines: Iterator[str] = stream
    for number in itertools.count(1):
        if not (line := next(lines, "")):
            return
        if not (line := line.strip("\ufeff \t\r\n")):
            continue
        place = f"line {number}"
        fault = None if line.isascii() else _not_in_encoding(content, line, encoding, place)
        try:
            yield fault or record(json.loads(line), number)
        except RecursionError:
            yield content.fault("nested too deeply", "not-json", place)
        except ValueError as error:
            if number == 1 and not line.endswith("}"):
                rest = stream.read(_ONE_OBJECT) + stream.readline()
                try:
                    yield record(json.loads(f"{line}\n{rest}"), 1)
                    return
                except (ValueError, RecursionError):
                    lines = itertools.chain(io.StringIO(rest, newline="\n"), stream)
            yield content.fault(f"not valid JSON ({error})", "not-json", place)


def _json_array(content: Content, stream: IO[bytes], encoding: str) -> Iterator[Record]:
    import ijson

    record = content.records("item")
    utf8: Any = stream if encoding == "utf-8" else _Utf8(stream, encoding)
    number = 0
    try:
        for number, item in enumerate(ijson.items(utf8, "item", use_float=True), 1):
            yield record(item, number)
    except (ijson.JSONError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "nested too deeply"
        yield content.fault(f"not valid JSON after it ({reason})", "not-json", f"item {number}")


def _csv(content: Content, stream: IO[bytes], encoding: str, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_CELL)
    lines = _characters(stream, encoding, "")
    first = lines.readline().removeprefix("\ufeff")
    before = 0
    if (hint := first.rstrip("\r\n")).lower().startswith("sep=") and len(hint) == 5:  # Excel writes it
        delimiter, first, before = hint[4], lines.readline(), 1
    # The delimiter by which the header has the columns, and then the most columns.
    named = {name for name in (content.reading.text, content.reading.id, content.reading.group) if name is not None}
    delimiter = delimiter or max(
        _DELIMITERS, key=lambda d: (len(named & set(next(csv.reader([first], delimiter=d), []))), first.count(d))
    )
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    record = content.records("line")
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1 + before
        place = f"line {line}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            open_quote = "unexpected end" in str(error) or "field larger" in str(error)
            reason = "a quote opened in this record is never closed" if open_quote else str(error)
            yield content.fault(reason, "csv-invalid", place)
            if header is None or open_quote:
                return
            continue
        if cells is None:
            return
        if not cells:
            continue
        fault = None if all(map(str.isascii, cells)) else _not_in_encoding(content, "".join(cells), encoding, place)
        if header is None:
            header = cells
            fault = fault or content.wrong_columns(header)
            if fault:
                yield fault
                return
        elif len(cells) != len(header):
            reason = f"{len(cells):,} cells, and the header has {len(header):,}"
            yield fault or content.fault(reason, "csv-invalid", place)
        else:
            yield fault or record(dict(zip(header, cells, strict=True)), line)


class _Utf8:
    """Reads a stream of another encoding as UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)()

    def read(self, size: int) -> bytes:
        while content := self._stream.read(size):
            if text := self._decoder.decode(content):
                return text.encode()
        return self._decoder.decode(b"", final=size != 0).encode()
