"""Reading documents from text files of any supported format, in order and in bounded memory."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import lzma
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from configs.errors import InputError
from configs.schema import Reading
from datapipe.decoding import (
    DAMAGE,
    decompress,
    detect_encoding,
    has_control_characters,
    likely_codec,
    require_codec,
)
from datapipe.identifiers import (
    NO_SPANS,
    SPANS,
    Identifier,
    Patterns,
    find_identifiers,
    load_patterns,
    merge_overlapping,
    parse_brat,
    parse_spans,
    with_placeholders,
)
from datapipe.inputs import InputFile, format_of, printable, without_secrets
from datapipe.notes import Notes
from datapipe.where import NoFieldError, columns_of, describe_missing, field, parse_where

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
"""What files are that begin with these bytes, and are no text."""
_WHOLE = re.compile(r"-?\d{1,15}\.0+")
_IN_MEMORY = 2**24


class Text(NamedTuple):
    """A document of a text file."""

    id: str
    text: bytes
    """UTF-8; empty where a record has no text (null)."""
    position: int
    """Bytes of its file read so far; compressed bytes if the file is compressed."""
    group: str | None = None
    """Value of the column that `Reading.group` names."""
    identifiers: tuple[Identifier, ...] = ()
    """Merged identifiers that come with the text, or the places of all placeholders."""


class Filtered(NamedTuple):
    """A record that `Reading.where` leaves out."""

    position: int


Record = Text | Filtered | InputError
"""The outcome of a record. An InputError is a fault of this record, or of the rest of its file."""


def read_texts(file: InputFile | Path, reading: Reading | None = None) -> Iterator[Text]:
    """Yield the documents of one file in order.

    Raises:
        InputError: The file is unreadable or wrong; the message names file and line.
    """
    if isinstance(file, Path):
        file = InputFile(file.name, printable(file), format_of(file.name) or "txt", 0, file)
    for record in read_records(file, reading or Reading(), Notes()):
        if isinstance(record, InputError):
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
            content = _Content(file.name, raw.tell, reading, notes, file.annotations)
            records = content.read(file.format, raw)
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


@dataclass(frozen=True)
class _Content:
    """The content of one file, or of one member of an archive."""

    name: str
    """Path, for messages."""
    position: Callable[[], int]
    reading: Reading
    notes: Notes
    annotations: Callable[[], bytes | None] = lambda: None
    """Returns the content of the .ann file beside a .txt file; None if there is none."""

    def read(self, kind: str, raw: IO[bytes]) -> Iterator[Record]:
        if kind in ("parquet", "arrow"):
            return self._table(kind, raw)
        if kind == "zip":
            return self._zip(raw)
        if kind == "tar":
            return self._tar(raw)
        return self._lines(kind, raw)

    # Text

    def _lines(self, kind: str, raw: IO[bytes]) -> Iterator[Record]:
        stream, head = decompress(raw, self.name)
        if other := next((name for magic, name in _NO_TEXT.items() if head.startswith(magic)), None):
            yield self._fault(f"it is {other}, whatever its name; rename or convert it", "not-text")
            return
        encoding = self.reading.encoding and require_codec(self.reading.encoding)
        if encoding is None:
            encoding = detect_encoding(head)
            if encoding is None or (encoding == "utf-8" and head.count(0) > len(head) / 4):
                yield self._fault("no text in any encoding that Detour knows; name it, such as --encoding cp1252")
                return
            if encoding not in ("utf-8", "utf-8-sig"):
                self.notes.add(f"encoding {encoding}, as detected (--encoding names another)", self.name)
        read = {"json": self._json, "csv": self._csv, "tsv": self._csv, "txt": self._txt}[kind]
        try:
            yield from read(stream, encoding, "\t" if kind == "tsv" else "")
        except UnicodeError as error:
            yield self._fault(f"not {encoding} ({error}); name its encoding, such as --encoding cp1252", "not-utf8")

    def _characters(self, stream: IO[bytes], encoding: str, newline: str) -> io.TextIOWrapper:
        """Bytes that do not belong to the encoding become lone surrogates, so that they cost their record only."""
        return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline=newline)

    def _not_in_encoding(self, characters: str, encoding: str, place: str) -> InputError | None:
        """The fault of characters that were not in the encoding of the file."""
        try:
            characters.encode()
            return None
        except UnicodeEncodeError as error:
            label = "UTF-8" if encoding.startswith("utf-8") else encoding
            codec = likely_codec(characters.encode("utf-8", "surrogateescape"))
            remedy = f"it looks like {codec}: --encoding {codec}" if codec else "name its encoding by --encoding"
            return self._fault(f"byte {error.start} is not {label}; {remedy}", "not-utf8", place)

    def _txt(self, stream: IO[bytes], encoding: str, _: str) -> Iterator[Record]:
        annotations = self.annotations() if self.reading.spans != NO_SPANS else None
        if annotations is not None and self.reading.lines:
            yield self._fault("its .ann file counts from the start of the file; leave out --lines", "spans-invalid")
            return
        if self.reading.lines:
            for number, line in enumerate(self._characters(stream, encoding, "\n"), 1):
                if line := line.strip("\r\n\ufeff"):
                    place = f"line {number}"
                    yield self._not_in_encoding(line, encoding, place) or self._text(line, str(number), place)
            return
        text = self._characters(stream, encoding, "").read()
        if text.count("\n") > MANY_LINES:
            self.notes.add(
                f"one document of more than {MANY_LINES:,} lines; --lines makes each line a document", self.name
            )
        stem = printable(PurePosixPath(self.name).stem)
        given: list[Identifier] = []
        if annotations is not None:
            self.notes.add("identifiers read from the .ann file beside it (--spans none leaves them out)", self.name)
            try:
                given = parse_brat(annotations.decode("utf-8-sig"), text)
            except ValueError as error:
                yield self._fault(str(error), "spans-invalid")
                return
        yield self._not_in_encoding(text, encoding, "") or self._text(text, stem, "", given=given)

    def _json(self, stream: IO[bytes], encoding: str, _: str) -> Iterator[Record]:
        start = stream.peek(1)[:64].decode(encoding, "ignore")  # type: ignore[attr-defined]
        if start.lstrip("\ufeff \t\r\n").startswith("["):
            return self._json_array(stream, encoding)
        return self._json_lines(self._characters(stream, encoding, "\n"), encoding)

    def _json_lines(self, stream: io.TextIOWrapper, encoding: str) -> Iterator[Record]:
        record = self._records("line")
        lines: Iterator[str] = stream
        for number in itertools.count(1):
            if not (line := next(lines, "")):
                return
            if not (line := line.strip("\ufeff \t\r\n")):
                continue
            place = f"line {number}"
            fault = None if line.isascii() else self._not_in_encoding(line, encoding, place)
            try:
                yield fault or record(json.loads(line), number)
            except RecursionError:
                yield self._fault("nested too deeply", "not-json", place)
            except ValueError as error:
                if number == 1 and not line.endswith("}"):
                    rest = stream.read(_ONE_OBJECT) + stream.readline()
                    try:
                        yield record(json.loads(f"{line}\n{rest}"), 1)
                        return
                    except (ValueError, RecursionError):
                        lines = itertools.chain(io.StringIO(rest, newline="\n"), stream)
                yield self._fault(f"not valid JSON ({error})", "not-json", place)

    def _json_array(self, stream: IO[bytes], encoding: str) -> Iterator[Record]:
        import ijson

        record = self._records("item")
        utf8: Any = stream if encoding == "utf-8" else _Utf8(stream, encoding)
        number = 0
        try:
            for number, item in enumerate(ijson.items(utf8, "item", use_float=True), 1):
                yield record(item, number)
        except (ijson.JSONError, ValueError, OverflowError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else "nested too deeply"
            yield self._fault(f"not valid JSON after it ({reason})", "not-json", f"item {number}")

    def _csv(self, stream: IO[bytes], encoding: str, delimiter: str) -> Iterator[Record]:
        csv.field_size_limit(LONGEST_CELL)
        lines = self._characters(stream, encoding, "")
        first = lines.readline().removeprefix("\ufeff")
        before = 0
        if (hint := first.rstrip("\r\n")).lower().startswith("sep=") and len(hint) == 5:  # Excel writes it
            delimiter, first, before = hint[4], lines.readline(), 1
        # The delimiter by which the header has the columns, and then the most columns.
        named = {name for name in (self.reading.text, self.reading.id, self.reading.group) if name is not None}
        delimiter = delimiter or max(
            _DELIMITERS, key=lambda d: (len(named & set(next(csv.reader([first], delimiter=d), []))), first.count(d))
        )
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        record = self._records("line")
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1 + before
            place = f"line {line}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                open_quote = "unexpected end" in str(error) or "field larger" in str(error)
                reason = "a quote opened in this record is never closed" if open_quote else str(error)
                yield self._fault(reason, "csv-invalid", place)
                if header is None or open_quote:
                    return
                continue
            if cells is None:
                return
            if not cells:
                continue
            fault = None if all(map(str.isascii, cells)) else self._not_in_encoding("".join(cells), encoding, place)
            if header is None:
                header = cells
                fault = fault or self._wrong_columns(header)
                if fault:
                    yield fault
                    return
            elif len(cells) != len(header):
                reason = f"{len(cells):,} cells, and the header has {len(header):,}"
                yield fault or self._fault(reason, "csv-invalid", place)
            else:
                yield fault or record(dict(zip(header, cells, strict=True)), line)

    # Tables

    def _table(self, kind: str, raw: IO[bytes]) -> Iterator[Record]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            file = pyarrow.PythonFile(_seekable(raw), "r")
            if kind == "parquet":
                parquet = pyarrow.parquet.ParquetFile(file)
                schema = parquet.schema_arrow
            else:
                head = file.read(6)
                file.seek(0)
                opened = pyarrow.ipc.open_file(file) if head == b"ARROW1" else pyarrow.ipc.open_stream(file)
                schema = opened.schema
            names = _column_names(schema)
            if fault := self._wrong_columns(names):
                yield fault
                return
            wanted = [name for name in self._wanted() if name in names]
            top = list(dict.fromkeys(name if name in schema.names else name.split(".")[0] for name in wanted))
            if kind == "parquet":
                batches: Iterable[Any] = parquet.iter_batches(batch_size=256, columns=top)
            elif isinstance(opened, pyarrow.ipc.RecordBatchFileReader):
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            else:
                batches = opened
            record = self._records("row")
            for batch in batches:
                columns = batch.select(top)
                for row in range(batch.num_rows):
                    number += 1
                    try:
                        cells = {name: columns.column(name)[row].as_py() for name in top}
                    except UnicodeDecodeError:
                        yield self._fault("not UTF-8; write the file again", "not-utf8", f"row {number}")
                    else:
                        yield record(cells, number)
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0]
            yield self._fault(f"no readable {kind} file ({reason})", "not-readable", f"row {number}" if number else "")

    # Archives

    def _zip(self, raw: IO[bytes]) -> Iterator[Record]:
        try:
            with zipfile.ZipFile(_seekable(raw)) as archive:
                for info in archive.infolist():
                    if info.is_dir():
                        continue
                    try:
                        yield from self._member(info.filename, lambda info=info: archive.open(info))  # type: ignore[misc]
                    except (RuntimeError, NotImplementedError) as error:  # a password, or an unknown compression
                        reason = "it needs a password; unpack the archive" if info.flag_bits & 1 else error
                        yield self._fault(f"cannot be read: {reason}", "not-readable", printable(info.filename))
                    except (zlib.error, lzma.LZMAError, EOFError) as error:
                        yield self._fault(f"damaged ({error})", "not-readable", printable(info.filename))
        except zipfile.BadZipFile as error:
            yield self._fault(f"no readable zip file ({error})", "not-readable")

    def _tar(self, raw: IO[bytes]) -> Iterator[Record]:
        stream, _ = decompress(raw, self.name if not self.name.lower().endswith((".tgz", ".tar")) else "")
        tail = _Tail(stream)
        try:
            with tarfile.open(fileobj=tail, mode="r|", errorlevel=2) as archive:  # type: ignore[call-overload]
                for info in archive:
                    if info.isfile():
                        yield from self._member(info.name, lambda info=info: archive.extractfile(info))  # type: ignore
                    elif not info.isdir():
                        self.notes.unread("link in a tar", "no regular file", f"{self.name}!{printable(info.name)}")
                while tail.read(2**16):  # to the end, so that a compressed file that is cut off is told
                    pass
            if any(tail.last):
                yield self._fault("it ends before the end mark of a tar: it is cut off", "not-readable")
        except tarfile.TarError as error:
            yield self._fault(f"no readable tar file ({error})", "not-readable")

    def _member(self, member: str, open_member: Callable[[], Any]) -> Iterator[Record]:
        path, name = PurePosixPath(member), f"{self.name}!{printable(member)}"
        kind = format_of(path.name) or (format_of(path.parent.name) if not path.suffix else None) or self.reading.format
        if path.is_absolute() or ".." in path.parts or "\\" in member:
            yield InputError(
                f"{name}: a member that leads out of its archive; make the archive again", code="unsafe-member"
            )
        elif any(part.startswith((".", "__MACOSX")) for part in path.parts):
            self.notes.unread("hidden in an archive", "its name begins with .", name)
        elif path.suffix.lower() == ".ann" and self.reading.spans != NO_SPANS:
            yield InputError(
                f"{name}: .ann files are read beside .txt files only; unpack the archive, or give --spans none",
                code="spans-in-archive",
            )
        elif kind is None:
            self.notes.unread(f"{path.suffix or 'no suffix'} in an archive", "no format that Detour reads", name)
        elif kind in ("zip", "tar"):
            self.notes.unread("an archive in an archive", "unpack it first", name)
        else:
            content = _Content(name, self.position, self.reading, self.notes)
            try:
                with open_member() as stream:
                    yield from content.read(kind, stream)
            except zipfile.BadZipFile as error:
                yield InputError(f"{name}: damaged ({error})", code="not-readable")

    # Records

    def _wanted(self) -> list[str]:
        reading = self.reading
        names = [reading.text, reading.id or "id", *([reading.group] if reading.group else [])]
        spans = [] if reading.spans == NO_SPANS else [reading.spans or SPANS]
        return [*names, *spans, *(columns_of(reading.where) if reading.where else [])]

    def _wrong_columns(self, names: list[str]) -> InputError | None:
        """The fault of a table without a column that is needed, or with two of the same name."""
        for name in self._wanted():
            optional = {"id": self.reading.id is None, SPANS: self.reading.spans is None}
            if name not in names and not optional.get(name):
                return self._fault(describe_missing(name, names), "text-missing")
            if names.count(name) > 1:
                return self._fault(
                    f"{names.count(name)} columns are called `{name}`; rename all but one", "text-missing"
                )
        return None

    def _records(self, unit: str) -> Callable[[Any, int], Record]:
        """A function that makes the document of a record and its number."""
        reading = self.reading
        where = parse_where(reading.where) if reading.where else None
        identity_field = reading.id or "id"
        spans_field = reading.spans or SPANS

        def make(record: Any, number: int) -> Record:
            place = f"{unit} {number}"
            try:
                if not isinstance(record, dict):
                    raise NoFieldError(f"expected an object with the key `{reading.text}`")
                if where is not None and not where(record):
                    return Filtered(self.position())
                text = field(record, reading.text)
                named = reading.id is not None or identity_field in record
                identity = field(record, identity_field) if named else None
                group = field(record, reading.group) if reading.group else None
                has_spans = spans_field != NO_SPANS and (reading.spans is not None or spans_field in record)
                spans = field(record, spans_field) if has_spans else None
                if isinstance(text, bytes):
                    text = text.decode()
            except NoFieldError as error:
                return self._fault(str(error), "text-missing", place)
            except UnicodeDecodeError:
                return self._fault(f"`{reading.text}` is not UTF-8", "not-utf8", place)
            except ValueError as error:
                return self._fault(str(error), "where-invalid", place)
            if text is not None and not isinstance(text, str):
                fault = f"`{reading.text}` is {type(text).__name__}, not a string"
                return self._fault(fault, "text-not-a-string", place)
            if isinstance(group, list | dict):
                return self._fault(
                    f"`{reading.group}` is {type(group).__name__}, not one value", "group-invalid", place
                )
            try:
                given = parse_spans(spans, text or "")
            except (ValueError, RecursionError) as error:
                return self._fault(f"`{spans_field}`: {error}", "spans-invalid", place)
            return self._text(text or "", _key(identity) or str(number), place, _key(group), given)

        return make

    @cached_property
    def _patterns(self) -> Patterns:
        """Those to mask; others are looked for by the processes that tokenize."""
        reading = self.reading
        return load_patterns(reading.identifiers) if reading.identifiers and reading.mask_spans else ()

    def _text(
        self, text: str, identity: str, place: str, group: str | None = None, given: Sequence[Identifier] = ()
    ) -> Text:
        identifiers = merge_overlapping([*given, *find_identifiers(self._patterns, text)])
        if self.reading.mask_spans:
            text, identifiers = with_placeholders(text, identifiers)
        at = f"{self.name}, {place}" if place else self.name
        try:
            content = text.encode()
        except UnicodeEncodeError:
            content = text.encode("utf-8", "replace")
            self.notes.add("half of a character (a lone surrogate), read as ?", at, "documents")
        if has_control_characters(content):
            nul = "NUL characters" if b"\0" in content else "control characters"
            self.notes.add(f"{nul} in the text, kept", at, "documents")
        return Text(identity, content, self.position(), group, identifiers)

    def _fault(self, fault: str, code: str = "not-utf8", place: str = "") -> InputError:
        return InputError(f"{self.name}{', ' if place else ''}{place}: {fault}", code=code)


def _key(value: Any) -> str | None:
    """An id or group as text: equal for 1, 1.0, "1" and "1.0", because a column with nulls is written as floats.

    None where there is none: null, NaN, or an empty cell.
    """
    if value is None or value != value:
        return None
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    return (text.partition(".")[0] if _WHOLE.fullmatch(text) else text) or None


def _column_names(schema: Any) -> list[str]:
    """Columns of an Arrow schema, those inside structs in the form `a.b`."""
    names = []
    for column in schema:
        names.append(column.name)
        pending = [(column.name, column.type)]
        while pending:
            prefix, kind = pending.pop()
            if hasattr(kind, "get_field_index") and hasattr(kind, "num_fields"):
                inner = [(f"{prefix}.{kind.field(i).name}", kind.field(i).type) for i in range(kind.num_fields)]
                names += [name for name, _ in inner]
                pending += inner
    return names


def _seekable(stream: IO[bytes]) -> IO[bytes]:
    """The stream, or a copy in a temporary file if it cannot be read from any place."""
    if stream.seekable():
        return stream
    copy = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
    while content := stream.read(2**20):
        copy.write(content)
    copy.seek(0)
    return copy


class _Utf8:
    """Reads a stream of another encoding as UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)()

    def read(self, size: int) -> bytes:
        while content := self._stream.read(size):
            if text := self._decoder.decode(content):
                return text.encode()
        return self._decoder.decode(b"", final=size != 0).encode()


class _Tail:
    """Reads a stream and remembers its last block."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self.last = (self.last + content[-512:])[-512:] if content else self.last
        return content
