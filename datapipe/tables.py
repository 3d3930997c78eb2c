"""Documents of parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO, Any

from datapipe.archives import seekable
from datapipe.records import Content, Record


def read_table(content: Content, kind: str, raw: IO[bytes]) -> Iterator[Record]:
    """Yield the records of a parquet or Arrow file; only the columns that are needed are read."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.PythonFile(seekable(raw, content.name), "r")
        if kind == "parquet":
            parquet = pyarrow.parquet.ParquetFile(file)
            schema = parquet.schema_arrow
        else:
            head = file.read(6)
            file.seek(0)
            opened = pyarrow.ipc.open_file(file) if head == b"ARROW1" else pyarrow.ipc.open_stream(file)
            schema = opened.schema
        names = _column_names(schema)
        if fault := content.wrong_columns(names):
            yield fault
            return
        wanted = [name for name in content.wanted() if name in names]
        top = list(dict.fromkeys(name if name in schema.names else name.split(".")[0] for name in wanted))
        if kind == "parquet":
            batches: Iterable[Any] = parquet.iter_batches(batch_size=256, columns=top)
        elif isinstance(opened, pyarrow.ipc.RecordBatchFileReader):
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            batches = opened
        record = content.records("row")
        for batch in batches:
            columns = batch.select(top)
            for row in range(batch.num_rows):
                number += 1
                try:
                    cells = {}
                    for name in top:
                        cells[name] = columns.column(name)[row].as_py()
                except UnicodeDecodeError:
                    yield content.fault("not UTF-8; write the file again", "not-utf8", f"row {number}")
                except (OverflowError, ValueError, LookupError) as error:  # dates before the year 1 and after 9999
                    reason = f"`{name}` has no value that Python can hold ({error}); write the column as text"
                    yield content.fault(reason, "not-readable", f"row {number}")
                else:
                    yield record(cells, number)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        yield content.fault(f"no readable {kind} file ({reason})", "not-readable", f"row {number}" if number else "")


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
