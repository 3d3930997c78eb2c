"""Text -> shards, tokenized in parallel. The bytes do not depend on the number of processes or on interruptions."""

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
from datapipe.disk import disk_errors_as_input_errors, exclusive
from datapipe.encode import InProcessExecutor, ShardEncoder, WrittenShard, start_process, write_in_process
from datapipe.manifest import NAME, Manifest, Shard, TokenizerIdentity, write_manifest
from datapipe.paths import local_path
from datapipe.selection import HELD_OUT, KEEP_ALL, Block, Selection, blocks
from datapipe.text import find_files
from datapipe.tokenizer import Tokenizer

SHARD_TEXT = 32 * 2**20
"""Bytes of text per shard. Small corpora make smaller shards, so that they too are prepared in parallel."""
SMALL = 2**20
"""Bytes of input files that one process prepares sooner than a pool."""
PROCESS_MEMORY = 512 * 2**20
"""Bytes that a tokenizing process needs at worst."""
JOURNAL = ".prepare.jsonl"
"""File in an unfinished output: the identity of the work, then one line per finished shard."""

Progress = Callable[[str], None]
"""Receives a line about the progress, about once per second."""


def prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: Path,
    progress: Progress | None = None,
    *,
    selection: Selection = KEEP_ALL,
    processes: int = 0,
) -> Manifest:
    """Tokenize text into shards and a manifest.

    An interrupted preparation continues when it is run again, and ends with the same bytes. If another process prepares
    the same output, it is waited for.

    Args:
        inputs: Text files, directories of them, or `package://` samples.
        tokenizer: Tokenizer of the shards.
        output: Directory to write.
        progress: Receives progress lines.
        selection: Documents to keep.
        processes: Tokenizing processes; 0 for as many as there are cores and memory for.

    Raises:
        InputError: The input cannot be read, or the output cannot be written.
        RunFailedError: A tokenizing process died.
    """
    with exclusive(output):
        return _prepare(inputs, tokenizer, output, progress, selection, processes)


