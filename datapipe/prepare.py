"""Text -> shards: tokenized in parallel, to the same bytes whatever the number of processes or interruptions."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from configs.errors import InputError, RunFailedError
from configs.schema import Data
from configs.units import format_count
from datapipe.manifest import NAME, Manifest, Shard, TokenizerIdentity, write_manifest
from datapipe.samples import local_path
from datapipe.shards import ShardWriter
from datapipe.text import Text, find_files, read_texts
from datapipe.tokenizer import Tokenizer, load_tokenizer

SHARD_TEXT = 32 * 2**20
"""Bytes of text in a shard. Small corpora make smaller ones, so that they too are prepared in parallel."""
SMALL = 2**20
"""Bytes of input, compressed if it is, that one process prepares sooner than several."""
PROCESS_MEMORY = 512 * 2**20
"""Bytes that a process that tokenizes needs at worst."""
HELD_OUT = "held-out"
"""Directory, inside the output, of the documents kept from training."""
JOURNAL = ".prepare.jsonl"
"""In an unfinished output: the settings, then a line for each finished shard."""

Progress = Callable[[str], None]
"""Takes one line that says how far the work is, about once a second."""


@dataclass(frozen=True)
class Selection:
    """Which documents are kept, and where."""

    dedup: bool = False
    """Leave out every document whose text appeared before, to the byte."""
    min_tokens: int = 1
    max_tokens: int | None = None
    """Documents outside these bounds are left out."""
    held_out: float = 0.0
    """Share of the documents, chosen by a hash of their text, that goes to `held-out/` instead."""


class _Block(NamedTuple):
    """The documents of one shard."""

    name: str
    """Of the shard, relative to the output."""
    texts: list[tuple[str, Text]]
    """With the name of their source."""
    position: int
    """Bytes of input read until the block's end."""


class _Written(NamedTuple):
    shard: Shard
    sources: dict[str, dict[str, int]]
    """Source -> what became of its documents: kept `documents` and `tokens`, and those left out, by reason."""


def prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: Path,
    progress: Progress | None = None,
    *,
    selection: Selection = Selection(),
    processes: int = 0,
) -> Manifest:
    """Tokenize text files, directories of them or `package://` samples into shards and a manifest in `output`.

    processes: 0 takes as many as there are cores and memory for. An interrupted preparation continues when it is run
    again, and ends with the same bytes; one by another process is waited for. Raises InputError for input that cannot
    be read or output that cannot be written.
    """
    with _alone(output):
        return _prepare(inputs, tokenizer, output, progress, selection, processes)


