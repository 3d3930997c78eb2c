"""The same text gives the same bytes: at any number of processes, after any interruption, in any format."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from typer.testing import CliRunner

import datapipe.prepare
import launcher.status_line
from configs.errors import InputError
from configs.files import partial_path
from configs.schema import Data
from datapipe.inputs import JOURNAL
from datapipe.manifest import NAME, read_manifest, verify
from datapipe.paths import local_path
from datapipe.prepare import ensure_prepared, prepare
from datapipe.selection import HELD_OUT, DigestSet, Selection
from datapipe.shard_report import inspect_shards
from datapipe.shards import ShardReader
from datapipe.text import read_texts
from datapipe.tokenizer import Tokenizer
from launcher.cli import app
from tests.datapipe.conftest import refused

TICO = "package://corpus/tico19_en.jsonl.gz"


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def documents(directory: Path) -> list[list[int]]:
    result = []
    for shard in read_manifest(directory).shards:
        reader = ShardReader((directory / shard.name).open("rb", buffering=0), shard.name)
        result += [reader.ids(number).tolist() for number in range(len(reader))]
    return result


def lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [text.text.decode() for text in read_texts(local_path(TICO))]
    path = tmp_path_factory.mktemp("corpus") / "tico.jsonl"
    return lines(path, [{"id": number, "text": text} for number, text in enumerate(texts)])


@pytest.fixture(scope="module", autouse=True)
def _small_shards() -> Iterator[None]:
    """Three shards for half a megabyte, and worker processes even for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datapipe.prepare, "SHARD_TEXT", 200_000)
        patch.setattr(datapipe.prepare, "SMALL", 100_000)
        yield


