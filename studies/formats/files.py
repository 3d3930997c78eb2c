"""Text and records of task files: JSON, JSON lines, CSV, TSV, parquet and Hugging Face datasets."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from datapipe.splits import splits_of

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Suffixes of files of records. All but the last two may end in .gz."""
DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}
FIELD_LIMIT = 2**30
"""Longest field of a CSV file in characters; clinical notes exceed the default of `csv`."""


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark, and gzip-compressed if it ends in .gz.

    Raises:
        InputError: The file cannot be read or is no UTF-8.
    """
    content = b""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
        return text if "\n" in text else text.replace("\r", "\n")  # lines of an old Macintosh; offsets stay
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise InputError(
            f"{path} is not UTF-8 text ({error}); convert it, for instance with `iconv -f {encoding} -t utf-8`",
            code="not-utf-8",
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}", code="not-readable") from None


def suffix_of(path: Path) -> str:
    """Return the suffix before .gz, in lower case."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield location and record of a file, or of a folder that `datasets.save_to_disk` wrote.

    Ids of classes are replaced by their names where the file states them.

    Args:
        path: File or folder.
        columns: Columns that are needed, by which the delimiter of a CSV file is found.

    Raises:
        InputError: The file is wrong; the message names the line.
    """
    suffix = suffix_of(path)
    if path.is_dir():
        for file in _files_of_dataset(path):
            yield from _arrow(file, path)
    elif suffix in (".parquet", ".arrow"):
        yield from _arrow(path, path.parent)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _lines(read_text(path), path)
    elif suffix == ".json":
        text = read_text(path)
        try:
            value = _json(text, str(path))
        except InputError:
            if not _begins_with_a_value(text):
                raise
            yield from _lines(text, path)  # pandas and Spark give JSON lines this suffix
            return
        for number, record in enumerate(_list(value, path), 1):
            location = f"{path}, record {number}"
            yield location, _object(record, location)
    elif suffix in DELIMITERS:
        yield from _table(path, suffix, columns)
    else:
        raise InputError(
            f"{path}: not a task file that Detour reads; it reads {', '.join(FORMATS)} and folders of datasets",
            code="unknown-format",
        )


def _json(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{location}: not valid JSON ({error})", code="bad-json") from None
    except RecursionError:
        raise InputError(f"{location}: its JSON is nested too deeply", code="bad-json") from None


def _begins_with_a_value(text: str) -> bool:
    """Return whether the first line that is not blank is a JSON value of its own."""
    try:
        json.loads(text.lstrip().partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return True


def _lines(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of JSON lines."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            location = f"{path}, line {number}"
            yield location, _object(_json(line, location), location)


def _object(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{location}: expected an object", code="bad-json")
    return value


def _list(value: Any, path: Path) -> list[Any]:
    """Return the records of a JSON file: an array, `{"data": [...]}`, or an object of objects by id."""
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else list(value.values())
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise InputError(f"{path}: expected an array of objects", code="bad-json")
    return value


def _table(path: Path, suffix: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a CSV or TSV file. Its first line may be `sep=;`, as for Excel.

    A TSV file is read without quotes if every line then has as many fields as the header, because a stray quote would
    join two lines. Else quotes are read as in CSV.
    """
    csv.field_size_limit(FIELD_LIMIT)
    text, skipped = read_text(path), 0
    told = re.match(r'"?sep=(.)"?\r?\n', text)
    if told:
        text, skipped = text[told.end() :], 1
    header = text.partition("\n")[0].strip("\r")
    if "\r" in header:
        raise InputError(
            f"{path}, line {1 + skipped}: lines end in CR and in LF; end all of them alike, for instance with "
            "`dos2unix -c mac`",
            code="bad-csv",
        )
    names = {delimiter: next(csv.reader([header], delimiter=delimiter), []) for delimiter in DELIMITERS[suffix]}
    delimiter = next((d for d, found in names.items() if set(columns) <= set(found)), DELIMITERS[suffix][0])
    delimiter = told[1] if told else delimiter
    if suffix == ".tsv" and delimiter == "\t":
        numbered = enumerate(text.split("\n"), 1 + skipped)
        lines = [(number, line.rstrip("\r")) for number, line in numbered if line.strip()]
        rows = [(number, [_unquoted(field) for field in line.split("\t")]) for number, line in lines]
        if len({len(fields) for _, fields in rows}) <= 1:
            yield from _named(rows, path, columns)
            return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        for fields in reader:
            if fields:
                rows.append((reader.line_num + skipped, fields))
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num + skipped}: {error}; write a quote inside a quoted field twice",
            code="bad-csv",
        ) from None
    yield from _named(rows, path, columns)