def _prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: Path,
    progress: Progress | None,
    selection: Selection,
    processes: int,
) -> Manifest:
    files = [(_name(reference), file) for reference in inputs for file in find_files(reference)]
    total = sum(file.stat().st_size for _, file in files)
    journal = _Journal(output, _identity(files, tokenizer, selection))
    memory = psutil.virtual_memory().available // PROCESS_MEMORY
    processes = processes or max(1, min(len(os.sched_getaffinity(0)), memory))
    duplicates: Counter[str] = Counter()
    written: list[tuple[str, _Written]] = []
    running: deque[tuple[_Block, Future[_Written] | _Written]] = deque()
    spawn = multiprocessing.get_context("spawn")  # the caller may hold threads, and locks that a fork would copy
    encoded = spawn.Value("q", 0)
    meter = _Meter(progress, total, encoded)

    def finish_oldest() -> None:
        block, result = running.popleft()
        if isinstance(result, Future):
            result = meter.wait(result)
            journal.add(block.name, result)
        written.append((block.name, result))

    pool: Executor = _Here(tokenizer, encoded)
    if processes > 1 and total > SMALL:
        pool = ProcessPoolExecutor(processes, spawn, _start_worker, (str(tokenizer.directory), encoded))
    with pool:
        try:
            for block in _blocks(files, min(SHARD_TEXT, max(total // 16, 2**20)), selection, duplicates):
                size = sum(len(text.text) for _, text in block.texts)
                meter.read(block.position, size)
                done = journal.finished.get(block.name)
                if done is not None:
                    meter.skip(size)
                running.append((block, done or pool.submit(_write_shard, block, output, selection)))
                if len(running) > processes:
                    finish_oldest()
            while running:
                finish_oldest()
            meter.show(last=True)
        except BrokenProcessPool:
            raise RunFailedError(
                f"{output}: a process that tokenizes died, most likely for lack of memory; "
                "run the same command again with fewer --processes: it continues"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not any(result.shard.tokens for _, result in written):
        raise InputError(f"{', '.join(inputs)}: {_nothing(written)}, so there is nothing to prepare")
    identity = TokenizerIdentity.of(tokenizer)
    held_out = [result for name, result in written if name.startswith(HELD_OUT)]
    manifest = _manifest(identity, [r for name, r in written if not name.startswith(HELD_OUT)], duplicates)
    with _writing(output / NAME):
        if held_out:
            write_manifest(output / HELD_OUT, _manifest(identity, held_out, Counter()))
        write_manifest(output, manifest)
    journal.remove()
    return manifest


def _name(reference: str) -> str:
    """What the source is called: as its file or directory, also where that is given as `.`."""
    path = local_path(reference)
    return path.name if path.name.strip(".") else path.resolve().name


def _nothing(written: list[tuple[str, _Written]]) -> str:
    """Why no document is left."""
    counts: Counter[str] = Counter()
    for _, result in written:
        for by_reason in result.sources.values():
            counts.update(by_reason)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"no text in there is kept ({reasons})" if counts.keys() - {"empty"} else "no text in there"


def ensure_prepared(data: Data, tokenizer: Tokenizer, progress: Progress | None = None) -> None:
    """Prepare every source that names its `text` and has no shards yet; runs that start together do it once.

    Raises InputError.
    """
    evaluation = [] if data.evaluation is None else [data.evaluation.source]
    for source in (*data.sources, *evaluation):
        output = local_path(source.shards)
        if source.text and not (output / NAME).exists():
            show = None if progress is None else _prefixed(progress, source.name)
            with _alone(output):
                if not (output / NAME).exists():
                    _prepare(source.text, tokenizer, output, show, Selection(), 0)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Wait for whoever prepares the same directory."""
    output = output.absolute()  # it may be given as `.`, which has no name
    path = output.with_name(f".{output.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}; choose another directory") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into an InputError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space and run the same command again: it continues" if full else "check its permissions"
        raise InputError(f"{path} cannot be written: {error.strerror}; {remedy}") from None


def _prefixed(progress: Progress, name: str) -> Progress:
    return lambda line: progress(f"{name}: {line}")


def _manifest(identity: TokenizerIdentity, written: list[_Written], duplicates: Counter[str]) -> Manifest:
    sources: dict[str, Counter[str]] = {name: Counter(duplicates=count) for name, count in duplicates.items()}
    for result in written:
        for name, counts in result.sources.items():
            sources.setdefault(name, Counter()).update(counts)
    return Manifest(identity, tuple(r.shard for r in written), {name: dict(sources[name]) for name in sorted(sources)})


def _identity(files: list[tuple[str, Path]], tokenizer: Tokenizer, selection: Selection) -> str:
    """Identity of everything that decides the bytes of the shards."""
    content = [[name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for name, file in files]
    return hashlib.sha256(json.dumps([tokenizer.sha256, asdict(selection), content]).encode()).hexdigest()


class _Journal:
    """What an unfinished output directory already holds."""

    def __init__(self, output: Path, identity: str) -> None:
        if (output / NAME).exists():
            raise InputError(f"{output} already holds prepared shards; give another directory, or delete it first")
        self._path = output / JOURNAL
        self.finished: dict[str, _Written] = {}
        with _writing(output):
            output.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            if not lines:
                self._path.write_text(identity + "\n", encoding="utf-8")
        if lines and lines[0] != identity:
            raise InputError(
                f"{output} holds an unfinished preparation of other text, or with other settings; "
                "give another directory, or delete it first"
            )
        for line in lines[1:]:
            try:
                name, shard, sources = json.loads(line)
            except ValueError:  # the line that was being written when the process was killed
                continue
            path = output / name
            if path.is_file() and path.stat().st_size == shard["bytes"]:
                self.finished[name] = _Written(Shard(**shard), sources)

    def add(self, name: str, written: _Written) -> None:
        with _writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, asdict(written.shard), written.sources]) + "\n")

    def remove(self) -> None:
        self._path.unlink()


class _Here(Executor):
    """Works in this process, at once: for input so small that starting others would take longer."""

    def __init__(self, tokenizer: Tokenizer, encoded: Any) -> None:
        global _tokenizer, _encoded
        _tokenizer, _encoded = tokenizer, encoded

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **keywords))
        return future


class _Meter:
    """Progress lines, one a second, from the text that the workers have tokenized."""

    def __init__(self, progress: Progress | None, total: int, encoded: Any) -> None:
        self._progress, self._total, self._encoded = progress, total, encoded
        self._position = self._text = self._skipped = 0
        self._start = self._shown = time.monotonic()

    def read(self, position: int, text: int) -> None:
        self._position = position
        self._text += text

    def skip(self, text: int) -> None:
        self._skipped += text

    def wait(self, future: Future[_Written]) -> _Written:
        while not future.done() and not wait([future], timeout=1).done:
            self.show()
        return future.result()

    def show(self, last: bool = False) -> None:
        now = time.monotonic()
        if self._progress is None or (now < self._shown + 1 and not last):
            return
        self._shown = now
        # How much text there is in all is known only as far as the (compressed) input has been read.
        everything = self._text * self._total / max(self._position, 1)
        share = min((self._encoded.value + self._skipped) / everything, 1.0)
        speed = self._encoded.value / (now - self._start)
        left = f", {everything * (1 - share) / speed:,.0f} s left" if speed else ""
        self._progress(f"prepared {share:.0%} of {everything / 1e6:,.1f} MB of text, {format_count(speed)}B/s{left}")


def _blocks(
    files: list[tuple[str, Path]], size: int, selection: Selection, duplicates: Counter[str]
) -> Iterator[_Block]:
    """Documents by shard, each of about `size` bytes of text. Counts the duplicates that it leaves out, by source."""
    blocks: dict[str, list[tuple[str, Text]]] = {"": [], f"{HELD_OUT}/": []}
    held = dict.fromkeys(blocks, 0)
    numbers = dict.fromkeys(blocks, 0)
    before = position = 0

    def block(folder: str) -> _Block:
        result = _Block(f"{folder}{numbers[folder]:06d}.tar", blocks[folder], position)
        blocks[folder], held[folder], numbers[folder] = [], 0, numbers[folder] + 1
        return result

    with _Seen() as seen:
        for source, file in files:
            for text in read_texts(file):
                position = before + text.position
                digest = hashlib.blake2b(text.text, digest_size=16).digest()
                if selection.dedup and seen.before(digest):
                    duplicates[source] += 1
                    continue
                # Chosen by content, so that equal texts never stand on both sides.
                away = int.from_bytes(digest[:8], "little") < selection.held_out * 2**64
                folder = f"{HELD_OUT}/" if away else ""
                blocks[folder].append((source, text))
                held[folder] += len(text.text)
                if held[folder] >= size:
                    yield block(folder)
            position = before = before + file.stat().st_size
    for folder, rest in list(blocks.items()):
        if rest:
            yield block(folder)


class _Seen:
    """The texts met so far, by digest: on disk, since there may be more of them than fit into memory."""

    def __enter__(self) -> _Seen:
        with _writing(Path(tempfile.gettempdir())):
            self._file = tempfile.NamedTemporaryFile(prefix="detour-dedup-")
        self._table = sqlite3.connect(self._file.name, isolation_level=None)
        self._table.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-131072;"
            "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._file.close()

    def before(self, digest: bytes) -> bool:
        try:
            return self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 0
        except sqlite3.Error as error:
            raise InputError(
                f"{self._file.name} cannot be written: {error}; free some space there, or set TMPDIR to another "
                "directory, and run the same command again: it continues"
            ) from None


_tokenizer: Tokenizer
_encoded: Any


def _start_worker(directory: str, encoded: Any) -> None:
    global _tokenizer, _encoded
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _tokenizer, _encoded = load_tokenizer(directory), encoded


def _leave_with_parent() -> None:
    """A killed parent cannot stop its workers, and theirs would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_shard(block: _Block, output: Path, selection: Selection) -> _Written:
    """Tokenize documents into one shard, which appears only when it is complete."""
    path = output / block.name
    sources: dict[str, Counter[str]] = {}
    with _writing(path):
        path.parent.mkdir(exist_ok=True)
        writer = ShardWriter(path)
        try:
            for start in range(0, len(block.texts), 64):
                _write_documents(block.texts[start : start + 64], writer, selection, sources)
            shard = writer.close()
        except BaseException:
            writer.discard()
            raise
    return _Written(shard, {name: dict(counts) for name, counts in sources.items()})


def _write_documents(
    texts: list[tuple[str, Text]], writer: ShardWriter, selection: Selection, sources: dict[str, Counter[str]]
) -> None:
    for (source, text), ids in zip(texts, _tokenizer.encode([t.text.decode() for _, t in texts]), strict=True):
        counts = sources.setdefault(source, Counter())
        if len(ids) < max(selection.min_tokens, 1):
            counts["too short" if len(ids) else "empty"] += 1
        elif selection.max_tokens is not None and len(ids) > selection.max_tokens:
            counts["too long"] += 1
        else:
            writer.add(ids, {"source": source, "id": text.id})
            counts.update(documents=1, tokens=len(ids))
    with _encoded.get_lock():
        _encoded.value += sum(len(text.text) for _, text in texts)