@pytest.fixture(scope="module")
def prepared(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "shards"
    manifest = prepare([str(corpus)], tokenizer, output, processes=1)
    assert len(manifest.shards) == 3
    return output


def test_what_is_prepared_is_the_text(corpus: Path, prepared: Path, tokenizer: Tokenizer) -> None:
    texts = [text.text.decode() for text in read_texts(corpus)]
    bare = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    assert documents(prepared) == [encoding.ids for encoding in bare]
    assert verify(prepared) == []
    report = inspect_shards(prepared)
    assert report.manifest.documents == len(texts) == len(report.lengths)
    lengths = [len(encoding.ids) for encoding in bare]
    kept = {"documents": len(texts), "tokens": sum(lengths), "longest": max(lengths)}
    assert report.manifest.sources == {"tico.jsonl": {**kept, "bytes": sum(len(text.encode()) for text in texts)}}
    assert report.samples and str(report)


def test_the_same_bytes_with_more_processes(corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare([str(corpus)], tokenizer, tmp_path / "shards", processes=3)
    assert digests(tmp_path / "shards") == digests(prepared)


def test_killed_and_run_again(corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """SIGKILL once the first shard is there; what is finished is not made again, and the end is the same."""
    output = tmp_path / "shards"
    program = (
        "import sys, datapipe.prepare as p; from pathlib import Path; from datapipe.tokenizer import load_tokenizer;"
        "p.SHARD_TEXT, p.SMALL = 200_000, 100_000;"
        "p.prepare([sys.argv[1]], load_tokenizer('package://tokenizer/modernbert'), Path(sys.argv[2]), processes=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(corpus), str(output)], start_new_session=True)
    journal = output / JOURNAL
    while process.poll() is None and not (journal.exists() and len(journal.read_text().splitlines()) >= 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (output / NAME).exists()
    while _session(process.pid):  # the workers notice that they are alone
        time.sleep(0.05)
    finished = json.loads(journal.read_text().splitlines()[1])[0]
    inode = (output / finished).stat().st_ino
    prepare([str(corpus)], tokenizer, output, processes=2)
    assert digests(output) == digests(prepared)
    assert (output / finished).stat().st_ino == inode


def _session(leader: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for process in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
            if os.getsid(process) == leader and state != "Z":
                found.append(process)
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found


def test_an_unfinished_output_of_other_settings(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("0" * 64 + "\n")
    with refused("other-preparation", key="--output"):
        prepare([str(corpus)], tokenizer, tmp_path)


@pytest.mark.parametrize("place", ["000000.tar", "held-out/000000.tar"])
def test_tars_of_others_are_left_alone(place: str, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(b"of others")
    with refused("other-tars", place, key="--output"):
        prepare([str(corpus)], tokenizer, tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["000000.tar"]


def test_a_finished_output_is_left_alone(prepared: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    before = digests(prepared)
    with refused("already-prepared", key="--output"):
        prepare([str(corpus)], tokenizer, prepared)
    assert digests(prepared) == before


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "arrow", "directory", "txt"])
def test_formats(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"id": str(n), "text": f"Élan vital, document {n}.\nsecond line"} for n in range(50)]
    (tmp_path / "in").mkdir()
    plain = lines(tmp_path / "in" / "a.jsonl", records)
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif kind == "jsonl.zst":
        half = plain.read_bytes().index(b'{"id": "25"')
        frames = [plain.read_bytes()[:half], plain.read_bytes()[half:]]
        path.write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif kind == "arrow":
        table = pyarrow.Table.from_pylist(records)
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif kind == "directory":
        path = tmp_path / "in"
        lines(path / "b.jsonl", records[:10])
        (path / "notes.md").write_text("not read")
    else:
        path = tmp_path / "one.txt"
        path.write_text(records[0]["text"])
    prepare([str(path)], tokenizer, tmp_path / "out", processes=1)
    expected = {"directory": records + records[:10], "txt": records[:1]}.get(kind, records)
    assert documents(tmp_path / "out") == [ids.tolist() for ids in tokenizer.encode([r["text"] for r in expected])]


def latin1_parquet() -> bytes:
    texts = pyarrow.array([b"fine", "déjà vu".encode("latin1")]).cast(pyarrow.string(), safe=False)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer)
    return buffer.getvalue()


def save_to_disk(folder: Path, texts: list[str]) -> None:
    """As `datasets` does, with a cache beside the rows as its `map` leaves one."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, part in zip([*names, "cache-b6c3f1.arrow"], [texts[:3], texts[3:], ["stale"]], strict=True):
        table = pyarrow.table({"text": part})
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_hugging_face_dataset_on_disk(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"row number {number}" for number in range(7)]
    save_to_disk(tmp_path / "both" / "train", texts)
    save_to_disk(tmp_path / "both" / "test", ["held", "out", "rows", "of", "another split"])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name, reference in (("whole", "both"), ("part", "both/train")):  # the training split by default
        prepare([str(tmp_path / reference)], tokenizer, tmp_path / name, processes=1)
        assert documents(tmp_path / name) == [ids.tolist() for ids in tokenizer.encode(texts)]
    (tmp_path / "both" / "train" / "data-00001-of-00002.arrow").unlink()
    with refused("dataset-incomplete", "data-00001-of-00002.arrow"):
        prepare([str(tmp_path / "both" / "train")], tokenizer, tmp_path / "again", processes=1)


@pytest.mark.parametrize(
    ("name", "content", "code", "position"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "not-json", "line 2"),
        ("a.jsonl", b'{"txt": "one"}\n', "text-missing", "line 1"),
        ("a.jsonl", b"[1]\n", "text-missing", "item 1"),
        ("a.jsonl", b'{"text": 3}\n', "text-not-a-string", "line 1"),
        ("a.jsonl", b'{"text": ""}\n', "nothing-to-prepare", ""),
        ("a.jsonl", b"", "nothing-to-prepare", ""),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 100, mtime=0)[:-12], "not-readable", ""),
        ("a.jsonl.gz", b"no gzip", "not-readable", ""),
        ("a.jsonl.zst", b"no zstandard", "not-readable", ""),
        ("a.parquet", b"no parquet", "not-readable", ""),
        ("a.arrow", b"no arrow", "not-readable", ""),
        ("a.doc", b"text\none\n", "unknown-format", ""),
        ("a.jsonl", b'{"text": "%s"}\n{"text": "d\xe9"}\n' % (b"x" * 2**20), "not-utf8", "line 2: byte 11"),
        ("a.parquet", latin1_parquet(), "not-utf8", "row 2"),
    ],
)
def test_bad_input_is_named(
    name: str, content: bytes, code: str, position: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        prepare([str(tmp_path / name)], tokenizer, tmp_path / "out", processes=1)
    assert error.value.code == code and name in str(error.value) and position in str(error.value)
    assert not (tmp_path / "out" / NAME).exists()


def test_missing_input_and_output_that_cannot_be_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with refused("no-such-file", "nowhere.jsonl"):
        prepare([str(tmp_path / "nowhere.jsonl")], tokenizer, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with refused("not-writable", str(tmp_path / "file" / "out")):
        prepare([TICO], tokenizer, tmp_path / "file" / "out")


def test_selection(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Duplicates, short and long documents are left out and counted; equal texts never stand on both sides."""
    texts = [f"document number {n} " + "word " * (n % 40) for n in range(400)]
    path = lines(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, *texts[:100], ""]])
    selection = Selection(dedup=True, min_tokens=10, max_tokens=30, held_out=0.25)
    prepare([str(path)], tokenizer, tmp_path / "out", selection=selection, processes=2)
    encoded = [ids.tolist() for ids in tokenizer.encode(texts)]
    kept = [ids for ids in encoded if 10 <= len(ids) <= 30]
    train, held_out = documents(tmp_path / "out"), documents(tmp_path / "out" / HELD_OUT)
    assert sorted(train + held_out) == sorted(kept)
    assert 0.15 < len(held_out) / len(kept) < 0.35
    train_counts, held_counts = (
        read_manifest(folder).sources["a.jsonl"] for folder in (tmp_path / "out", tmp_path / "out" / HELD_OUT)
    )
    assert train_counts["duplicates"] == 100
    short = sum(len(ids) < 10 for ids in encoded)
    assert train_counts["too short"] + held_counts["too short"] == short
    assert train_counts["too long"] + held_counts["too long"] == len(encoded) - len(kept) - short
    assert verify(tmp_path / "out") == verify(tmp_path / "out" / HELD_OUT) == []


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "before [MASK] and [SEP] after <|endoftext|>"}])
    prepare([str(path)], tokenizer, tmp_path / "out", processes=1)
    assert not set(documents(tmp_path / "out")[0]) & set(tokenizer.special_ids)


def test_a_long_document_is_tokenized_in_parts(tokenizer: Tokenizer) -> None:
    """More than a million characters: the same tokens as in one piece, which needs 100 times the memory."""
    text = "The striatum plays a pivotal role in modulating motor activity.\n" * 20_000
    whole = tokenizer.backend.encode(text, add_special_tokens=False).ids
    (parts,) = tokenizer.encode([text])
    np.testing.assert_array_equal(parts, whole)


def test_disk_full_is_told_and_can_be_continued(
    corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """/dev/full stands in for the disk: every write to it ends in ENOSPC."""
    output = tmp_path / "shards"
    output.mkdir()
    partial_path(output / "000001.tar").symlink_to("/dev/full")
    with refused("disk-full", str(output / "000001.tar")):
        prepare([str(corpus)], tokenizer, output, processes=1)
    prepare([str(corpus)], tokenizer, output, processes=1)
    assert digests(output) == digests(prepared)


def test_an_output_inside_the_input_and_a_source_called_dot(
    corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of an interrupted preparation are not input when it continues."""
    (tmp_path / "shards").mkdir()
    shutil.copy(corpus, tmp_path)
    partial_path(tmp_path / "shards" / "000001.tar").symlink_to("/dev/full")
    monkeypatch.chdir(tmp_path)
    with refused("disk-full"):
        prepare(["."], tokenizer, Path("shards"), processes=1)
    manifest = prepare(["."], tokenizer, Path("shards"), processes=1)
    assert documents(tmp_path / "shards") == documents(prepared)
    assert list(manifest.sources) == [tmp_path.name]


def test_disk_full_elsewhere(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    partial_path(tmp_path / "shards" / NAME).symlink_to("/dev/full")
    with refused("disk-full", NAME):
        prepare([str(corpus)], tokenizer, tmp_path / "shards", processes=1)
    with DigestSet(max_pages=9) as seen, pytest.raises(InputError) as error:
        for number in range(100_000):
            seen.add(hashlib.md5(b"%d" % number).digest())
    assert error.value.code == "disk-full" and "TMPDIR" in str(error.value)


def test_all_documents_left_out(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with refused("nothing-to-prepare", "3,071"):
        prepare([str(corpus)], tokenizer, tmp_path / "out", selection=Selection(min_tokens=10_000), processes=1)


def test_text_with_shards_that_cannot_be_made(tmp_path: Path) -> None:
    for shards in ("s3://bucket/corpus", "corpus/*.tar"):
        with pytest.raises(ValueError, match="prepared into a local directory"):
            Data(sources=[{"name": "a", "text": TICO, "shards": shards}])
        with pytest.raises(ValueError, match="prepared into a local directory"):
            Data(sources=[{"name": "a", "shards": "b"}], evaluation={"text": TICO, "shards": shards})


def test_the_command_says_what_became_of_each_source(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And how far it is, in lines where no terminal can show a changing one."""
    monkeypatch.setattr(launcher.status_line, "PLAIN_SECONDS", 0.0)
    options = ["--tokenizer", "package://tokenizer/modernbert", "--output", str(tmp_path / "out")]
    options += ["--processes", "1", "--min-tokens", "20", "--held-out", "0.1"]
    result = CliRunner().invoke(app, ["prepare", str(corpus), *options])
    assert result.exit_code == 0, result.output
    for says in (r"prepared 100% of ", r"out: \d,\d+ documents, ", r"out/held-out: \d+ documents, "):
        assert re.search(says, result.output)
    assert (
        len(re.findall(r"source +tico\.jsonl: .* documents, .* tokens .*; left out: \d+ too short", result.output)) == 2
    )


def test_sources_are_prepared_when_their_shards_are_missing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = Data(
        sources=[{"name": "tico", "text": TICO, "shards": str(tmp_path / "tico")}],
        evaluation={"text": TICO, "shards": str(tmp_path / "evaluation")},
    )
    said: list[str] = []
    ensure_prepared(data, tokenizer, said.append)
    assert any(line.startswith("tico: prepared 100%") for line in said)
    before = digests(tmp_path)
    shutil.rmtree(tmp_path / "evaluation")
    ensure_prepared(data, tokenizer)
    assert digests(tmp_path) == before


def test_runs_that_start_together_prepare_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = Data(sources=[{"name": "tico", "text": TICO, "shards": str(tmp_path / "tico")}])
    said: list[list[str]] = [[], [], []]
    with ThreadPoolExecutor(3) as runs:
        list(runs.map(lambda lines: ensure_prepared(data, tokenizer, lines.append), said))
    assert sum(bool(lines) for lines in said) == 1
    assert read_manifest(tmp_path / "tico").documents == 3071


def test_commands_that_start_together(corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(prepare, [str(corpus)], tokenizer, tmp_path / "out", processes=1) for _ in range(2)]
    assert [future.exception() is None for future in both].count(True) == 1
    assert any(getattr(future.exception(), "code", None) == "already-prepared" for future in both)
    assert digests(tmp_path / "out") == digests(prepared)
