"""Documents of text files: .txt, JSON and CSV, in any encoding."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, NamedTuple

from configs.errors import InputError
from datapipe.decoding import LFS, LFS_FAULT, decompress, detect_encoding, is_utf8, likely_codec, require_codec
from datapipe.identifiers import NO_SPANS, Identifier, parse_brat
from datapipe.input_file import printable
from datapipe.records import Content, Filtered, Record

MANY_LINES = 1000
"""Lines of a .txt file from which its reader is told that it is one document."""
NULL = r"\N"
"""A cell without a value, as MySQL and PostgreSQL write it."""
LONGEST_CELL = 2**28
"""Characters of a cell of a CSV file; a longer one has a quote that is never closed."""
_ONE_OBJECT = 2**26
"""Characters of an object of a JSON file that stands on several lines."""
_PART = 2**20
"""Characters of a JSON array that are read at once."""
_BLANK = "\ufeff \t\r\n"
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_SPACE = re.compile(r"[ \t\r\n]*")
_DELIMITERS = ",;\t|"
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive or an Office document",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"%PDF-": "a PDF",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
}
"""Kinds of files that are no text, by their first bytes."""


class _Encoding(NamedTuple):
    name: str
    is_sure: bool
    """The first bytes hold characters of UTF-8. A byte that is none is damage then, and no sign of another encoding."""


def read_lines(content: Content, kind: str, raw: IO[bytes]) -> Iterator[Record]:
    """Yield the records of JSON, CSV or plain text, after decompression and by its encoding."""
    stream, head = decompress(raw, content.name)
    if head.startswith(LFS):
        yield content.fault(LFS_FAULT, "not-text")
        return
    if other := next((name for magic, name in _NO_TEXT.items() if head.startswith(magic)), None):
        yield content.fault(f"it is {other}, whatever its name; rename or convert it", "not-text")
        return
    name = content.reading.encoding and require_codec(content.reading.encoding)
    if name is None:
        name = detect_encoding(head)
        if name is None or (name == "utf-8" and head.count(0) > len(head) / 4):
            yield content.fault("no text in any encoding that Detour knows; name it, such as --encoding cp1252")
            return
        if name not in ("utf-8", "utf-8-sig"):
            content.notes.add(f"encoding {name}, as detected (--encoding names another)", content.name)
    encoding = _Encoding(name, _is_utf8_codec(name) and not head.isascii() and is_utf8(head))
    read = {"json": _json, "csv": _csv, "tsv": _csv, "txt": _txt}[kind]
    try:
        yield from read(content, stream, encoding, "\t" if kind == "tsv" else "")
    except UnicodeError as error:
        yield content.fault(f"not {name} ({error}); name its encoding, such as --encoding cp1252", "not-utf8")


def _is_utf8_codec(name: str) -> bool:
    return codecs.lookup(name).name in ("utf-8", "utf-8-sig")


def _characters(stream: IO[bytes], encoding: _Encoding, newline: str) -> io.TextIOWrapper:
    """Bytes that do not belong to the encoding become lone surrogates, so that they cost their record only."""
    return io.TextIOWrapper(stream, encoding.name, errors="surrogateescape", newline=newline)


def _not_in_encoding(content: Content, characters: str, encoding: _Encoding, place: str) -> InputError | None:
    """The fault of characters that were not in the encoding of the file."""
    try:
        characters.encode()
        return None
    except UnicodeEncodeError as error:
        label = "UTF-8" if _is_utf8_codec(encoding.name) else encoding.name
        written = characters.encode("utf-8", "surrogateescape")
        if encoding.is_sure or (label == "UTF-8" and is_utf8(written)):
            remedy = "the file is UTF-8, and damaged there: export it again, or leave this out by --on-error skip"
        elif codec := likely_codec(written):
            remedy = f"it looks like {codec}: --encoding {codec}"
        else:
            remedy = "name its encoding by --encoding"
        return content.fault(f"byte {error.start} is not {label}; {remedy}", "not-utf8", place)


def _txt(content: Content, stream: IO[bytes], encoding: _Encoding, _: str) -> Iterator[Record]:
    group = content.by_folders()
    if isinstance(group, Filtered | InputError):
        yield group
        return
    annotations = content.annotations() if content.reading.spans != NO_SPANS else None
    if annotations is not None and content.reading.lines:
        yield content.fault("its .ann file counts from the start of the file; leave out --lines", "spans-invalid")
        return
    if content.reading.lines:
        for number, line in enumerate(_characters(stream, encoding, "\n"), 1):
            if line := line.strip("\r\n\ufeff"):
                place = f"line {number}"
                yield _not_in_encoding(content, line, encoding, place) or content.text(line, str(number), place, group)
        return
    text = _characters(stream, encoding, "").read().removeprefix("\ufeff")
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
    yield _not_in_encoding(content, text, encoding, "") or content.text(text, stem, "", group, given)


def _json(content: Content, stream: IO[bytes], encoding: _Encoding, _: str) -> Iterator[Record]:
    start = stream.peek(1)[:64].decode(encoding.name, "ignore")  # type: ignore[attr-defined]
    read = _json_array if start.lstrip(_BLANK).startswith("[") else _json_lines
    return read(content, stream, encoding, _)


def _json_lines(content: Content, raw: IO[bytes], encoding: _Encoding, _: str) -> Iterator[Record]:
    record = content.records("line")
    stream = _characters(raw, encoding, "\n")
    is_first = True
    lines: Iterator[str] = stream
    for number in itertools.count(1):
        if not (line := next(lines, "")):
            return
        if not (line := line.strip(_BLANK)):
            continue
        place = f"line {number}"
        fault = None if line.isascii() else _not_in_encoding(content, line, encoding, place)
        try:
            yield fault or record(json.loads(line), number)
        except RecursionError:
            yield content.fault("nested too deeply", "not-json", place)
        except ValueError as error:
            if is_first and not line.endswith("}"):
                rest = stream.read(_ONE_OBJECT) + stream.readline()
                whole = f"{line}\n{rest}"
                try:
                    item = json.loads(whole)
                    yield _not_in_encoding(content, whole, encoding, "") or record(item, 1)
                    return
                except (ValueError, RecursionError):
                    lines = itertools.chain(io.StringIO(rest, newline="\n"), stream)
            yield content.fault(f"not valid JSON ({error})", "not-json", place)
        is_first = False


def _json_array(content: Content, stream: IO[bytes], encoding: _Encoding, _: str) -> Iterator[Record]:
    """Parse items as JSON lines are, so that NaN, large numbers and damaged characters are treated alike."""
    record = content.records("item")
    characters = _characters(stream, encoding, "\n")
    decode = json.JSONDecoder().raw_decode
    text, at, number = characters.read(_PART).lstrip(_BLANK), 0, 0
    while number == 0 or text[at] != "]":  # text[at] is the `[` or `,` before an item
        begin = _skip_blank(text, at + 1)
        if number == 0 and text[begin : begin + 1] == "]":
            at = begin
            break
        try:
            item, end = decode(text, begin)
            after = _skip_blank(text, end)
            if text[after] not in ",]":
                raise ValueError("a comma is missing")
        except (ValueError, IndexError, RecursionError) as error:
            rest = len(text) - at
            if rest < _ONE_OBJECT and (more := characters.read(max(_PART, rest))):
                text, at = text[at:] + more, 0
                continue
            reason = {IndexError: "it ends within the array", RecursionError: "nested too deeply"}.get(type(error))
            reason = reason or getattr(error, "msg", str(error))
            yield content.fault(f"not valid JSON after it ({reason})", "not-json", f"item {number}")
            return
        at, number = after, number + 1
        written = text[begin:end]
        fault = None if written.isascii() else _not_in_encoding(content, written, encoding, f"item {number}")
        yield fault or record(item, number)
    if (text[at + 1 :] + characters.read(_PART)).strip(_BLANK):
        yield content.fault("not valid JSON after it (more follows the array)", "not-json", f"item {number}")


def _skip_blank(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _csv(content: Content, stream: IO[bytes], encoding: _Encoding, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_CELL)
    lines = _characters(stream, encoding, "")
    first = lines.readline().removeprefix("\ufeff")
    before = 0
    is_tsv = delimiter == "\t"
    if (hint := first.rstrip("\r\n")).lower().startswith("sep=") and len(hint) == 5:  # Excel writes it
        delimiter, first, before = hint[4], lines.readline(), 1
    # The delimiter by which the header has the columns, and then the most columns.
    named = {name for name in (content.reading.text, content.reading.id, content.reading.group) if name is not None}
    delimiter = delimiter or max(
        _DELIMITERS,
        key=lambda d: (len(named & set(_names(next(csv.reader([first], delimiter=d), [])))), first.count(d)),
    )
    cells_of_first = next(csv.reader([first], delimiter=delimiter), [])
    # Where each name follows a space, so does each cell, and a quote after it opens a cell.
    spaced = len(cells_of_first) > 1 and all(cell.startswith(" ") for cell in cells_of_first[1:])
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True, skipinitialspace=spaced)
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
            if "expected after" in reason:
                reason += '; write a quote inside a quoted cell as "" and not as \\" (Spark: option escape="\\"")'
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
            header = _names(cells)
            fault = fault or content.wrong_columns(header)
            if fault:
                yield fault
                return
        elif len(cells) != len(header):
            reason = f"{len(cells):,} cells, and the header has {len(header):,}"
            yield fault or content.fault(reason, "csv-invalid", place)
        elif is_tsv and (joining := [name for i, name in enumerate(header) if _merges_rows(cells, i)]):
            reason = (
                f"the quote that opens `{joining[0]}` joins rows; write it twice within quotes if it is text, or "
                "rename the file to .csv if this is one record"
            )
            yield fault or content.fault(reason, "csv-invalid", place)
        else:
            values = (None if cell == NULL else cell for cell in cells)
            yield fault or record(dict(zip(header, values, strict=True)), line)


def _names(header: list[str]) -> list[str]:
    """The names of columns, without the spaces that some programs write after a delimiter."""
    return [name.strip() for name in header]


def _merges_rows(cells: list[str], column: int) -> bool:
    """Whether a cell of a TSV file holds the ends and beginnings of rows, because of quotes that are text."""
    if "\t" not in cells[column] or len(lines := _LINE_BREAK.split(cells[column])) == 1:
        return False
    first, *middle, last = lines
    fits = first.count("\t") == len(cells) - 1 - column and last.count("\t") == column
    return fits and all("\t" in line for line in middle if line)