def _named(
    rows: Sequence[tuple[int, list[str]]], path: Path, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows as records by the names of the first row."""
    if not rows:
        return
    names = [name.strip() for name in rows[0][1]]
    repeated = [name for name in columns if names.count(name) > 1]
    if repeated:
        raise InputError(
            f"{path}, line 1: several columns are named {repeated[0]}; rename all but one", code="column-twice"
        )
    for number, fields in rows[1:]:
        if len(fields) != len(names):
            raise InputError(
                f"{path}, line {number}: expected {len(names)} columns as in the header, got {len(fields)}",
                code="bad-column-count",
            )
        yield f"{path}, line {number}", dict(zip(names, fields, strict=True))


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    is_quoted = len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else field


def _files_of_dataset(folder: Path) -> list[Path]:
    state = folder / "state.json"
    if state.is_file():
        try:
            return [folder / entry["filename"] for entry in _json(read_text(state), str(state))["_data_files"]]
        except (KeyError, TypeError):
            raise InputError(f"{state} names no data files; save the dataset again", code="not-readable") from None
    files = sorted([*folder.rglob("*.parquet"), *folder.rglob("*.arrow")])
    splits = sorted(set(splits_of([file.name for file in files]).values()))
    if len(splits) > 1:
        one = "train" if "train" in splits else splits[0]
        raise InputError(
            f"{folder} holds the splits {', '.join(splits)}; name the files of one, such as "
            f"{folder.name}/{one}-*.parquet",
            code="not-a-split",
        )
    if not files or (folder / "dataset_dict.json").is_file():
        raise InputError(
            f"{folder} is no split of a dataset; name the folder of a split, or a parquet, JSON or brat folder",
            code="not-a-split",
        )
    return files


def _arrow(path: Path, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        else:
            with path.open("rb") as file:
                table = pa.ipc.open_stream(file).read_all()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}", code="not-readable") from None
    stated = (table.schema.metadata or {}).get(b"huggingface", b"{}").decode("utf-8", "replace")
    metadata = _json(stated, f"{path}, metadata of Hugging Face")
    info = folder / "dataset_info.json"
    try:
        described = metadata.get("info") or (_json(read_text(info), str(info)) if info.is_file() else {})
        names = {key: found for key, feature in (described.get("features") or {}).items() if (found := _names(feature))}
    except (AttributeError, KeyError, TypeError):
        raise InputError(
            f"{path}: the metadata of Hugging Face do not describe its columns; save the dataset again",
            code="not-readable",
        ) from None
    for number, record in enumerate(table.to_pylist(), 1):
        for key in names.keys() & record.keys():
            record[key] = _by_name(record[key], names[key])
        yield f"{path}, row {number}", record


def _names(feature: Any) -> list[str] | None:
    """Find the class names of a feature of a Hugging Face dataset, also inside a sequence."""
    if isinstance(feature, list) and feature:
        return _names(feature[0])
    if not isinstance(feature, dict):
        return None
    return feature["names"] if feature.get("_type") == "ClassLabel" else _names(feature.get("feature"))


def _by_name(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_by_name(part, names) for part in value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with gaps
    if isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None  # -1 marks an example without a label
    return value
