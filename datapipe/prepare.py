"""Text -> shards: tokenized in parallel, to the same bytes whatever the number of processes or interruptions."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from configs.errors import InputError
from configs.schema import Data
from configs.units import format_count
from datapipe.manifest import NAME, Manifest, Shard, TokenizerIdentity, write_manifest
from datapipe.samples import local_path
from datapipe.shards import TAR_END, npy_bytes, tar_member
from datapipe.text import Text, find_files, read_texts
from datapipe.tokenizer import Tokenizer, load_tokenizer

SHARD_TEXT = 32 * 2**20
"""Bytes of text in a shard. Small corpora make smaller ones, so that they too are prepared in parallel."""
JOURNAL = "prepare.jsonl"
"""In an unfinished output: the settings, then a line for each finished shard."""

Progress = Callable[[str], None]
"""Takes one line that says how far the work is, about once a second."""


def prepare(
    inputs: Sequence[str], tokenizer: Tokenizer, output: Path, progress: Progress | None = None, processes: int = 0
) -> Manifest:
    """Tokenize text files, directories of them or `package://` samples into shards and a manifest in `output`.

    processes: 0 takes every core there is. An interrupted preparation continues when it is run again, and ends with
    the same bytes. Raises InputError for input that cannot be read or output that cannot be written.
    """
    files = [file for name in inputs for file in find_files(name)]
    total = sum(file.stat().st_size for file in files)
    journal = _Journal(output, _identity(files, tokenizer))
    workers = processes or len(os.sched_getaffinity(0))
    meter = _Meter(progress, total)
    shards: list[Shard] = []
    running: deque[tuple[Future[Shard] | Shard, int]] = deque()

    def finish_oldest() -> None:
        result, position = running.popleft()
        shard = result if isinstance(result, Shard) else result.result()
        journal.add(shard)
        shards.append(shard)
        meter.show(position, shard.tokens)

    # Spawned, not forked: the caller may hold threads, and a tokenizer whose locks a fork would copy.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (str(tokenizer.directory),)) as pool:
        try:
            for number, (texts, position) in enumerate(_blocks(files, min(SHARD_TEXT, max(total // 16, 2**20)))):
                name = f"{number:06d}.tar"
                done = journal.finished.get(name)
                running.append((done or pool.submit(_write_shard, texts, output / name), position))
                if len(running) > workers:
                    finish_oldest()
            while running:
                finish_oldest()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    manifest = Manifest(TokenizerIdentity.of(tokenizer), tuple(shards))
    if not manifest.tokens:
        raise InputError(f"{', '.join(inputs)}: no text in there, so there is nothing to prepare")
    write_manifest(output, manifest)
    journal.remove()
    return manifest


def ensure_prepared(data: Data, tokenizer: Tokenizer, progress: Progress | None = None) -> None:
    """Prepare every source that names its `text` and has no shards yet. Raises InputError."""
    evaluation = [] if data.evaluation is None else [data.evaluation.source]
    for source in (*data.sources, *evaluation):
        output = local_path(source.shards)
        if source.text and not (output / NAME).exists():
            show = None if progress is None else _prefixed(progress, source.name)
            prepare(source.text, tokenizer, output, show)


def _prefixed(progress: Progress, name: str) -> Progress:
    return lambda line: progress(f"{name}: {line}")


def _identity(files: list[Path], tokenizer: Tokenizer) -> str:
    """Identity of everything that decides the bytes of the shards."""
    content = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps([tokenizer.sha256, content]).encode()).hexdigest()


class _Journal:
    """What an unfinished output directory already holds."""

    def __init__(self, output: Path, identity: str) -> None:
        if (output / NAME).exists():
            raise InputError(f"{output} already holds prepared shards; give another directory, or delete it first")
        self._path = output / JOURNAL
        self.finished: dict[str, Shard] = {}
        try:
            output.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            if not lines:
                self._path.write_text(identity + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{output} cannot be written: {error.strerror}") from None
        if lines and lines[0] != identity:
            raise InputError(
                f"{output} holds an unfinished preparation of other text, or with other settings; "
                "give another directory, or delete it first"
            )
        for line in lines[1:]:
            try:
                shard = Shard(**json.loads(line))
            except (ValueError, TypeError):  # the line that was being written when the process was killed
                continue
            path = output / shard.name
            if path.is_file() and path.stat().st_size == shard.bytes:
                self.finished[shard.name] = shard

    def add(self, shard: Shard) -> None:
        if shard.name not in self.finished:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(shard)) + "\n")

    def remove(self) -> None:
        self._path.unlink()


class _Meter:
    """Progress lines, at most one a second."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._tokens = 0
        self._start = self._last = time.monotonic()

    def show(self, position: int, tokens: int) -> None:
        self._tokens += tokens
        now = time.monotonic()
        if self._progress is None or (now - self._last < 1 and position < self._total):
            return
        self._last = now
        share, seconds = position / self._total, max(now - self._start, 1e-9)
        left = seconds * (1 - share) / max(share, 1e-9)
        self._progress(
            f"prepared {share:.0%} of {self._total / 1e6:.1f} MB, {format_count(self._tokens)} tokens, "
            f"{format_count(self._tokens / seconds)} tokens/s, {left:.0f} s left"
        )


def _blocks(files: list[Path], size: int) -> Iterator[tuple[list[tuple[str, Text]], int]]:
    """Documents of each shard with the name of their file, and the bytes of input read until its end."""
    block: list[tuple[str, Text]] = []
    held = before = position = 0
    for file in files:
        for text in read_texts(file):
            block.append((file.name, text))
            held += len(text.text)
            position = before + text.position
            if held >= size:
                yield block, position
                block, held = [], 0
        before += file.stat().st_size
    if block:
        yield block, before


_tokenizer: Tokenizer


def _start_worker(directory: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    global _tokenizer
    _tokenizer = load_tokenizer(directory)


def _write_shard(texts: list[tuple[str, Text]], path: Path) -> Shard:
    """Tokenize documents into one tar, which appears only when it is complete."""
    partial = path.with_suffix(".partial")
    digest, size, tokens, documents = hashlib.sha256(), 0, 0, 0
    try:
        with partial.open("wb") as file:
            for start in range(0, len(texts), 64):
                batch = texts[start : start + 64]
                for (origin, text), ids in zip(
                    batch, _tokenizer.encode([text.text.decode() for _, text in batch]), strict=True
                ):
                    if not len(ids):
                        continue
                    key = f"{path.stem}-{documents:06d}"
                    metadata = {"source": origin, "id": text.id, "crc32": zlib.crc32(ids.data)}
                    content = tar_member(f"{key}.ids.npy", npy_bytes(ids))
                    content += tar_member(f"{key}.json", json.dumps(metadata, ensure_ascii=False).encode())
                    file.write(content)
                    digest.update(content)
                    size, tokens, documents = size + len(content), tokens + len(ids), documents + 1
            file.write(TAR_END)
            digest.update(TAR_END)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space and run the same command again: it continues" if full else "check its permissions"
        raise InputError(f"{path} cannot be written: {error.strerror}; {remedy}") from None
    return Shard(path.name, size + len(TAR_END), documents, tokens, digest.hexdigest())
