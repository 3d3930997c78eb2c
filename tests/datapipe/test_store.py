"""Remote shards and text from real servers: a local HTTP server and moto's S3 that misbehave, an emulator of GCS."""

from __future__ import annotations

import http.client
import http.server
import io
import re
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import gcsfs
import numpy as np
import pytest
import s3fs
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer

from configs.errors import InputError, RunFailedError
from configs.files import partial_path
from configs.schema import Data, Reading
from datapipe.input_file import without_secrets
from datapipe.inputs import find_inputs
from datapipe.loader import Loader, check_sources
from datapipe.manifest import Shard, read_manifest
from datapipe.notes import Notes
from datapipe.remote_store import RemoteStore
from datapipe.targets import NextToken
from datapipe.text import read_texts
from datapipe.tokenizer import Tokenizer
from tests.datapipe.conftest import refused, write_shards

SHARDS = [[[s * 100 + d] * 50 for d in range(100)] for s in range(6)]


RELAYED = ("ETag", "Content-Type", "Content-Length", "Content-Range", "Last-Modified")
"""Headers of an S3 answer that its client needs."""


class Server:
    """Serves a directory, or another HTTP server, with ranges; the first answers to each path that ends in .tar go
    through `faults`, one each."""

    def __init__(self, root: Path | None = None, upstream: str = "") -> None:
        self.faults: list[Callable[[http.server.BaseHTTPRequestHandler, bytes], None]] = []
        self.ranges = True
        self.tells_length = True
        self.requests: list[str] = []
        self._asked = threading.Condition()
        outer, answered = self, dict[str, int]()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with outer._asked:
                    outer.requests.append(self.path)
                    outer._asked.notify_all()
                status, headers, content = self.relayed() if root is None else self.from_disk(root)
                turn = answered[self.path] = answered.get(self.path, -1) + 1
                if self.path.endswith(".tar") and turn < len(outer.faults):
                    outer.faults[turn](self, content)
                    return
                self.send_response(status)
                length = {"Content-Length": str(len(content))} if outer.tells_length else {}
                for key, value in {**headers, **length}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content)

            def from_disk(self, root: Path) -> tuple[int, dict[str, str], bytes]:
                path = root / self.path.lstrip("/").partition("?")[0]
                if not path.is_file():
                    return 404, {}, b""
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if wanted and outer.ranges:
                    return (
                        206,
                        {"Content-Range": f"bytes {wanted[1]}-{wanted[2]}/{path.stat().st_size}"},
                        path.read_bytes()[int(wanted[1]) : int(wanted[2]) + 1],
                    )
                return 200, {"Accept-Ranges": "bytes"} if outer.ranges else {}, path.read_bytes()

            def do_HEAD(self) -> None:
                status, headers, content = self.relayed() if root is None else self.from_disk(root)
                self.send_response(status)
                length = {"Content-Length": str(len(content))} if outer.tells_length else {}
                for key, value in {**length, **headers}.items():
                    self.send_header(key, value)
                self.end_headers()

            def relayed(self) -> tuple[int, dict[str, str], bytes]:
                connection = http.client.HTTPConnection(upstream)
                connection.request(self.command, self.path, headers=dict(self.headers))
                answer = connection.getresponse()
                return (
                    answer.status,
                    {key: value for key, value in answer.getheaders() if key in RELAYED},
                    answer.read(),
                )

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until the requests fulfil it."""
        with self._asked:
            assert self._asked.wait_for(condition, timeout=60)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def unavailable(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_error(503)


def forbidden(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_error(403)


def beyond_the_end(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_error(416)


def dropped(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(206)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.connection.close()


def slow(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(206)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    for start in range(0, len(content), len(content) // 4 + 1):
        handler.wfile.write(content[start : start + len(content) // 4 + 1])
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.fixture
def shards(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return write_shards(tmp_path / "remote" / "corpus", SHARDS, tokenizer)


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    server = Server(shards.parent)
    yield server
    server.close()


def configured(where: str, cache: Path, **more: Any) -> Data:
    sources = [{"name": "corpus", "shards": where}]
    return Data(
        **{"sequence_length": 128, "streams": 4, "sources": sources, "cache": str(cache), "patience": 20, **more}
    )


def batches(data: Data, tokenizer: Tokenizer, count: int = 60) -> np.ndarray:
    """Enough for more than two epochs."""
    steps = Loader(data, 4, tokenizer, 0, 1).steps(NextToken(), 4, 0, count, None)
    return np.stack([step.micro_batches[0].inputs for step in steps])


def cached(cache: Path) -> list[str]:
    return sorted(path.name[21:] for path in cache.glob("*.tar"))


def test_the_same_batches_as_from_disk(shards: Path, server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    server.faults = [unavailable, dropped, slow]
    remote = configured(f"{server.url}/corpus", tmp_path / "cache")
    np.testing.assert_array_equal(batches(remote, tokenizer), batches(configured(str(shards), tmp_path), tokenizer))
    assert cached(tmp_path / "cache") == [shard.name for shard in read_manifest(shards).shards]
    assert not list((tmp_path / "cache").glob("*.partial"))
    before = [path for path in server.requests if path.endswith(".tar")]
    batches(remote, tokenizer)
    assert [path for path in server.requests if path.endswith(".tar")] == before  # the cache served all of it


def test_a_glob_takes_some_of_the_shards(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (summary,) = check_sources(
        configured(f"{server.url}/corpus/00000[0-3].tar", tmp_path), tokenizer, tokenizer.vocab_size
    )
    assert (summary.shards, summary.documents) == (4, 400)


def test_a_server_without_ranges(shards: Path, server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    server.ranges = False
    remote = configured(f"{server.url}/corpus", tmp_path / "cache")
    np.testing.assert_array_equal(
        batches(remote, tokenizer, 9), batches(configured(str(shards), tmp_path), tokenizer, 9)
    )


def test_the_cache_keeps_its_bound(shards: Path, server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Room for two of six shards: the batches are the same, and the directory never holds a third."""
    size = max(shard.bytes for shard in read_manifest(shards).shards)
    remote = configured(f"{server.url}/corpus", tmp_path / "cache", cache_gb=2.5 * size / 1e9)
    steps = Loader(remote, 4, tokenizer, 0, 1).steps(NextToken(), 4, 0, 60, None)
    expected = batches(configured(str(shards), tmp_path), tokenizer)
    for step, whole in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(step.micro_batches[0].inputs, whole)
        assert len(cached(tmp_path / "cache")) <= 2


