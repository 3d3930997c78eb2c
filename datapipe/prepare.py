"""Text -> shards: tokenized in parallel, to the same bytes whatever the number of processes or interruptions."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from configs.errors import InputError, RunFailedError
from configs.schema import Data
from configs.units import format_count
from datapipe.disk import alone, writing
from datapipe.encode import Here, Written, start_process, write_shard
from datapipe.manifest import NAME, Manifest, Shard, TokenizerIdentity, write_manifest
from datapipe.samples import local_path
from datapipe.selection import EVERYTHING, HELD_OUT, Block, Selection, blocks
from datapipe.text import find_files
from datapipe.tokenizer import Tokenizer

SHARD_TEXT = 32 * 2**20
"""Bytes of text in a shard. Small corpora make smaller ones, so that they too are prepared in parallel."""
SMALL = 2**20
"""Bytes of input, compressed if it is, that one process prepares sooner than several."""
PROCESS_MEMORY = 512 * 2**20
"""Bytes that a process that tokenizes needs at worst."""
JOURNAL = ".prepare.jsonl"
"""In an unfinished output: the settings, then a line for each finished shard."""

Progress = Callable[[str], None]
"""Takes one line that says how far the work is, about once a second."""


def prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: Path,
    progress: Progress | None = None,
    *,
    selection: Selection = EVERYTHING,
    processes: int = 0,
) -> Manifest:
    """Tokenize text files, directories of them or `package://` samples into shards and a manifest in `output`.

    processes: 0 takes as many as there are cores and memory for. An interrupted preparation continues when it is run
    again, and ends with the same bytes; one by another process is waited for. Raises InputError for input that cannot
    be read or output that cannot be written.
    """
    with alone(output):
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
    written: list[tuple[str, Written]] = []
    running: deque[tuple[Block, Future[Written] | Written]] = deque()
    spawn = multiprocessing.get_context("spawn")  # the caller may hold threads, and locks that a fork would copy
    encoded = spawn.Value("q", 0)
    meter = _Meter(progress, total, encoded)

    def finish_oldest() -> None:
        block, result = running.popleft()
        if isinstance(result, Future):
            result = meter.wait(result)
            journal.add(block.name, result)
        written.append((block.name, result))

    pool: Executor = Here(tokenizer, encoded)
    if processes > 1 and total > SMALL:
        pool = ProcessPoolExecutor(processes, spawn, start_process, (str(tokenizer.directory), encoded))
    with pool:
        try:
            for block in blocks(files, min(SHARD_TEXT, max(total // 16, 2**20)), selection, duplicates):
                size = sum(len(text.text) for _, text in block.texts)
                meter.read(block.position, size)
                done = journal.finished.get(block.name)
                if done is not None:
                    meter.skip(size)
                running.append((block, done or pool.submit(write_shard, block, output, selection)))
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
    with writing(output / NAME):
        if held_out:
            write_manifest(output / HELD_OUT, _manifest(identity, held_out, Counter()))
        write_manifest(output, manifest)
    journal.remove()
    return manifest


def _name(reference: str) -> str:
    """What the source is called: as its file or directory, also where that is given as `.`."""
    path = local_path(reference)
    return path.name if path.name.strip(".") else path.resolve().name


def _nothing(written: list[tuple[str, Written]]) -> str:
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
            with alone(output):
                if not (output / NAME).exists():
                    _prepare(source.text, tokenizer, output, show, EVERYTHING, 0)


def _prefixed(progress: Progress, name: str) -> Progress:
    return lambda line: progress(f"{name}: {line}")


def _manifest(identity: TokenizerIdentity, written: list[Written], duplicates: Counter[str]) -> Manifest:
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
        self.finished: dict[str, Written] = {}
        with writing(output):
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
                self.finished[name] = Written(Shard(**shard), sources)

    def add(self, name: str, written: Written) -> None:
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, asdict(written.shard), written.sources]) + "\n")

    def remove(self) -> None:
        self._path.unlink()


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

    def wait(self, future: Future[Written]) -> Written:
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
