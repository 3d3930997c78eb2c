"""Shards are WebDataset's, and whatever is wrong with one is told, never guessed or run."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

import datapipe.shard_writer
from configs.errors import InputError
from configs.files import file_sha256
from configs.schema import Data
from configs.schema import Source as SourceConfig
from datapipe.batch import StepData
from datapipe.loader import Loader, check_sources
from datapipe.manifest import NAME, Manifest, Shard, TokenizerIdentity, read_manifest, verify, write_manifest
from datapipe.prepare import prepare
from datapipe.shard_report import inspect_shards
from datapipe.shard_writer import ShardWriter
from datapipe.shards import ShardReader, read_index
from datapipe.source import Source
from datapipe.store import LocalStore
from datapipe.stream import Stream
from datapipe.tar_members import DamagedError
from datapipe.targets import Masked, NextToken
from datapipe.tokenizer import Tokenizer
from tests.datapipe.conftest import refused, write_shards
from tests.datapipe.tars import TAR_END, npy_bytes, tar_member

documents_of_ids = st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=30), max_size=8)


def reader(path: Path) -> ShardReader:
    return ShardReader(path.open("rb", buffering=0), str(path))


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.write_bytes(b"".join(tar_member(name, content) for name, content in members.items()) + TAR_END)
    return path


@given(documents=documents_of_ids)
def test_webdataset_reads_what_detour_writes(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    arrays = [np.array(ids, np.uint16) for ids in documents]
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    tar(path, {f"{i:06d}.ids.npy": npy_bytes(ids) for i, ids in enumerate(arrays)})
    with tarfile.open(path) as archive:
        assert archive.getnames() == [f"{i:06d}.ids.npy" for i in range(len(arrays))]
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(len(arrays))]
    for sample, ids in zip(samples, arrays, strict=True):
        assert sample["ids.npy"].dtype == np.uint16
        np.testing.assert_array_equal(sample["ids.npy"], ids)


FORMAT_1, FORMAT_2 = (Path(__file__).parent / name for name in ("format_1", "format_2"))
"""The same notes.jsonl as a shard set of each format. Their bytes may never change."""


@pytest.mark.parametrize("folder", [FORMAT_1, FORMAT_2])
def test_shards_of_each_format_are_read_for_ever(folder: Path, tokenizer: Tokenizer) -> None:
    """Their texts, the check of them, and the order, packing and masks of their batches, which are the same in both."""
    assert verify(folder) == []
    manifest = read_manifest(folder)
    assert inspect_shards(folder).manifest == manifest
    texts = [json.loads(line)["text"] for line in (FORMAT_1 / "notes.jsonl").read_text("utf-8").splitlines()]
    readers = [reader(folder / shard.name) for shard in manifest.shards]
    documents = [one.ids(number).tolist() for one in readers for number in range(len(one))]
    assert documents == [ids.tolist() for ids in tokenizer.encode(texts)]
    data = Data(sequence_length=32, streams=4, sources=[{"name": "notes", "shards": str(folder)}])
    masked = Masked(0.3, (0.8, 0.1, 0.1), 7, tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)
    digest = hashlib.sha256()
    for step in Loader(data, 8, tokenizer, 0, 1).steps(masked, 4, 0, 50, None):
        for micro in step.micro_batches:
            for array in (micro.inputs, micro.labels, micro.cu_seqlens):
                digest.update(array.tobytes())
    assert digest.hexdigest() == "722cc9c453750bd96e6d174f7617f393d59b718720b5f90038fd38956dbbc607"


def test_a_shard_is_written_to_the_bytes_of_format_2(tmp_path: Path) -> None:
    """A checkpoint knows its shards by their bytes: shards prepared again must be the same."""
    for shard in read_manifest(FORMAT_2).shards:
        writer, one = ShardWriter(tmp_path / shard.name), reader(FORMAT_2 / shard.name)
        (sample,) = webdataset.WebDataset(str(FORMAT_2 / shard.name), shardshuffle=False).decode()
        for number in range(len(one)):
            ids = sample["json"]["id"]
            identity = str(ids["from"] + number) if isinstance(ids, dict) else ids[number]
            writer.add(one.ids(number), {"source": sample["json"]["source"], "id": identity})
        assert writer.close() == shard
        assert (tmp_path / shard.name).read_bytes() == (FORMAT_2 / shard.name).read_bytes()


def packed(path: Path, arrays: list[np.ndarray]) -> Shard:
    writer = ShardWriter(path)
    for number, ids in enumerate(arrays):
        writer.add(ids, {"source": "a", "id": f"note-{number}"})
    return writer.close()


@settings(max_examples=15)
@given(documents=documents_of_ids)
def test_webdataset_reads_format_2(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datapipe.shard_writer, "SAMPLE_DOCUMENTS", 3)
        packed(path, [np.array(ids, np.uint16) for ids in documents])
    one = reader(path)
    assert [one.ids(number).tolist() for number in range(len(one))] == documents
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode())
    assert [ids for sample in samples for ids in sample["ids.npy"].tolist()] == list(chain(*documents))
    assert [n for sample in samples for n in sample["lengths.npy"].tolist()] == [len(ids) for ids in documents]


def test_no_flipped_byte_of_format_2_gives_other_ids(tmp_path: Path) -> None:
    """Each document is what it was, or a fault; so it is with a file that ends anywhere."""
    arrays = [np.arange(n, dtype=np.uint16) + n for n in (5, 0, 1, 7)]
    shard = packed(tmp_path / "a.tar", arrays)
    content = (tmp_path / "a.tar").read_bytes()
    broken = [bytes([*content[:i], content[i] ^ 0x55, *content[i + 1 :]]) for i in range(0, len(content), 3)]
    broken += [content[:size] for size in range(0, len(content), 171)]
    for changed in broken:
        (tmp_path / "b.tar").write_bytes(changed)
        with contextlib.suppress(InputError):
            one = reader(tmp_path / "b.tar")
            assert one.problem or one.raw or len(one) == 4 or len(one) != shard.documents
            for number, ids in enumerate(arrays):
                with contextlib.suppress(DamagedError):
                    assert np.array_equal(one.ids(number), ids)


def test_short_documents_take_little_more_than_their_ids(tmp_path: Path) -> None:
    arrays = [np.arange(n % 40, dtype=np.uint16) for n in range(20_000)]
    writer = ShardWriter(tmp_path / "a.tar")
    for number, ids in enumerate(arrays):
        writer.add(ids, {"source": "lines.txt", "id": str(number + 1)})
    assert writer.close().bytes <= 1.3 * sum(ids.nbytes for ids in arrays)
    assert not list(tmp_path.glob("*.idx"))


def test_a_shard_set_opens_as_a_webdataset(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As what `detour prepare` writes, with the metadata of each document."""
    (tmp_path / "a.jsonl").write_text('{"id": "one", "text": "une épreuve"}\n{"text": "two"}\n')
    prepare([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "shards")
    urls = [str(tmp_path / "shards" / shard.name) for shard in read_manifest(tmp_path / "shards").shards]
    (sample,) = webdataset.WebDataset(urls, shardshuffle=False).decode()
    assert sample["json"] == {"documents": 2, "source": "a.jsonl", "id": ["one", "2"]}
    expected = tokenizer.encode(["une épreuve", "two"])
    np.testing.assert_array_equal(sample["ids.npy"], np.concatenate(expected))
    assert sample["lengths.npy"].tolist() == [len(ids) for ids in expected]


def test_inspect_tells_where_webdataset_reads_something_else(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Two documents of which WebDataset makes one sample, as a dot in the key is the start of an extension to it."""
    ids = npy_bytes(np.arange(3, dtype=np.uint16))
    path = tar(tmp_path / "0.tar", {"a.1.ids.npy": ids, "a.2.ids.npy": ids})
    entry = Shard(path.name, path.stat().st_size, 2, 6, file_sha256(path))
    write_manifest(tmp_path, Manifest(TokenizerIdentity.of(tokenizer), (entry,)))
    with refused("shards-damaged", "WebDataset"):
        inspect_shards(tmp_path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_detour_reads_what_others_write(tmp_path: Path, form: int) -> None:
    """Any tar format, both dtypes and byte orders, and names beyond the 100 characters of a plain header."""
    path = tmp_path / "a.tar"
    arrays = [np.arange(n, dtype=d) for n, d in ((3, "<u2"), (0, ">u2"), (7, "<u4"), (5, ">u4"))]
    with tarfile.open(path, "w", format=form) as archive:
        for number, ids in enumerate(arrays):
            buffer = io.BytesIO()
            np.save(buffer, ids)
            folder = "" if form == tarfile.USTAR_FORMAT else "x" * 120 + "/"
            for name, content in (
                (f"{folder}{number}.json", b'{"id": 1}'),
                (f"{folder}{number}.ids.npy", buffer.getvalue()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    shard = reader(path)
    assert len(shard) == 4 and shard.problem is None and not shard.raw
    for number, ids in enumerate(arrays):
        np.testing.assert_array_equal(shard.ids(number), ids)


def test_a_webdataset_writer_makes_a_readable_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"doc{number}", "ids.npy": np.arange(number, dtype=np.uint16), "json": {"id": number}}
            )
    shard = reader(path)
    assert [shard.ids(number).tolist() for number in range(5)] == [list(range(number)) for number in range(5)]


def test_an_index_of_format_1_spares_the_walk_and_only_of_its_own_shard(tmp_path: Path) -> None:
    shard = read_manifest(FORMAT_1).shards[0]
    path = tmp_path / "a.idx"
    path.write_bytes((FORMAT_1 / shard.name).with_suffix(".idx").read_bytes())
    index = read_index(path, shard)
    assert index is not None
    file = (FORMAT_1 / shard.name).open("rb", buffering=0)
    by_index, by_walk = ShardReader(file, shard.name, index), reader(FORMAT_1 / shard.name)
    for number in range(shard.documents):
        np.testing.assert_array_equal(by_index.ids(number), by_walk.ids(number))
    assert read_index(tmp_path / "none.idx", shard) is None
    assert read_index(path, replace(shard, documents=3)) is None
    assert read_index(path, replace(shard, bytes=1000)) is None
    path.write_bytes(path.read_bytes()[:-9])
    assert read_index(path, shard) is None


@pytest.mark.parametrize(
    ("array", "names"),
    [
        (np.arange(4.0), "float64"),
        (np.arange(4), "int64"),
        (np.zeros((2, 2), np.uint16), "[2, 2]"),
        (np.zeros(3, np.uint8), "uint8"),
    ],
)
def test_wrong_dtype_is_named(tmp_path: Path, array: np.ndarray, names: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    shard = reader(tar(tmp_path / "a.tar", {"0.ids.npy": buffer.getvalue()}))
    with refused("wrong-dtype", names):
        shard.ids(0)


@pytest.mark.parametrize("size", [b"-0000001000\0", b"-1\0".rjust(12), b"\xff" * 10 + b"\xfe\0", b"77777777777\0"])
def test_a_size_that_leads_back_or_far_beyond_is_damage(tmp_path: Path, size: bytes) -> None:
    """Followed, the first would be met again for ever, and the last would need 8 GB."""
    good, bad = (bytearray(tar_member(f"{n}.ids.npy", npy_bytes(np.arange(9, dtype=np.uint16)))) for n in "ab")
    bad[124:136], bad[148:156] = size, b" " * 8
    bad[148:156] = f"{sum(bad[:512]):06o}\0 ".encode()
    (tmp_path / "a.tar").write_bytes(good + bad + TAR_END)
    shard = reader(tmp_path / "a.tar")
    assert shard.problem and shard.ids(0).tolist() == list(range(9))
    with pytest.raises(DamagedError):
        shard.ids(1)


def test_a_key_that_appears_twice_in_raw_text(tmp_path: Path) -> None:
    """The second is no document, as among ids; a .json beside a .txt is its metadata, on whichever side."""
    one, two = b'{"text": "one"}', b'{"text": "two"}'
    members = [("a.txt", b"1"), ("a.txt", b"2"), ("b.json", one), ("b.json", two), ("c.json", one), ("c.txt", b"3")]
    members += [("d.txt", b"4"), ("d.json", two)]
    (tmp_path / "a.tar").write_bytes(b"".join(tar_member(*member) for member in members) + TAR_END)
    shard = reader(tmp_path / "a.tar")
    assert [shard.text(number) for number in (0, 2, 4, 5)] == ["1", "one", "3", "4"] and len(shard) == 6
    for number in (1, 3):
        with refused("duplicate-key", f"document {number}"):
            shard.text(number)


def test_members_of_raw_text_by_any_name(tmp_path: Path) -> None:
    """Hidden members are no documents; upper case and compressed ones are, and an error names its member."""
    members = {"._a.txt": b"x", "A.TXT": b"one", "b.txt.gz": gzip.compress(b"two"), "c.JSON": b'{"text": "three"}'}
    shard = reader(tar(tmp_path / "a.tar", {**members, "d.doc": b"x", "e.txt": b"d\xe9", "f.txt": b"\xef\xbb\xbfsix"}))
    assert [shard.text(number) for number in (0, 1, 2, 4)] == ["one", "two", "three", "six"] and len(shard) == 5
    with refused("not-text", "e.txt"):
        shard.text(3)


class Hostile:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("pwned"),))


def test_pickles_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.empty(1, object)
    array[0] = Hostile()
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    with refused("not-an-array"):
        reader(tar(tmp_path / "a.tar", {"0.ids.npy": buffer.getvalue()})).ids(0)
    for extension in ("pkl", "pyd", "pickle", "pth"):
        with refused("pickled-member", f"0.{extension}"):
            reader(tar(tmp_path / "b.tar", {f"0.{extension}": pickle.dumps(Hostile())}))
    assert not Path("pwned").exists()
    pickle.loads(pickle.dumps(Hostile()))  # it does work, where someone loads it
    assert Path("pwned").exists()


def test_commands_in_urls_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="shell command"):
        Data(sources=[{"name": "a", "shards": f"pipe:touch {tmp_path}/pwned"}])
    with pytest.raises(ValueError, match="shell command"):
        Data(sources=[{"name": "a", "shards": "b"}], evaluation={"shards": f"pipe:touch {tmp_path}/pwned"})
    data = Data(sources=[{"name": "a", "shards": "gopen+pipe://touch"}])
    with refused("unknown-scheme", "gopen+pipe://touch"):
        check_sources(data, tokenizer, tokenizer.vocab_size)


# Faults in one shard of a set, each as a change of the file's bytes.

SHARDS = [[[s * 100 + d] * (d + 1) for d in range(20)] for s in range(4)]
BROKEN = 2
"""The shard that each fault is done to."""


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    path.unlink()


def no_tar(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def flipped_size(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[124 + 8] ^= 0x40
    path.write_bytes(content)


def flipped_dtype(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"<u2", b"<f2", 1))


def duplicate_key(path: Path) -> None:
    members = {
        name: npy_bytes(np.array(ids, np.uint16))
        for name, ids in zip("abcdefghijklmnopqrst", SHARDS[BROKEN], strict=True)
    }
    content = b"".join(tar_member(("a" if name == "b" else name) + ".ids.npy", ids) for name, ids in members.items())
    path.write_bytes(content + TAR_END)


def beyond_the_vocabulary(path: Path) -> None:
    good, bad = (npy_bytes(np.full(3, value, np.uint16)) for value in (SHARDS[BROKEN][2][0], 60_000))
    assert good in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(good, bad))


FAULTS = {
    truncate: {"shard-truncated"},
    empty: {"shard-empty"},
    missing: {"shard-missing"},
    no_tar: {"shard-damaged", "document-missing"},
    flipped_size: {"shard-damaged", "document-missing", "not-an-array", "checksum-mismatch"},
    flipped_dtype: {"wrong-dtype"},
    duplicate_key: {"duplicate-key"},
    beyond_the_vocabulary: {"id-beyond-vocabulary"},
}


@pytest.fixture
def directory(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return write_shards(tmp_path / "shards", SHARDS, tokenizer)


def configured(directory: Path, **more: object) -> Data:
    return Data(sequence_length=16, streams=2, sources=[{"name": "corpus", "shards": str(directory)}], **more)


def steps(
    data: Data, tokenizer: Tokenizer, first: int = 0, last: int = 40, state: dict | None = None
) -> list[StepData]:
    return list(Loader(data, 2, tokenizer, 0, 1).steps(NextToken(), 1, first, last, state))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_damaged_shard_stops_the_run_before_it_starts(directory: Path, tokenizer: Tokenizer, fault) -> None:
    fault(directory / read_manifest(directory).shards[BROKEN].name)
    with pytest.raises(InputError) as error:
        check_sources(configured(directory), tokenizer, tokenizer.vocab_size)
    assert error.value.code in FAULTS[fault] and error.value.key == "data.sources"
    assert "source corpus" in str(error.value) and "000002.tar" in str(error.value)
    with pytest.raises(DamagedError) as damage:
        steps(configured(directory), tokenizer)
    assert "000002.tar" in str(damage.value)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_skipping_is_counted_and_exact(directory: Path, tokenizer: Tokenizer, fault) -> None:
    fault(directory / read_manifest(directory).shards[BROKEN].name)
    data = configured(directory, on_error="skip")
    (summary,) = check_sources(data, tokenizer, tokenizer.vocab_size)
    assert summary.problems and "000002.tar" in summary.problems[0]
    whole = steps(data, tokenizer)
    epochs, drawn = whole[-1].epochs["corpus"], whole[-1].drawn["corpus"]
    assert epochs >= 2 and epochs <= drawn.skipped <= 20 * (epochs + 1)
    good = np.concatenate([np.concatenate([m.inputs for m in step.micro_batches]) for step in whole])
    assert set(range(200)) & set(good.tolist()) and 60_000 not in good
    for stop in (1, 7, 23):
        again = steps(data, tokenizer, stop, 40, whole[stop - 1].state)
        for one, other in zip(whole[stop:], again, strict=True):
            assert one.drawn == other.drawn
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
                np.testing.assert_array_equal(a.inputs, b.inputs)


def test_a_flipped_bit_in_the_ids_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "one two three four five six"}\n' * 9)
    prepare([str(tmp_path / "text.jsonl")], tokenizer, tmp_path / "shards")
    path = tmp_path / "shards" / "000000.tar"
    content = bytearray(path.read_bytes())
    at = content.index(tokenizer.encode(["one two three four five six"])[0].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with refused("checksum-mismatch", "document 0", key="data.sources"):
        check_sources(configured(tmp_path / "shards"), tokenizer, tokenizer.vocab_size)


def test_shards_of_another_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    manifest = directory / "manifest.json"
    content = manifest.read_text().replace(tokenizer.sha256, "0" * 64)
    manifest.write_text(content.replace(tokenizer.content_sha256, "0" * 64))
    with refused("tokenizer-mismatch", key="tokenizer"):
        check_sources(configured(directory), tokenizer, tokenizer.vocab_size)


def test_a_model_with_a_smaller_vocabulary(directory: Path, tokenizer: Tokenizer) -> None:
    with refused("vocabulary-too-small", "50368", key="model.vocab_size"):
        check_sources(configured(directory), tokenizer, 30_000)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 3}', '{"format_version": 1, "shards": []}'])
def test_a_broken_manifest(directory: Path, tokenizer: Tokenizer, content: str) -> None:
    (directory / "manifest.json").write_text(content)
    with refused("manifest-invalid" if '_version": 1' in content or content == "{" else "manifest-version", NAME):
        check_sources(configured(directory), tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "", "a/b.tar", ".tar", "passwd", 5, None])
def test_a_manifest_that_points_elsewhere(directory: Path, tokenizer: Tokenizer, name: object) -> None:
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"000001.tar"', json.dumps(name)))
    with refused("manifest-invalid", NAME):
        check_sources(configured(directory), tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize("value", ["3", -1, 1.5, True, None, "/../../../tmp/x"])
@pytest.mark.parametrize("key", ["bytes", "documents", "tokens", "sha256"])
def test_a_manifest_of_wrong_values(directory: Path, tokenizer: Tokenizer, key: str, value: object) -> None:
    tree = json.loads((directory / "manifest.json").read_text())
    tree["shards"][1][key] = value
    (directory / "manifest.json").write_text(json.dumps(tree))
    with refused("manifest-invalid", f"{key} of shard 000001.tar"):
        check_sources(configured(directory), tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_fault_of_the_machine_is_no_damage(
    directory: Path, tokenizer: Tokenizer, on_error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Healthy shards would otherwise be skipped."""
    data = configured(directory, on_error=on_error)
    monkeypatch.setattr(os, "pread", failing(errno.EIO))
    with refused("not-readable", os.strerror(errno.EIO)):
        steps(data, tokenizer)
    monkeypatch.undo()
    (directory / "000002.tar").unlink()
    (directory / "000002.tar").mkdir()  # any error that is not its absence
    with refused("not-readable", "000002.tar"):
        steps(data, tokenizer)


def failing(code: int) -> Callable[..., bytes]:
    def fail(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_shard_lost_after_the_checkpoint(directory: Path, tokenizer: Tokenizer) -> None:
    """The buffered documents are skipped and counted once, and what follows is the same at every resume."""
    data = configured(directory, on_error="skip")
    before = steps(data, tokenizer, 0, 1)[0]
    (directory / "000002.tar").unlink()
    after = steps(data, tokenizer, 1, 30, before.state)
    assert after[0].drawn["corpus"].skipped > before.drawn["corpus"].skipped == 0
    again = steps(data, tokenizer, 1, 9, before.state)
    again += steps(data, tokenizer, 9, 30, json.loads(json.dumps(again[-1].state)))
    for one, other in zip(after, again, strict=True):
        assert one.drawn == other.drawn
        np.testing.assert_array_equal(one.micro_batches[0].inputs, other.micro_batches[0].inputs)
    with refused("shard-missing", "000002.tar"):
        steps(configured(directory), tokenizer, 1, 2, before.state)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_shard_that_was_changed_into_another_good_one(directory: Path, tokenizer: Tokenizer, on_error: str) -> None:
    path = directory / "000002.tar"
    path.write_bytes(path.read_bytes().replace(b"\xc8\0", b"\xc9\0", 1))
    with refused("shard-changed", "000002.tar", key="data.sources"):
        check_sources(configured(directory, on_error=on_error), tokenizer, tokenizer.vocab_size)


def test_an_index_that_points_to_other_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shutil.copytree(FORMAT_1, tmp_path / "shards")
    index = tmp_path / "shards" / "000000.idx"
    spans = np.load(index)
    spans[3] = spans[4]
    np.save(index.open("wb"), spans)
    with refused("index-mismatch", "000000.tar"):
        check_sources(configured(tmp_path / "shards"), tokenizer, tokenizer.vocab_size)
    with refused("shards-damaged", "000000.idx"):
        inspect_shards(tmp_path / "shards")


def test_shards_stay_open_however_many_streams_read(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_shards(tmp_path / "shards", [[[s] * 9] * 200 for s in range(90)], tokenizer)
    data = Data(sequence_length=16, streams=90, sources=[{"name": "a", "shards": str(directory)}])
    opened: list[str] = []
    real = LocalStore.open
    monkeypatch.setattr(LocalStore, "open", lambda self, shard: opened.append(shard.name) or real(self, shard))
    assert list(Loader(data, 90, tokenizer, 0, 1).steps(NextToken(), 9, 0, 20, None))
    assert len(opened) <= 2 * 90


def test_one_good_document_among_empty_ones_is_enough(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A stream meets it only in some epochs: with few documents and many streams, by chance not for long."""
    sources = [
        {"name": str(n), "shards": str(write_shards(tmp_path / str(n), [[[n]], [[]]], tokenizer))} for n in range(9)
    ]
    for source in sources:
        data = Data(sequence_length=16, streams=48, sources=[source])
        assert list(Loader(data, 48, tokenizer, 0, 24).steps(NextToken(), 2, 0, 2, None))


def test_ids_without_a_manifest(directory: Path, tokenizer: Tokenizer) -> None:
    (directory / "manifest.json").unlink()
    with refused("manifest-missing", NAME):
        check_sources(configured(directory), tokenizer, tokenizer.vocab_size)


def test_only_empty_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = write_shards(tmp_path / "shards", [[[], []], [[]]], tokenizer)
    with refused("no-usable-document", "corpus"):
        steps(configured(directory), tokenizer)


def test_documents_of_one_token_and_of_a_million(tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = write_shards(tmp_path / "shards", [[[7], list(range(1000)) * 1000, [], [8]]], tokenizer)
    config = SourceConfig(name="corpus", shards=str(directory), epochs=1)
    stream = Stream([Source(config, Data(sources=[config]), tokenizer)], 1, 0, 42, 1024, tokenizer.pad_id)
    rows = list(iter(stream.next_row, None))
    inputs = np.concatenate([row.ids[: sum(row.lengths)] for row in rows])
    assert np.count_nonzero(inputs == tokenizer.cls_id) == np.count_nonzero(inputs == tokenizer.sep_id) == 3
    assert np.count_nonzero(inputs < 1000) == 1_000_002
    assert sum(len(row.lengths) for row in rows) == 979  # two short documents, and the parts of the long one