def test_a_shard_in_use_is_the_last_to_make_room(shards: Path, server: Server, tmp_path: Path) -> None:
    """Deleted, it would go on taking up room, beyond the bound."""
    entries = read_manifest(shards).shards
    data = configured(f"{server.url}/corpus", tmp_path / "cache", cache_gb=2.5 * entries[0].bytes / 1e9)
    store = RemoteStore(f"{server.url}/corpus", data, threading.Event())
    with store.open(entries[0]):
        store.open(entries[1]).close()
        store.open(entries[2]).close()
        assert cached(tmp_path / "cache") == ["000000.tar", "000002.tar"]
    store.open(entries[3]).close()
    assert cached(tmp_path / "cache") == ["000002.tar", "000003.tar"]


class EvictedStore(RemoteStore):
    """The first two shards are gone as soon as they are fetched, as where another process makes room."""

    left = 2

    def download(self, shard: Shard, path: Path) -> None:
        super().download(shard, path)
        if self.left:
            self.left -= 1
            path.unlink()


def test_a_shard_that_goes_before_it_is_opened_is_fetched_again(shards: Path, server: Server, tmp_path: Path) -> None:
    data = configured(f"{server.url}/corpus", tmp_path / "cache")
    store = EvictedStore(f"{server.url}/corpus", data, threading.Event())
    shard = read_manifest(shards).shards[0]
    with store.open(shard) as file:
        assert file.read() == (shards / shard.name).read_bytes()
    assert server.requests.count("/corpus/000000.tar") == 3