def _prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: Path,
    progress: Progress | None,
    selection: Selection,
    processes: int,
) -> Manifest:
    files = [(_source_name(reference), file) for reference in inputs for file in find_files(reference)]
    total = sum(file.stat().st_size for _, file in files)
    journal = _Journal(output, _identity(files, tokenizer, selection))
    memory = psutil.virtual_memory().available // PROCESS_MEMORY
    processes = processes or max(1, min(len(os.sched_getaffinity(0)), memory))
    duplicates: Counter[str] = Counter()
    written: list[tuple[str, WrittenShard]] = []
    running: deque[tuple[Block, Future[WrittenShard] | WrittenShard]] = deque()
    spawn = multiprocessing.get_context("spawn")  # not fork, which would copy the locks of the caller's threads
    encoded = spawn.Value("q", 0)
    meter = _ProgressMeter(progress, total, encoded)

    def finish_oldest() -> None:
        block, result = running.popleft()
        if isinstance(result, Future):
            result = meter.wait(result)
            journal.add(block.name, result)
        written.append((block.name, result))

    pool: Executor = InProcessExecutor()
    write = ShardEncoder(tokenizer, output, selection, encoded).write
    if processes > 1 and total > SMALL:
        initial = (str(tokenizer.directory), output, selection, encoded)
        pool, write = ProcessPoolExecutor(processes, spawn, start_process, initial), write_in_process
    with pool:
        try:
            for block in blocks(files, min(SHARD_TEXT, max(total // 16, 2**20)), selection, duplicates):
                size = sum(len(text.text) for _, text in block.texts)
                meter.read(block.position, size)
                finished = journal.finished.get(block.name)
                if finished is not None:
                    meter.skip(size)
                running.append((block, finished or pool.submit(write, block)))
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
        raise InputError(
            f"{', '.join(inputs)}: {_reason_for_nothing(written)}, so there is nothing to prepare",
            code="nothing-to-prepare",
        )
    identity = TokenizerIdentity.of(tokenizer)
    held_out = [result for name, result in written if name.startswith(HELD_OUT)]
    manifest = _manifest(identity, [r for name, r in written if not name.startswith(HELD_OUT)], duplicates)
    with disk_errors_as_input_errors(output / NAME):
        if held_out:
            write_manifest(output / HELD_OUT, _manifest(identity, held_out, Counter()))
        write_manifest(output, manifest)
    journal.remove()
    return manifest


def _source_name(reference: str) -> str:
    """The name of the file or directory, also if it is given as `.`."""
    path = local_path(reference)
    return path.name if path.name.strip(".") else path.resolve().name


def _reason_for_nothing(written: list[tuple[str, WrittenShard]]) -> str:
    """The reason why no document is left."""
    counts: Counter[str] = Counter()
    for _, result in written:
        for by_reason in result.sources.values():
            counts.update(by_reason)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"no text in there is kept ({reasons})" if counts.keys() - {"empty"} else "no text in there"


def ensure_prepared(data: Data, tokenizer: Tokenizer, progress: Progress | None = None) -> None:
    """Prepare every source that names its `text` and has no shards yet. Runs that start together prepare it once.

    Args:
        data: Settings of the data.
        tokenizer: Tokenizer of the run.
        progress: Receives progress lines.

    Raises:
        InputError: The text cannot be read, or the shards cannot be written.
    """
    evaluation = [] if data.evaluation is None else [data.evaluation.source]
    for source in (*data.sources, *evaluation):
        output = local_path(source.shards)
        if source.text and not (output / NAME).exists():
            show = None if progress is None else _prefixed(progress, source.name)
            with exclusive(output):
                if not (output / NAME).exists():
                    _prepare(source.text, tokenizer, output, show, KEEP_ALL, 0)


def _prefixed(progress: Progress, name: str) -> Progress:
    return lambda line: progress(f"{name}: {line}")


def _manifest(identity: TokenizerIdentity, written: list[WrittenShard], duplicates: Counter[str]) -> Manifest:
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
    """The record of the finished shards of an output directory."""

    def __init__(self, output: Path, identity: str) -> None:
        if (output / NAME).exists():
            raise InputError(
                f"{output} already holds prepared shards; give another directory, or delete it first",
                key="--output",
                code="already-prepared",
            )
        self._path = output / JOURNAL
        self.finished: dict[str, WrittenShard] = {}
        """Finished shards by name."""
        with disk_errors_as_input_errors(output):
            output.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            if not lines:
                self._path.write_text(identity + "\n", encoding="utf-8")
        if lines and lines[0] != identity:
            raise InputError(
                f"{output} holds an unfinished preparation of other text, or with other settings; "
                "give another directory, or delete it first",
                key="--output",
                code="other-preparation",
            )
        for line in lines[1:]:
            try:
                name, shard, sources = json.loads(line)
            except ValueError:  # the process was killed while it wrote this line
                continue
            path = output / name
            if path.is_file() and path.stat().st_size == shard["bytes"]:
                self.finished[name] = WrittenShard(Shard(**shard), sources)

    def add(self, name: str, written: WrittenShard) -> None:
        with disk_errors_as_input_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, asdict(written.shard), written.sources]) + "\n")

    def remove(self) -> None:
        self._path.unlink()


class _ProgressMeter:
    """Sends a progress line per second, by the text that the processes have tokenized."""

    def __init__(self, progress: Progress | None, total: int, encoded: Any) -> None:
        self._progress, self._total, self._encoded = progress, total, encoded
        self._position = self._text = self._skipped = 0
        self._start = self._shown = time.monotonic()

    def read(self, position: int, text: int) -> None:
        self._position = position
        self._text += text

    def skip(self, text: int) -> None:
        self._skipped += text

    def wait(self, future: Future[WrittenShard]) -> WrittenShard:
        while not future.done() and not wait([future], timeout=1).done:
            self.show()
        return future.result()

    def show(self, last: bool = False) -> None:
        now = time.monotonic()
        if self._progress is None or (now < self._shown + 1 and not last):
            return
        self._shown = now
        # Estimated, because the text of compressed input is known only as far as the input has been read.
        total_text = self._text * self._total / max(self._position, 1)
        share = min((self._encoded.value + self._skipped) / total_text, 1.0)
        speed = self._encoded.value / (now - self._start)
        left = f", {total_text * (1 - share) / speed:,.0f} s left" if speed else ""
        self._progress(f"prepared {share:.0%} of {total_text / 1e6:,.1f} MB of text, {format_count(speed)}B/s{left}")
