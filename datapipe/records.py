"""Documents made of the records of a file: columns, condition, identifiers, and the faults of a record."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from configs.errors import InputError
from configs.schema import Reading
from datapipe.decoding import has_control_characters
from datapipe.identifiers import (
    NO_SPANS,
    SPANS,
    Identifier,
    Patterns,
    find_identifiers,
    load_patterns,
    merge_overlapping,
    parse_spans,
    with_placeholders,
)
from datapipe.notes import Notes
from datapipe.where import NoFieldError, columns_of, describe_missing, field, parse_where

_WHOLE_NUMBER = re.compile(r"-?\d{1,15}\.0+")


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


@dataclass(frozen=True)
class Content:
    """The content of one file, or of one member of an archive."""

    name: str
    """Path, for messages."""
    position: Callable[[], int]
    reading: Reading
    notes: Notes
    annotations: Callable[[], bytes | None] = lambda: None
    """Returns the content of the .ann file beside a .txt file; None if there is none."""
    partition: Mapping[str, str | None] | None = None
    """Columns that the file's folders name. A column of the file itself comes before them."""

    def wanted(self) -> list[str]:
        """Names of the columns that are read."""
        reading = self.reading
        names = [reading.text, reading.id or "id", *([reading.group] if reading.group else [])]
        spans = [] if reading.spans == NO_SPANS else [reading.spans or SPANS]
        return [*names, *spans, *(columns_of(reading.where) if reading.where else [])]

    def wrong_columns(self, names: list[str]) -> InputError | None:
        """The fault of a table without a column that is needed, or with two of the same name."""
        names = [*names, *(name for name in self.partition or () if name not in names)]
        for name in self.wanted():
            optional = {"id": self.reading.id is None, SPANS: self.reading.spans is None}
            if name not in names and not optional.get(name):
                return self.fault(describe_missing(name, names), "text-missing")
            if names.count(name) > 1:
                return self.fault(
                    f"{names.count(name)} columns are called `{name}`; rename all but one", "text-missing"
                )
        return None

    def records(self, unit: str) -> Callable[[Any, int], Record]:
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
                if self.partition:
                    record = {**self.partition, **record}
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
                return self.fault(str(error), "text-missing", place)
            except UnicodeDecodeError:
                return self.fault(f"`{reading.text}` is not UTF-8", "not-utf8", place)
            except ValueError as error:
                return self.fault(str(error), "where-invalid", place)
            if text is not None and not isinstance(text, str):
                fault = f"`{reading.text}` is {type(text).__name__}, not a string"
                return self.fault(fault, "text-not-a-string", place)
            if isinstance(group, list | dict):
                return self.fault(f"`{reading.group}` is {type(group).__name__}, not one value", "group-invalid", place)
            try:
                given = parse_spans(spans, text or "")
            except (ValueError, RecursionError) as error:
                return self.fault(f"`{spans_field}`: {error}", "spans-invalid", place)
            return self.text(text or "", _key(identity) or str(number), place, _key(group), given)

        return make

    def by_folders(self) -> str | Filtered | InputError | None:
        """The group that the folders of a file without columns name; or why the file is left out."""
        columns = dict(self.partition or {})
        try:
            if self.reading.where and not parse_where(self.reading.where)(columns):
                return Filtered(self.position())
            return _key(field(columns, self.reading.group)) if self.reading.group else None
        except NoFieldError as error:
            return self.fault(f"{error}; a text has the columns that its folders name", "text-missing")
        except ValueError as error:
            return self.fault(str(error), "where-invalid")

    @cached_property
    def _patterns(self) -> Patterns:
        """Those to mask; others are looked for by the processes that tokenize."""
        reading = self.reading
        return load_patterns(reading.identifiers) if reading.identifiers and reading.mask_spans else ()

    def text(
        self, text: str, identity: str, place: str, group: str | None = None, given: Sequence[Identifier] = ()
    ) -> Text:
        """Make a document, its identifiers merged or replaced by placeholders."""
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

    def fault(self, fault: str, code: str = "not-utf8", place: str = "") -> InputError:
        """Make the fault of a record at `place`, or of the file."""
        return InputError(f"{self.name}{', ' if place else ''}{place}: {fault}", code=code)


def _key(value: Any) -> str | None:
    """An id or group as text: equal for 1, 1.0, "1" and "1.0", because a column with nulls is written as floats.

    None where there is none: null, NaN, or an empty cell.
    """
    if value is None or value != value:
        return None
    if isinstance(value, bytes):  # as Impala and older Spark write text into Parquet
        value = value.decode("utf-8", "replace")
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    return (text.partition(".")[0] if _WHOLE_NUMBER.fullmatch(text) else text) or None
