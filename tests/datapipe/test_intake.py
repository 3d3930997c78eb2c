"""Text as it lies in a hospital: any format, compression and encoding gives the same documents; nothing is silent."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import http.server
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import datapipe.near_duplicates
import datapipe.prepare
from configs.errors import InputError
from configs.schema import Data, Reading
from datapipe.decoding import detect_encoding, is_utf8, likely_codec
from datapipe.inputs import JOURNAL, find_inputs
from datapipe.manifest import NAME, read_manifest
from datapipe.near_duplicates import near_duplicates
from datapipe.notes import Notes
from datapipe.prepare import ensure_prepared, prepare
from datapipe.records import Filtered, Text
from datapipe.selection import HELD_OUT, Intake, Selection, blocks
from datapipe.text import read_records, read_texts
from datapipe.tokenizer import Tokenizer
from datapipe.where import parse_where
from launcher.cli import app
from tests.datapipe.conftest import refused
from tests.datapipe.tars import TAR_END, tar_member
from tests.datapipe.test_prepare import digests

RECORDS = [
    {"id": f"n{n}", "note": {"text": f'Fièvre {n}°, "39";\nle patient\r\nva bien, a;b\tc'}, "lang": "fr", "score": n}
    for n in range(9)
]
TEXTS = [record["note"]["text"] for record in RECORDS]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def table(delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "note.text", "lang", "score"])
    writer.writerows([r["id"], r["note"]["text"], r["lang"], r["score"]] for r in RECORDS)
    return out.getvalue()


def jsonl(records: list) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


CHARACTERS = {
    "a.jsonl": jsonl(RECORDS),
    "a.NDJSON": jsonl(RECORDS),
    "lines.json": jsonl(RECORDS),
    "array.json": json.dumps(RECORDS, indent=1, ensure_ascii=False),
    "comma.csv": table(","),
    "semicolon.CSV": table(";"),
    "a.tsv": table("\t"),
}


def read(path: Path, notes: Notes | None = None, **reading: object) -> list:
    files = find_inputs([str(path)], Reading(**reading), Notes())
    return [record for file in files for record in read_records(file, Reading(**reading), notes or Notes())]


def texts(records: list) -> list[str]:
    assert not [record for record in records if isinstance(record, InputError)], records
    return [record.text.decode() for record in records]


@pytest.mark.parametrize("name", CHARACTERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be", "cp1252"])
def test_every_format_in_every_encoding(name: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CHARACTERS[name].encode(encoding))
    notes = Notes()
    records = read(tmp_path / name, notes, text="note.text")
    assert texts(records) == TEXTS
    assert [record.id for record in records] == [record["id"] for record in RECORDS]
    said = bool(notes.lines()) and "encoding" in notes.lines()[0]
    assert said == (not encoding.startswith("utf-8"))
    assert texts(read(tmp_path / name, text="note.text", encoding=encoding)) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression_alone_and_in_archives(suffix: str, tmp_path: Path) -> None:
    content = {f"{name}{suffix}": COMPRESS[suffix](CHARACTERS[name].encode()) for name in CHARACTERS}
    for name, compressed in content.items():
        (tmp_path / name).write_bytes(compressed)
        assert texts(read(tmp_path / name, text="note.text")) == TEXTS
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, compressed in content.items():
            archive.writestr(f"folder/{name}", compressed)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, compressed in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(compressed)
            archive.addfile(info, io.BytesIO(compressed))
    (tmp_path / f"a.tar{suffix}").write_bytes(COMPRESS[suffix](plain.getvalue()))
    for name in ("a.zip", f"a.tar{suffix}"):
        assert texts(read(tmp_path / name, text="note.text")) == TEXTS * len(content)


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_a_compressed_file_that_is_cut_off_anywhere_is_told(suffix: str, tmp_path: Path) -> None:
    whole = COMPRESS[suffix](jsonl(RECORDS * 40).encode())
    for size in (len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(whole[:size])
        assert any(isinstance(record, InputError) for record in read(path, text="note.text"))
    path.write_bytes(b"no compressed file")
    with refused("not-readable", path.name):
        list(read_texts(path))


def test_tables_with_nested_columns(tmp_path: Path) -> None:
    rows = pyarrow.Table.from_pylist(RECORDS)
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=4)
    with pyarrow.ipc.new_file(str(tmp_path / "a.feather"), rows.schema) as writer:
        writer.write_table(rows)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.parquet", "a.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.arrow", "a.arrow")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        archive.add(tmp_path / "a.parquet", "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    names = ("a.parquet", "a.arrow", "a.feather", "a.zip", "a.tar", "a.tgz", "a.parquet.gz")
    for name in names:
        records = read(tmp_path / name, text="note.text", group="lang", where="score >= 3")
        assert [isinstance(record, Filtered) for record in records[:3]] == [True] * 3
        assert texts(records[3:]) == TEXTS[3:] and records[3].group == "fr" and records[3].id == "n3"
        assert texts(read(tmp_path / name, text="note.text", id="score")) == TEXTS
        (fault,) = read(tmp_path / name, text="nothing")
        assert fault.code == "text-missing" and "note.text" in str(fault) and "lang" in str(fault)


def test_dates_that_python_does_not_hold(tmp_path: Path) -> None:
    days = pyarrow.array([2**30, 0, 5], pyarrow.date32())
    zone = pyarrow.array([0, None, 0], pyarrow.timestamp("us", tz="Mars/X"))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", "b", "c"], "day": days, "at": zone}), tmp_path / "a.parquet"
    )
    fault, *rest = read(tmp_path / "a.parquet", id="day")
    assert fault.code == "not-readable" and "row 1: `day`" in str(fault)
    assert texts(rest) == ["b", "c"] and rest[0].id == "1970-01-01"
    fault, one, other = read(tmp_path / "a.parquet", group="at")
    assert "row 1: `at`" in str(fault) and one.group is None and other.code == "not-readable"


def test_null_text_is_told_alike_in_every_format(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": None}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("n,text\n1,one\n2,\n3,two\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        counts = prepare([str(tmp_path / name)], tokenizer, tmp_path / f"out-{name}", processes=1).sources[name]
        assert (counts["documents"], counts["empty"]) == (2, 1)


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffune\r\ndeux\n\ntrois".encode())
    assert texts(read(tmp_path / "a.txt", lines=True)) == ["une", "deux", "trois"]
    assert texts(read(tmp_path / "a.txt")) == ["une\r\ndeux\n\ntrois"]
    (tmp_path / "a.txt").write_text("x\n" * 1002)
    notes = Notes()
    assert len(read(tmp_path / "a.txt", notes)) == 1 and "--lines" in notes.lines()[0]


@pytest.mark.parametrize(
    ("name", "content", "code", "position"),
    [
        ("a.csv", 'text\nfine\n"never closed\nmore\n' + "line\n" * 9, "csv-invalid", "line 3"),
        ("a.csv", "text,b\none,1\ntwo\nthree,3\n", "csv-invalid", "line 3"),
        ("a.csv", "a,text,text\n1,2,3\n", "text-missing", "text"),
        ("a.csv", "TEXT;b\none;1\n", "text-missing", "did you mean `TEXT`?"),
        ("a.jsonl", '{"note": {"body": "x"}, "id": 1}\n', "text-missing", "note.body, id"),
        ("a.jsonl", '{"text": "one"}\n{"text": ' + "[" * 10_000 + "\n", "not-json", "line 2"),
        ("a.jsonl", '{"text": ' + "1" * 5_000 + "}\n", "not-json", "line 1"),
        ("a.json", '[{"text": "one"}, {"text": "two"', "not-json", "item 1"),
        ("a.json", '[{"text": "one"}, {"text": 2}]', "text-not-a-string", "item 2"),
        ("a.json", '[{"text": "one"} {"text": "two"}]', "not-json", "item 0"),
        ("a.json", '[{"text": "one"}] [{"text": "two"}]', "not-json", "item 1"),
        ("a.json", '[{"text": ' + "[" * 100_000 + "]", "not-json", "item 0"),
        ("a.csv", 'id,text\n1,"he said \\"hi\\" today"\n2,"plain"\n', "csv-invalid", "escape="),
        ("a.jsonl", '{"text": ["one", "two"]}\n', "text-not-a-string", "list"),
    ],
)
def test_bad_records_are_named(name: str, content: str, code: str, position: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    faults = [record for record in read(tmp_path / name) if isinstance(record, InputError)]
    assert len(faults) == 1 and faults[0].code == code
    assert name in str(faults[0]) and position in str(faults[0])


def test_a_json_file_of_one_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "one"}, indent=1))
    assert texts(read(tmp_path / "a.json")) == ["one"]


@pytest.mark.parametrize("member", ["../a.txt", "/etc/a.txt", "x/../../a.txt"])
def test_an_archive_that_climbs_out_of_its_folder(member: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member, "text")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(member), io.BytesIO(b""))
    for name in ("a.zip", "a.tar"):
        with refused("unsafe-member", name):
            list(read_texts(tmp_path / name))


def pack(folder: Path) -> list[Path]:
    """The files of a folder in a zip, a tar and a compressed tar."""
    names = [f"{folder}.zip", f"{folder}.tar", f"{folder}.tar.gz"]
    with zipfile.ZipFile(names[0], "w") as archive, tarfile.open(names[1], "w") as tar:
        tar.add(folder, ".")
        for path in sorted(folder.rglob("*")):
            archive.write(path, str(path.relative_to(folder)))
    Path(names[2]).write_bytes(gzip.compress(Path(names[1]).read_bytes()))
    return [Path(name) for name in names]


def save_dataset(folder: Path) -> None:
    """A saved Hugging Face dataset of two splits, each with a cache beside it."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for name, text in (("data-0.arrow", split), ("cache-1.arrow", "cached")):
            rows = pyarrow.table({"text": [text]})
            with pyarrow.ipc.new_stream(str(folder / split / name), rows.schema) as writer:
                writer.write_table(rows)
        (folder / split / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
        (folder / split / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def test_an_archive_is_read_as_its_folder(tmp_path: Path) -> None:
    """Splits, saved datasets, caches, hidden files and columns of folders; a test set was training text."""
    (tmp_path / "plain").mkdir()
    for name in ("train-0.jsonl", "test-0.jsonl", "_x/y.jsonl", "year=2020/what?.jsonl", "cache-1.arrow"):
        (tmp_path / "plain" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "plain" / name).write_text(jsonl([{"text": name}]))
    save_dataset(tmp_path / "saved" / "notes")
    for folder in ("plain", "saved"):
        for archive in pack(tmp_path / folder):
            for split in (None, "train", "test"):
                expected = texts(read(tmp_path / folder, split=split))
                assert sorted(texts(read(archive, split=split))) == sorted(expected)
            (fault,) = [one for one in read(archive, split="dev") if isinstance(one, InputError)]
            assert fault.code == "no-such-split" and archive.name in str(fault)
            notes = Notes()
            read(archive, notes)
            assert any("not read: split test" in line or "not test" in line for line in notes.lines())
    (tmp_path / "plain" / "train-0.jsonl").rename(tmp_path / "plain" / "valid.jsonl")
    for archive in pack(tmp_path / "plain"):
        (fault,) = read(archive)
        assert fault.code == "dataset-splits" and fault.key == "--split" and archive.name in str(fault)
    (tmp_path / "saved" / "notes" / "train" / "data-0.arrow").unlink()
    for archive in pack(tmp_path / "saved"):
        assert [fault.code for fault in read(archive)] == ["dataset-incomplete"]


def test_a_tar_with_a_negative_size_ends(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.size = -512
    (tmp_path / "a.tar").write_bytes(tar_member("b.txt", b"b") + info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    first, *_, fault = read(tmp_path / "a.tar")
    assert first.text == b"b" and fault.code == "not-readable"


def test_columns_of_folders_in_an_archive(tmp_path: Path) -> None:
    (tmp_path / "in" / "year=2020").mkdir(parents=True)
    (tmp_path / "in" / "year=2020" / "part-0.jsonl").write_text(jsonl([{"text": "a"}]))
    for archive in pack(tmp_path / "in"):
        assert [one.group for one in read(archive, group="year")] == ["2020"]


def test_an_archive_with_names_of_windows(tmp_path: Path) -> None:
    for member, found in (("notes\\a.txt", "text"), ("notes\\..\\..\\a.txt", "unsafe-member")):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("notes\\", "")
            archive.writestr(member, "text")
        (one,) = read(tmp_path / "a.zip")
        assert (one.code if isinstance(one, InputError) else one.text.decode()) == found


def test_members_that_are_not_read_and_archives_that_are_cut_off(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.TXT", ".hidden.txt", "b.doc", "c.zip", "d.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    notes = Notes()
    assert texts(read(tmp_path / "a.tar", notes)) == ["abc", "abc"]
    assert len(notes.lines()) == 3 and all(line.startswith("not read: ") for line in notes.lines())
    whole = (tmp_path / "a.tar").read_bytes()
    for size in (1024, 1200, 4 * 1024):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with refused("not-readable", "a.tar"):
            list(read_texts(tmp_path / "a.tar"))


def test_a_folder_of_all_kinds(tmp_path: Path) -> None:
    """Each file is read once, and each kind that is not read has its line."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "x.jsonl").mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "x.jsonl" / "part-00000").write_text('{"text": "spark"}\n')
    (folder / "x.jsonl" / "_SUCCESS").touch()
    (folder / "notes.doc").touch()
    (folder / "more.doc").touch()
    (folder / "cache-1.arrow").touch()
    (folder / ".hidden.jsonl").write_text('{"text": "hidden"}\n')
    (folder / "dangling.txt").symlink_to("nowhere")
    (folder / "again.jsonl").symlink_to("a.jsonl")
    (folder / "circle").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("far")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.txt")
    notes = Notes()
    files = find_inputs([str(folder), str(folder / "a.jsonl")], Reading(), notes)
    assert [text.text for file in files for text in read_texts(file)] == [b"a", b"far", b"spark"]
    lines = "\n".join(notes.lines())
    for kind in (".doc", "cache-*.arrow", "hidden", "link", "special"):
        assert f"not read: {kind} (" in lines
    assert "2 files" in next(line for line in notes.lines() if ".doc" in line) and "read once" in lines
    with refused("not-read", ".doc", key="--strict"):
        notes.require_all_read()
    with refused("no-text-files", ".txt"):
        find_inputs([str(folder / "sub")], Reading(), Notes())
    matched = find_inputs([str(folder / "**" / "*.txt")], Reading(), Notes())
    assert [file.path.name for file in matched if file.path] == ["far.txt"]
    with refused("no-such-file", "*.xyz"):
        find_inputs([str(folder / "*.xyz")], Reading(), Notes())


def test_splits(tmp_path: Path) -> None:
    """The training split of a snapshot of the hub is read, unless another is asked for."""
    for split in ("train", "validation", "test"):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": [split]}), path)

    def found(*references: str, split: str | None = None) -> list[str]:
        files = find_inputs([str(tmp_path / name) for name in references], Reading(split=split), Notes())
        return [text.text.decode() for file in files for text in read_texts(file)]

    assert found("data") == found("data/*.parquet") == ["train"]
    assert found("data", split="test") == ["test"] and found("data", split="validation") == ["validation"]
    with refused("no-such-split", "test, train, validation", key="--split"):
        found("data", split="dev2")
    (tmp_path / "data" / "train-00000-of-00001.parquet").unlink()
    with refused("dataset-splits", "test, validation", key="--split"):
        found("data")


def test_standard_input_and_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(gzip.compress(b'{"text": "from a pipe"}\n'))

    monkeypatch.setattr(sys, "stdin", Stdin)
    (file,) = find_inputs(["-"], Reading(), Notes())
    assert [text.text for text in read_texts(file)] == [b"from a pipe"] * 1 and file.source == "stdin"
    Stdin.buffer = io.BytesIO(b"text;n\none;1\n")
    with refused("unknown-format", key="--format"):
        find_inputs(["-"], Reading(), Notes())
    os.mkfifo(tmp_path / "fifo")
    writer = subprocess.Popen(["sh", "-c", f"printf 'text;n\\none;1\\n' > {tmp_path}/fifo"])
    (file,) = find_inputs([str(tmp_path / "fifo")], Reading(format="csv"), Notes())
    assert writer.wait() == 0 and [text.text for text in read_texts(file)] == [b"one"]


def test_remote_text(tmp_path: Path) -> None:
    """The file system in memory of fsspec stands for every store."""
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("train-0.jsonl", "test-0.jsonl"):
        system.pipe(f"/bucket/{name}", json.dumps({"text": name}).encode())
    system.pipe("/bucket/a.parquet.bak", b"")
    notes = Notes()
    for reference in ("memory://bucket", "memory://bucket/*.jsonl", "memory://bucket/train-0.jsonl"):
        files = find_inputs([reference], Reading(), notes)
        assert [text.text for file in files for text in read_texts(file)] == [b"train-0.jsonl"]
    assert any(".bak" in line for line in notes.lines())
    for reference, code in (("memory://bucket/none.txt", "no-such-file"), ("pipe://touch", "unknown-scheme")):
        with refused(code, reference):
            find_inputs([reference], Reading(), Notes())


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_with_and_without_ranges(ranges: bool, tmp_path: Path) -> None:
    """Files longer than a block, and formats that are read from any place."""
    pytest.importorskip("aiohttp")
    rows = [{"text": letter * 3_000_000} for letter in "abc"]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    for name, kind in (("a.zip", zipfile.ZIP_STORED), ("small.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / name, "w", kind) as archive:
            archive.write(tmp_path / "a.jsonl", "a.jsonl")

    class Server(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            content, asked = (tmp_path / self.path.lstrip("/")).read_bytes(), self.headers.get("Range")
            start, end = (int(place) for place in (asked or "bytes=0-99999999").removeprefix("bytes=").split("-"))
            part = content[start : end + 1] if ranges else content
            self.send_response(206 if ranges and asked else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the reader has what it needs
                self.wfile.write(part if self.command == "GET" else b"")

        do_HEAD = do_GET  # noqa: N815

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for name in ("a.jsonl", "a.zip", "small.zip"):
            (file,) = find_inputs([f"http://127.0.0.1:{server.server_port}/{name}"], Reading(), Notes())
            records = list(read_records(file, Reading(), Notes()))
            assert [(text[0], len(text)) for text in texts(records)] == [(letter, 3_000_000) for letter in "abc"]
            assert file.size * 0.9 < records[-1].position <= file.size
        server.shutdown()


PARTS = ("train", "test", "split=train", "split=test", ".hidden", "_tmp", "year=2020", "year-1")
FILES = ("part-0.jsonl", "train-0.jsonl", "test-0.jsonl", ".x.jsonl", "_x.jsonl", "notes.txt", "notes.ann", "a.bin")


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(PARTS), max_size=2), st.sampled_from(FILES)).map(
            lambda parts: "/".join([*parts[0], parts[1]])
        ),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
def test_a_remote_folder_is_read_as_a_local_one(names: list[str]) -> None:
    """The same splits are chosen, the same files are hidden, and the order is the same."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, "top", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            system.pipe(f"/top/{name}", b"")
        found, notes = [], []
        for reference, top in ((f"{folder}/top", f"{folder}/top/"), ("memory://top", "memory:///top/")):
            said = Notes()
            try:
                found.append([file.name.removeprefix(top) for file in find_inputs([reference], Reading(), said)])
            except InputError as error:
                found.append(error.code)
            notes.append(said.lines())
        assert found[0] == found[1], notes


@pytest.mark.parametrize(
    ("log", "table"),
    [
        ("_delta_log/00000000000000000000.json", "a Delta table"),
        (".hoodie/hoodie.properties", "a Hudi table"),
        ("metadata/v1.metadata.json", "an Iceberg table"),
    ],
)
def test_a_table_with_versions_is_refused(log: str, table: str, tmp_path: Path) -> None:
    """Old files of such tables hold notes that were deleted."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    for name in ("notes/data/day=1/part-0.parquet", f"notes/{log}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
        system.pipe(f"/{name}", b"")
    below = ("notes", "no*", "notes/data", "notes/data/day=1", "notes/*/*/*.parquet", "notes/data/day=1/part-0.parquet")
    for reference in (str(tmp_path), *(f"{root}/{name}" for name in below for root in (tmp_path, "memory:/"))):
        with refused("table-with-versions", table):
            find_inputs([reference], Reading(), Notes())


def test_texts_have_the_columns_of_their_folders(tmp_path: Path) -> None:
    for patient in (1, 2):
        (tmp_path / f"patient={patient}").mkdir()
        (tmp_path / f"patient={patient}" / "a.txt").write_text(f"note {patient}")
    kept = read(tmp_path, where="patient == 1", group="patient")
    assert [(one.text, one.group) for one in kept if isinstance(one, Text)] == [(b"note 1", "1")]
    assert [one.code for one in read(tmp_path, where="ward == 1")] == ["text-missing"] * 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["medqa_train.jsonl", "medqa_test.jsonl"], ["medqa_train.jsonl"]),
        (["wiki.train/0.jsonl", "wiki.test/0.jsonl"], ["wiki.train/0.jsonl"]),
        (["train/0.jsonl", "eval/0.jsonl", "test.v2/0.jsonl"], ["train/0.jsonl"]),
        (["train0001.jsonl", "testing0001.jsonl", "labels.json"], ["labels.json", "train0001.jsonl"]),
        (["blood-test.txt", "fever.txt", "near-train.txt", "visit-eval.txt"], None),  # notes
        (["dataset_infos.json", "notes.jsonl"], ["notes.jsonl"]),
    ],
)
def test_names_that_tell_a_split(names: list[str], expected: list[str] | None, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [str(file.path.relative_to(tmp_path)) for file in find_inputs([str(tmp_path)], Reading(), Notes())]  # type: ignore[union-attr]
    assert found == (sorted(names) if expected is None else expected)


def test_format_of_a_table_that_is_called_txt(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("note\tid\nfever\t1\n")
    assert [one.text for one in read(tmp_path, format="tsv", text="note")] == [b"fever"]
    (tmp_path / "notes.csv").write_text("note\tid\nfever\t1\n")
    with refused("unknown-format", key="--format"):
        find_inputs([str(tmp_path / "notes.csv")], Reading(format="tsv"), Notes())


def test_columns_that_folders_name(tmp_path: Path) -> None:
    """Spark and Hive write the values of a column into the names of folders, and not into the files."""
    for folder, text in (("year=2019/ward=a%20b", "old"), ("year=2020/ward=__HIVE_DEFAULT_PARTITION__", "new")):
        (tmp_path / folder).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / folder / "part-0.parquet")
        (tmp_path / folder / "part-1.jsonl").write_text(jsonl([{"text": text, "ward": "own"}]))
    kept = read(tmp_path, where="year >= 2020", group="ward")
    assert [(one.text, one.group) for one in kept if isinstance(one, Text)] == [(b"new", None), (b"new", "own")]
    assert [one.group for one in read(tmp_path, group="ward")] == ["a b", "own", None, "own"]
    assert read(tmp_path, group="wards")[0].code == "text-missing"


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("score >= 3 and lang == 'fr'", True),
        ("not (score < 5)", True),
        ("lang in ('en', 'fr')", True),
        ("lang not in ['en']", True),
        ("0 <= score < 5", False),
        ("score == '7'", True),
        ("note.kind == 'x'", True),
        ("missing == null", True),
        ("missing > 3 or missing < 3", False),
        ("flag", False),
        ("score == -7", False),
        ("empty >= 0", False),
        ("empty == null and empty is null", True),
        ("lang is not 'fr'", False),
        ("deleted", False),
        ("deleted != true", True),
        ("not kept or kept == false", False),
        ("day >= '2020-01-01' and day != '2021-05-03'", False),
        ("day in ('2021-05-03',) and moment > '2021-05-03'", True),
        ("code == 'fr' and code in ('de', 'fr')", True),
        ("`note type` == 'discharge' and `class` == 3", True),
        ("dose_\u00b5g > 2 and lang != '`fr`'", True),
        ("consent or empty", False),
        ("not consent and score", True),
    ],
)
def test_where(expression: str, kept: bool) -> None:
    record = {"score": "7", "lang": "fr", "note": {"kind": "x"}, "missing": None, "flag": False, "empty": ""}
    record |= {"deleted": "False", "kept": "TRUE", "code": b"fr", "note type": "discharge", "class": "3"}
    record |= {
        "consent": "No",
        "day": date(2021, 5, 3),
        "moment": datetime(2021, 5, 3, 8, tzinfo=UTC),
        "dose_\u00b5g": 2.5,
    }
    assert parse_where(expression)(record) is kept


@pytest.mark.parametrize(
    "expression", ["lang in ('fr')", "lang == 'fr' or 'de'", "score not in 7", "('fr', 'de')", "1"]
)
def test_a_condition_that_says_something_else_than_it_means(expression: str) -> None:
    with refused("where-invalid", key="--where"):
        parse_where(expression)


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').system('true')", "score + 1 > 2", "(lambda: 1)()", "a[0] == 1", "f'{a}'", "", "a ==", "(" * 999],
)
def test_where_runs_no_code(expression: str) -> None:
    with refused("where-invalid", key="--where"):
        parse_where(expression)


def test_a_condition_on_a_column_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": 1}\n{"text": "y", "score": "high"}\n')
    missing, _ = read(tmp_path / "a.jsonl", where="scor > 1")
    assert missing.code == "text-missing" and "did you mean `score`?" in str(missing)
    for condition in ("score > 1", "'x' in score", "score"):
        unlike = read(tmp_path / "a.jsonl", where=condition)[condition.startswith("score")]
        assert unlike.code == "where-invalid" and "line " in str(unlike)


def test_all_streams_of_a_compressed_file_are_read(tmp_path: Path) -> None:
    """Parallel compressors write many, zero bytes may stand between those of xz, and other bytes are a fault."""
    path = tmp_path / "a.jsonl"
    lines = [f'{{"text": "{n}"}}\n'.encode() for n in range(2000)]
    for suffix, compress in (("xz", lzma.compress), ("bz2", bz2.compress), ("zst", zstandard.compress)):
        streams = [compress(line) for line in lines]
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes((b"\0" * 4 if suffix == "xz" else b"").join(streams) + b"\0" * 512)
        assert texts(read(path)) == [str(n) for n in range(2000)]
        for rest in (b"rubbish", streams[0][:-9], b"BZi" + streams[1][3:]):
            path.write_bytes(streams[0] + rest)
            *_, fault = read(path)
            assert fault.code == "not-readable", (suffix, rest)


def test_spaces_after_the_delimiters_of_a_table_belong_to_no_cell(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id, text, lang\n1, hello, fr\n2, "by, e", en\n3,  x, en\n')
    (tmp_path / "b.csv").write_text("id,text, lang\n1, kept,fr\n")
    assert texts(read(tmp_path / "a.csv")) == ["hello", "by, e", "x"]
    kept = [record for record in read(tmp_path / "a.csv", where='lang != "en"') if isinstance(record, Text)]
    assert [record.text for record in kept] == [b"hello"]
    assert texts(read(tmp_path / "b.csv")) == [" kept"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_a_later_one_replaces_is_not_read(tmp_path: Path) -> None:
    """As when the archive is unpacked; `tar --update` appends."""
    members = (("a.txt", b"old"), ("b.txt", b"other"), ("a.txt", b"new"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    tar = b"".join(tar_member(*member) for member in members) + TAR_END
    (tmp_path / "a.tar").write_bytes(tar)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar))
    for name in ("a.zip", "a.tar", "a.tar.gz"):
        notes = Notes()
        assert texts(read(tmp_path / name, notes)) == ["other", "new"]
        assert "replaced" in "\n".join(notes.lines())


def test_shards_of_another_text_or_reading_are_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """They are used as they are, so a condition that they do not follow is refused."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x", "lang": "fr"}\n{"text": "y", "lang": "en"}\n')

    def source(name: str, **reading: str) -> dict[str, object]:
        return {
            "name": "s",
            "text": str(tmp_path / f"{name}.jsonl"),
            "shards": str(tmp_path / "out"),
            "reading": reading,
        }

    said: list[str] = []

    def prepared(entry: dict[str, object]) -> int:
        said.clear()
        ensure_prepared(Data.model_validate({"sources": [entry]}), tokenizer, None, said.append)
        return len(said)

    french, english = ({"where": f'lang == "{lang}"'} for lang in ("fr", "en"))
    assert (prepared(source("a", **french)), prepared(source("a", **french))) == (0, 0)
    with refused("other-reading", key="data.sources.reading"):
        prepared(source("a", **english))
    assert prepared(source("b", **french)) == 1 and "b.jsonl is not read" in said[0]
    assert prepared(source("a")) == 1 and "fr" in said[0]
    assert read_manifest(tmp_path / "out").documents == 1


def test_control_characters_and_detected_encodings_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"plain " * 200 + b"\0" * 200)
    (tmp_path / "b.txt").write_bytes("d\x93\xe9j\xe0 vu, le patient l'a dit".encode("latin-1"))
    (tmp_path / "c.jsonl").write_text('{"text": "a\\u0007b"}\n{"text": "\\ud800"}\n')
    notes = Notes()
    read(tmp_path, notes)
    lines = "\n".join(notes.lines())
    for says in ("NUL characters in the text, kept: ", "encoding cp1252", "control characters", "lone surrogate"):
        assert says in lines
    (tmp_path / "d.txt").write_bytes(bytes(range(256)) * 9)
    with refused("not-utf8", "d.txt"):
        list(read_texts(tmp_path / "d.txt", Reading(encoding="utf-8")))
    with refused("unknown-encoding", key="--encoding"):
        list(read_texts(tmp_path / "a.txt", Reading(encoding="utf-81")))


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_utf8_is_never_taken_for_anything_else(text: str) -> None:
    if "\0" not in text:
        assert str(detect_encoding(text.encode())).startswith("utf-8")


FRENCH = "Le patient présente une fièvre élevée depuis 3 jours, traité par amoxicilline."


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "object.json"])
@pytest.mark.parametrize("encoding", [None, "utf8"])
def test_a_damaged_character_of_utf8_costs_its_record_alone(name: str, encoding: str | None, tmp_path: Path) -> None:
    """It was taken for a sign of another encoding, which made every other accent wrong."""
    rows = [{"text": f"{n} {FRENCH}"} for n in range(40)]
    lines = {
        "a.jsonl": jsonl(rows),
        "a.json": json.dumps(rows, ensure_ascii=False),
        "a.csv": "text\n" + "".join(f'"{row["text"]}"\n' for row in rows),
        "object.json": json.dumps({"text": FRENCH * 3}, indent=1, ensure_ascii=False),
    }
    content = lines[name].encode()
    at = content.index("é".encode(), len(content) // 2)
    (tmp_path / name).write_bytes(content[: at + 1] + content[at + 2 :])
    records = read(tmp_path / name, encoding=encoding)
    faults = [record for record in records if isinstance(record, InputError)]
    assert [fault.code for fault in faults] == ["not-utf8"] and "--encoding" not in str(faults[0])
    assert all(FRENCH in text for text in texts([record for record in records if record not in faults]))
    assert len(records) == (1 if name == "object.json" else 40)


def test_damaged_utf8_is_told_from_legacy_encodings(tmp_path: Path) -> None:
    assert detect_encoding(FRENCH.encode() * 3 + "é".encode()[:1]) == "utf-8"
    for text, codec in (
        (FRENCH, "latin-1"),
        ("患者は三日前から発熱と咳があり", "shift_jis"),
        ("患者三天前出现发热和咳嗽", "gbk"),
        ("환자는 3일 전부터 발열과 기침이", "euc-kr"),
        ("Пациент жалуется на боль в груди", "cp1251"),
    ):
        for size in range(2, len(text)):
            assert text[:size].isascii() or not is_utf8(text[:size].encode(codec)), (text[:size], codec)
    late = jsonl([{"text": "plain " * 200}] * 1000) + jsonl([{"text": FRENCH}])
    (tmp_path / "a.jsonl").write_bytes(late.encode("latin-1"))  # beyond the first megabyte, so nothing told it
    *_, fault = read(tmp_path / "a.jsonl")
    assert fault.code == "not-utf8" and "--encoding cp1252" in str(fault)


def test_equally_likely_encodings_are_western() -> None:
    spanish = (
        "Paciente varón de 63 años con disnea súbita, dolor torácico opresivo y edema. Se solicitó ecocardiografía, "
        "evolución favorable. Niño, señal."
    )
    polish = "Pacjent z bólem w klatce piersiowej, dusznością, gorączką i wymiotami. Żółtaczka, świąd skóry, źrenice."
    for text, codec in ((spanish, "latin-1"), (FRENCH, "latin-1"), (polish, "cp1250")):
        content = "\n".join(f"{n} {text}" for n in range(30)).encode(codec)
        assert content.decode(str(likely_codec(content))) == content.decode(codec)


def test_the_mark_of_a_given_encoding_is_no_text(tmp_path: Path) -> None:
    for codec in ("utf-8", "utf-16-le"):
        (tmp_path / "a.txt").write_bytes("\ufeffa".encode(codec))
        assert texts(read(tmp_path / "a.txt", encoding=codec)) == ["a"]


def test_zstandard_with_a_long_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=False)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # writes the window, not the size
    (tmp_path / "a.txt.zst").write_bytes(frame.compress(b"long") + frame.flush())
    assert texts(read(tmp_path / "a.txt.zst")) == ["long"]


def test_items_of_an_array_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    rows = [{"text": letter * 700_000} for letter in "abé"] + [{"text": "d" * 3_000_000}]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
    found = texts(read(tmp_path / "a.json"))
    assert [(set(text), len(text)) for text in found] == [(set(row["text"]), len(row["text"])) for row in rows]


def test_short_western_text_is_windows_1252() -> None:
    for text in ("déjà vu", "It\u2019s the patient\u2019s \u201cnote\u201d, 5 €", "naïve café"):
        assert likely_codec(text.encode("cp1252")) == "cp1252"


BAD = "".join(
    json.dumps({"text": f"note {n}, the patient is well"}) + "\n" if n % 400 else "{no json\n" for n in range(1, 2400)
)


def test_faults_are_skipped_and_counted_or_named_at_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(BAD)
    with refused("not-json", "10 or more faults"):
        prepare([str(tmp_path)], tokenizer, tmp_path / "stop", processes=1)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(BAD.encode())[:-9])
    with refused("not-readable", "c.jsonl.gz"):  # found before any text is tokenized
        prepare([str(tmp_path)], tokenizer, tmp_path / "stop2", processes=1)
    said: list[str] = []
    reading = Reading(on_error="skip")
    options = {"reading": reading, "report": said.append}
    manifest = prepare([str(tmp_path / "a.jsonl"), str(tmp_path)], tokenizer, tmp_path / "out", processes=1, **options)
    assert manifest.sources["a.jsonl"]["faulty"] == 5 and manifest.sources["a.jsonl"]["documents"] == 2394
    assert sum("line 400:" in line for line in said) == 2 and any("c.jsonl.gz" in line for line in said)
    assert read_manifest(tmp_path / "out") == manifest
    prepare([str(tmp_path / "a.jsonl"), str(tmp_path)], tokenizer, tmp_path / "two", reading=reading, processes=2)
    assert digests(tmp_path / "out") == digests(tmp_path / "two")