def test_what_no_patience_helps_is_told_at_once(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """No request is repeated."""
    for fault, code in ((forbidden, "access-denied"), (beyond_the_end, "shard-changed")):
        server.faults = [fault] * 1000
        server.requests.clear()
        with refused(code):
            batches(configured(f"{server.url}/corpus", tmp_path / "cache"), tokenizer)
        assert max(Counter(server.requests).values()) == 1


def test_a_shard_that_is_larger_than_the_cache(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with refused("cache-too-small", key="data.cache_gb"):
        batches(configured(f"{server.url}/corpus", tmp_path / "cache", cache_gb=1e-9), tokenizer)


def test_the_end_of_patience(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    server.faults = [unavailable] * 1000
    with pytest.raises(RunFailedError, match=r"no answer for 1 s .*503.*data\.patience"):
        batches(configured(f"{server.url}/corpus", tmp_path / "cache", patience=1), tokenizer)
    server.close()
    with pytest.raises(RunFailedError, match=r"no answer for 1 s"):
        batches(configured(f"{server.url}/corpus", tmp_path / "cache", patience=1), tokenizer)


def test_a_server_that_says_nothing(shards: Path, server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    release = threading.Event()
    server.faults = [lambda handler, content: release.wait(20)] * 1000
    with pytest.raises(RunFailedError, match=r"no answer for 2 s"):
        batches(configured(f"{server.url}/corpus", tmp_path / "cache", patience=2), tokenizer)
    release.set()


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "changed"])
def test_a_shard_that_is_not_the_manifests(
    fault: str, on_error: str, shards: Path, server: Server, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = shards / "000003.tar"
    if fault == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-2048] if fault == "truncated" else content.replace(b"\x2d\x01", b"\x2e\x01", 1))
    remote = configured(f"{server.url}/corpus", tmp_path / "cache", on_error=on_error)
    if on_error == "stop":
        with refused("shard-missing" if fault == "missing" else "shard-changed", "000003.tar"):
            batches(remote, tokenizer)
    else:
        seen = batches(remote, tokenizer)
        assert not np.isin(seen, range(300, 400)).any() and np.isin(seen, range(400, 500)).any()
    assert "000003.tar" not in cached(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*000003*.partial"))
    if fault != "missing":  # fetched once by its one store, however often its documents are due
        assert server.requests.count("/corpus/000003.tar") == 1


def test_no_manifest(shards: Path, server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (shards / "manifest.json").unlink()
    with refused("manifest-missing", server.url):
        check_sources(configured(f"{server.url}/corpus", tmp_path), tokenizer, tokenizer.vocab_size)


def test_a_cache_that_cannot_be_written(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused("not-writable", key="data.cache"):
        batches(configured(f"{server.url}/corpus", tmp_path / "file" / "cache"), tokenizer)


def test_a_full_cache_directory(server: Server, shards: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """/dev/full stands in for the disk: every write to it ends in ENOSPC."""
    (tmp_path / "cache").mkdir()
    for shard in read_manifest(shards).shards:
        partial_path(tmp_path / "cache" / f"{shard.sha256[:20]}-{shard.name}").symlink_to("/dev/full")
    with refused("disk-full", key="data.cache"):
        batches(configured(f"{server.url}/corpus", tmp_path / "cache"), tokenizer)


def test_closing_does_not_wait_for_a_dead_server(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = configured(f"{server.url}/corpus", tmp_path / "cache", patience=300)
    store = RemoteStore(f"{server.url}/corpus", data, threading.Event())
    manifest = store.manifest()
    assert manifest is not None
    server.faults = [unavailable] * 1000
    store.prefetch(manifest.shards[0])
    server.wait_for(lambda: any(path.endswith(".tar") for path in server.requests))
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("detour-read-ahead")]
    store.close()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_closing_the_loader_does_not_wait_for_a_dead_server(
    server: Server, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Two shards come, and the thread that works ahead is waiting for the third."""

    def first_two(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        (slow if handler.path in wanted()[:2] else unavailable)(handler, content)

    def wanted() -> list[str]:
        return list(dict.fromkeys(path for path in server.requests if path.endswith(".tar")))

    server.faults = [first_two] * 1000
    data = configured(f"{server.url}/corpus", tmp_path / "cache", patience=300, streams=1, prefetch=10**6)
    steps = Loader(data, 1, tokenizer, 0, 1).steps(NextToken(), 1, 0, 10**6, None)
    next(steps)
    server.wait_for(lambda: any(server.requests.count(path) >= 2 for path in wanted()[2:]))  # it is being patient
    closing = threading.Thread(target=steps.close, daemon=True)
    closing.start()
    closing.join(timeout=60)
    assert not closing.is_alive()


@pytest.fixture
def s3(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """moto's S3 with the shards in a bucket, reached through the faults."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for path in shards.iterdir():
        client.upload_file(str(path), "bucket", f"corpus/{path.name}")
    for name in ("a.jsonl", "b.jsonl"):
        client.put_object(Bucket="bucket", Key=f"text/{name}", Body=f'{{"text": "{name}"}}'.encode())
    client.put_object(Bucket="bucket", Key="notes/notes.tar", Body=tar_of_text())
    proxy = Server(upstream=f"{host}:{port}")
    proxy.faults = [unavailable, dropped, slow]
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    s3fs.S3FileSystem.clear_instance_cache()
    yield proxy
    proxy.close()
    moto.stop()


@pytest.mark.usefixtures("s3")
def test_s3(shards: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    remote = configured("s3://bucket/corpus/*.tar", tmp_path / "cache")
    np.testing.assert_array_equal(batches(remote, tokenizer), batches(configured(str(shards), tmp_path), tokenizer))
    with refused("manifest-missing", "s3://bucket/nowhere"):
        batches(configured("s3://bucket/nowhere", tmp_path / "cache"), tokenizer)


def tar_of_text() -> bytes:
    """A tar of one text file."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 300_000
        archive.addfile(info, io.BytesIO(b"a" * info.size))
    return content.getvalue()


def texts(*urls: str) -> list[bytes]:
    return [text.text for file in find_inputs(urls, Reading(), Notes()) for text in read_texts(file)]


@pytest.mark.parametrize(("ranges", "length"), [(True, True), (False, True), (False, False)])
def test_text_of_a_web_server(shards: Path, server: Server, ranges: bool, length: bool) -> None:
    server.ranges, server.tells_length = ranges, length
    lines = [f'{{"text": "{number}"}}' for number in range(2000)]
    (shards / "notes.jsonl").write_text("\n".join(lines))
    assert len(texts(f"{server.url}/{shards.name}/notes.jsonl?signature=SECRET")) == 2000
    host = server.url.removeprefix("http://")
    for code, url in (
        ("no-such-file", f"http://user:SECRET@{host}/{shards.name}/none.jsonl?signature=SECRET"),
        ("no-listing", f"{server.url}/{shards.name}/*.jsonl?signature=SECRET"),
        ("not-readable", "http://127.0.0.1:1/notes.jsonl?signature=SECRET"),
    ):
        with pytest.raises(InputError, match=re.escape(without_secrets(url))) as caught:
            texts(url)
        assert caught.value.code == code
        assert "SECRET" not in str(caught.value)


def test_text_whose_connection_is_dropped(shards: Path, server: Server) -> None:
    """The faults of this server meet files named .tar."""
    (shards / "notes.tar").write_bytes(tar_of_text())
    server.faults = [dropped] * 50
    with refused("not-readable", f"{server.url}/{shards.name}/notes.tar"):
        texts(f"{server.url}/{shards.name}/notes.tar")


@pytest.mark.parametrize("fault", [forbidden, dropped])
def test_text_in_s3_that_cannot_be_read(
    s3: Server, fault: Callable[[http.server.BaseHTTPRequestHandler, bytes], None]
) -> None:
    s3.faults = [fault] * 50
    with refused("not-readable", "s3://bucket/notes/notes.tar"):
        texts("s3://bucket/notes")


@pytest.fixture
def gs(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Google's storage, emulated, with the shards and some text in a bucket."""
    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{emulator._api._httpd.server_port}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    system = gcsfs.GCSFileSystem()
    for path in shards.iterdir():
        system.pipe(f"bucket/corpus/{path.name}", path.read_bytes())
    for name in ("a.jsonl", "b.jsonl"):
        system.pipe(f"bucket/text/{name}", f'{{"text": "{name}"}}'.encode())
    yield "gs://bucket/corpus"
    emulator.stop()


def test_google_storage(gs: str, shards: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    remote = configured(f"{gs}/*.tar", tmp_path / "cache")
    np.testing.assert_array_equal(batches(remote, tokenizer), batches(configured(str(shards), tmp_path), tokenizer))
    with refused("manifest-missing", "gs://bucket/nowhere"):
        batches(configured("gs://bucket/nowhere", tmp_path / "cache"), tokenizer)
    assert texts("gs://bucket/text") == texts("gs://bucket/text/*.jsonl") == [b"a.jsonl", b"b.jsonl"]
    for url in ("gs://bucket/text/none.jsonl", "gs://bucket/text/*.csv", "gs://nowhere/text"):
        with refused("no-such-file", url):
            texts(url)


@pytest.mark.usefixtures("s3")
def test_text_in_s3() -> None:
    assert texts("s3://bucket/text") == texts("s3://bucket/text/*.jsonl") == [b"a.jsonl", b"b.jsonl"]
    with refused("no-such-file", "s3://bucket/text/none.jsonl"):
        texts("s3://bucket/text/none.jsonl")
    with refused("no-such-file", "s3://bucket/text/*.csv"):
        texts("s3://bucket/text/*.csv")