def test_a_repaired_line_costs_only_its_shard(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards before the fault are kept, and a change that follows makes only its own shard again."""
    monkeypatch.setattr(datapipe.prepare, "SHARD_TEXT", 9_000)
    good = [json.dumps({"text": f"note {n:04}, the patient is well"}) + "\n" for n in range(2000)]
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("".join([*good[:1800], "{\n", *good[1800:]]))
    with refused("not-json", "line 1801"):
        prepare([str(path)], tokenizer, output, processes=1)
    made = {file.name: file.stat().st_ino for file in output.glob("*.tar")}
    assert len(made) >= 4 and (output / JOURNAL).exists()
    path.write_text("".join([good[0].replace("well", "sick"), *good[1:]]))
    prepare([str(path)], tokenizer, output, processes=1)
    kept = [name for name, inode in made.items() if (output / name).stat().st_ino == inode]
    assert sorted(kept) == sorted(made)[1:]
    prepare([str(path)], tokenizer, tmp_path / "fresh", processes=1)
    assert digests(output) == digests(tmp_path / "fresh")


def test_held_out_by_group(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """No patient has notes on both sides."""
    rows = [{"text": f"note {n} of patient {n % 40}", "subject_id": n % 40} for n in range(400)]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    selection = Selection(held_out=0.25)
    reading = Reading(group="subject_id", id="subject_id")
    prepare([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "out", selection=selection, reading=reading, processes=1)
    train, held_out = (read_manifest(folder).documents for folder in (tmp_path / "out", tmp_path / "out" / HELD_OUT))
    assert train % 10 == held_out % 10 == 0 and 0 < held_out < 200 and train + held_out == 400


def test_many_files_are_one_source(tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = [tmp_path / f"{n}.txt" for n in range(12)]
    for name in names:
        name.write_text(f"note {name.stem}")
    manifest = prepare([str(name) for name in names], tokenizer, tmp_path / "out", processes=1)
    assert list(manifest.sources) == [tmp_path.name] and manifest.documents == 12


def test_a_recipe_names_its_columns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("note_text;lang\nun;fr\none;en\n")
    source = {"name": "a", "text": str(tmp_path / "a.csv"), "shards": str(tmp_path / "out")}
    data = Data(sources=[{**source, "reading": {"text": "note_text", "where": "lang == 'fr'"}}])
    ensure_prepared(data, tokenizer)
    assert read_manifest(tmp_path / "out").sources["a.csv"]["filtered"] == 1


def test_the_command(tmp_path: Path) -> None:
    """Names that no terminal can print, options that are wrong, and what is not read."""
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)  # noqa: PTH102
    for name, content in ((b"caf\xe9.csv", "note_text\nun café\n"), ("患者.csv".encode(), "note_text\ndeux\n")):
        with open(os.path.join(folder, name), "w") as file:  # noqa: PTH118, PTH123
            file.write(content)
    (tmp_path / "in" / "a.doc").touch()
    base = ["prepare", str(tmp_path / "in"), "--tokenizer", "package://tokenizer/modernbert", "--processes", "1"]
    options = ["--text", "note_text", "--output", str(tmp_path / "out")]
    strict = CliRunner().invoke(app, [*base, *options, "--strict"])
    assert isinstance(strict.exception, InputError) and strict.exception.code == "not-read"
    result = CliRunner().invoke(app, [*base, *options])
    assert result.exit_code == 0, result.output
    assert "not read: .doc" in result.output and "on disk" in result.output
    assert (tmp_path / "out" / NAME).exists()
    assert CliRunner().invoke(app, [*base, *options, "--on-error", "maybe"]).exit_code == 2


def words(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{chr(97 + number % 26)}{number * 7919 % 10007}" for number in rng.zipf(1.3, count) % 3000]


def test_near_duplicates(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies with a tenth of the words replaced are found, unrelated notes kept, by any number of processes."""
    monkeypatch.setattr(datapipe.near_duplicates, "SMALL", 1000)
    rng = np.random.default_rng(1)
    notes = [words(seed, 120) for seed in range(300)]
    copies = []
    for number in range(100):
        copy = list(notes[number])
        for place in rng.choice(len(copy), len(copy) // 10, replace=False):
            copy[place] = f"other{rng.integers(10**6)}"
        copies.append(copy)
    (tmp_path / "a.jsonl").write_text(jsonl([{"text": " ".join(note)} for note in notes]))
    (tmp_path / "b.jsonl").write_text(jsonl([{"text": " ".join(note)} for note in copies]))
    inputs, selection = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")], Selection(near_dedup=0.8)
    one, two = (
        prepare(inputs, tokenizer, tmp_path / str(processes), selection=selection, processes=processes)
        for processes in (1, 2)
    )
    assert one.sources["b.jsonl"]["near-duplicates"] >= 95 and one.sources["a.jsonl"]["documents"] >= 298
    assert one == two and digests(tmp_path / "1") == digests(tmp_path / "2")


def test_near_duplicates_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of an interrupted preparation is kept, for exactly the same files."""
    (tmp_path / "a.jsonl").write_text(jsonl([{"text": "the same note of the same patient"}] * 3 + [{"text": ""}] * 2))
    files = find_inputs([str(tmp_path / "a.jsonl")], Reading(), Notes())
    first = near_duplicates(files, Reading(), 0.8, tmp_path, 1)
    assert first.tolist() == [False, True, True, False, False]
    monkeypatch.setattr(datapipe.near_duplicates, "signatures", None)
    assert near_duplicates(files, Reading(), 0.8, tmp_path, 1).tolist() == first.tolist()
    with pytest.raises(TypeError):
        near_duplicates(files, Reading(), 0.7, tmp_path, 1)


def test_near_duplicates_of_a_remote_file_that_was_replaced(tmp_path: Path) -> None:
    """The new file has the same name and as many bytes."""
    import fsspec

    system = fsspec.filesystem("memory")
    for second, expected in (("aa", [False, True]), ("bb", [False, False])):
        system.pipe(
            "/near/a.jsonl", jsonl([{"text": "aa aa aa aa"}, {"text": f"{second} {second} {second} {second}"}]).encode()
        )
        files = find_inputs(["memory://near"], Reading(), Notes())
        assert near_duplicates(files, Reading(), 0.8, tmp_path, 1).tolist() == expected


def test_a_group_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    """A patient's number is a float in tables with nulls, and must not fall on both sides for that."""
    rows = [{"text": "a", "g": value} for value in (1, 1.0, "1", " 1 ", "1.0", None, "", float("nan"), "01", [1])]
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(rows))
    *same, other, fault = read(path, group="g")
    assert [text.group for text in same] == ["1"] * 5 + [None] * 3
    assert other.group == "01"
    assert fault.code == "group-invalid"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", b"sep=;\r\ntext;id\r\na;1\r\n", ["a"]),
        ("a.csv", b"id; text \n1;a\n2;\\N\n3;b\n", ["a", "", "b"]),
        ("a.csv", b'text,id\r\na,1\nb,2\rc,3\r\n"d\r\ne",4\n', ["a", "b", "c", "d\r\ne"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text":"a"}\n', ["a"]),
        ("a.csv", b"PK\x03\x04 and so on", "not-text"),
        ("a.csv", b"PAR1 and so on", "not-text"),
        ("a.txt", b"%PDF-1.4 and so on", "not-text"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n", "not-text"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n", "not-readable"),
        ("a.json", b'\n\n{\n "text": "a"\n}\n', ["a"]),
        ("a.json", b'[{"text": "a", "x": NaN}, {"text": "b", "x": -Infinity}]', ["a", "b"]),
        ("a.json", b'[{"text": "a", "x": 123456789012345678901234567890}]\n', ["a"]),
        ("a.json", b" [ ] ", []),
        ("a.tsv", b'id\ttext\n1\t"a\nb"\n2\t"c\td"\n3\t"e\nf\tg\nh"\n', ["a\nb", "c\td", "e\nf\tg\nh"]),
        ("a.tsv", b'id\ttext\n1\t"Douleur\n2\tplain\n\n3\tfin"\n', "csv-invalid"),
        ("a.tsv", b'text\tid\r\n"Douleur\t1\r\nfin"\t2\r\n', "csv-invalid"),
    ],
)
def test_what_programs_write(name: str, content: bytes, found: list[str] | str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    records = read(tmp_path / name)
    assert (records[0].code if isinstance(found, str) else texts(records)) == found


def test_files_without_a_record_are_told(tmp_path: Path) -> None:
    notes = Notes()
    for name, content in (("a.csv", "text,id\n"), ("a.json", "[]"), ("a.jsonl", "")):
        (tmp_path / name).write_text(content)
        assert not read(tmp_path / name, notes)
    assert any("no record" in line and "3 " in line for line in notes.lines())


def test_null_objects_have_null_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl([{"doc": None}, {"doc": {"text": "a"}}]))
    assert texts(read(tmp_path / "a.jsonl", text="doc.text")) == ["", "a"]


def test_a_file_that_grows_while_it_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl([{"text": "a"}]))
    files = find_inputs([str(path)], Reading(), Notes())
    path.write_text(jsonl([{"text": "a"}, {"text": "b"}]))
    with refused("text-changed", "a.jsonl"):
        list(blocks(files, 2**20, Selection(), Reading(), Intake(), Notes()))


def test_a_member_that_is_encrypted_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    (fault,) = read(path)
    assert fault.code == "not-readable"
    assert "a.txt" in str(fault)
    assert "password" in str(fault)
