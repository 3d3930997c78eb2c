"""Text -> shards, tokenized in parallel. The bytes do not depend on the number of processes or on interruptions."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from configs.errors import InputError, RunFailedError
from configs.schema import Data, Reading, Source
from datapipe.canaries import PLANTED, plan, require_planted, write_canaries
from datapipe.disk import disk_errors_as_input_errors, exclusive
from datapipe.encode import ShardEncoder, WrittenShard, start_process, write_in_process
from datapipe.executor import InProcessExecutor
from datapipe.identifiers import NO_SPANS, load_patterns, policy
from datapipe.inputs import find_inputs
from datapipe.journal import Journal
from datapipe.manifest import (
    FORMAT_VERSION,
    KEPT,
    NAME,
    Manifest,
    TokenizerIdentity,
    add_counts,
    read_manifest,
    write_manifest,
)
from datapipe.near_duplicates import near_duplicates
from datapipe.notes import Notes, Report
from datapipe.overlap import held_out_documents
from datapipe.paths import local_path
from datapipe.progress_meter import Progress, ProgressMeter
from datapipe.selection import HELD_OUT, KEEP_ALL, Block, Intake, Selection, blocks, look_at
from datapipe.store import open_store
from datapipe.tokenizer import Tokenizer

SHARD_TEXT = 32 * 2**20
"""Bytes of text per shard. Small corpora make smaller shards, so that they too are prepared in parallel."""
SMALL = 2**20
"""Bytes of input files that one process prepares sooner than a pool."""
PROCESS_MEMORY = 512 * 2**20
"""Bytes that a tokenizing process needs at worst."""
FAULTY_FILES = 20
"""Files whose first fault is reported and kept in the manifest."""
READ_ALL = Reading()
"""The default columns, encodings and handling of faults."""


def prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: Path,
    progress: Progress | None = None,
    *,
    selection: Selection = KEEP_ALL,
    reading: Reading = READ_ALL,
    report: Report | None = None,
    processes: int = 0,
) -> Manifest:
    """Tokenize text into shards and a manifest.

    An interrupted preparation continues when it is run again, and ends with the same bytes. Where the text was changed
    meanwhile, only the shards whose documents changed are made again. If another process prepares the same output, it
    is waited for.

    Args:
        inputs: Text files, folders, globs, URLs, `package://` samples, or `-` for standard input.
        tokenizer: Tokenizer of the shards.
        output: Directory to write.
        progress: Receives progress lines.
        selection: Documents to keep.
        reading: Columns, condition, encoding.
        report: Receives a line per kind of file that is not read, encoding that is detected, and the like.
        processes: Tokenizing processes; 0 for as many as there are cores and memory for.

    Raises:
        InputError: The input cannot be read, or the output cannot be written.
        RunFailedError: A tokenizing process died.
    """
    with exclusive(output):
        return _prepare(inputs, tokenizer, output, progress, selection, reading, report, processes)


def _prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: Path,
    progress: Progress | None,
    selection: Selection,
    reading: Reading,
    report: Report | None,
    processes: int,
) -> Manifest:
    notes = Notes()
    files = find_inputs(inputs, reading, notes, output)
    notes.report(report)
    if reading.strict:
        notes.require_all_read()
    notes = Notes()
    intake = Intake(reading.on_error)
    total = sum(file.size for file in files)
    asked = policy(reading)
    patterns = load_patterns(reading.identifiers) if reading.identifiers else ()
    journal = Journal(output, _identity(tokenizer, selection, reading, asked))
    if not intake.skips:
        look_at(files, reading)
    memory = psutil.virtual_memory().available // PROCESS_MEMORY
    processes = processes or max(1, min(len(os.sched_getaffinity(0)), memory))
    near = None
    if selection.near_dedup is not None:
        near = near_duplicates(files, reading, selection.near_dedup, output, processes, progress)
    held_out = None
    if selection.held_out:
        chosen = blocks(files, SHARD_TEXT, selection, reading, Intake("skip"), Notes(), near)
        held_out = held_out_documents(chosen, selection, total, progress)
    canaries = None
    if reading.canaries:
        own_intake = Intake(reading.on_error)  # because the faults are counted once, when the documents are written
        counted = blocks(files, _shard_text(total), selection, reading, own_intake, Notes(), near)
        canaries = plan(reading.canaries, counted, total, progress)
    written: list[tuple[str, WrittenShard]] = []
    running: deque[tuple[Block, Future[WrittenShard] | WrittenShard]] = deque()
    spawn = multiprocessing.get_context("spawn")  # not fork, which would copy the locks of the caller's threads
    encoded = spawn.Value("q", 0)
    meter = ProgressMeter(progress, total, encoded)

    def finish_oldest() -> None:
        block, result = running.popleft()
        if isinstance(result, Future):
            result = meter.wait(result)
            journal.add(block, result)
        written.append((block.name, result))

    # Masked texts come with their identifiers, because the choice of documents sees the placeholders.
    settings = output, selection, encoded, () if reading.mask_spans else patterns, held_out
    pool: Executor = InProcessExecutor()
    write = ShardEncoder(tokenizer, *settings).write
    if processes > 1 and total > SMALL:
        initial = (str(tokenizer.directory), *settings)
        pool, write = ProcessPoolExecutor(processes, spawn, start_process, initial), write_in_process
    with pool:
        try:
            chosen = blocks(files, _shard_text(total), selection, reading, intake, notes, near)
            for block in chosen if canaries is None else canaries.planted_in(chosen):
                size = sum(len(text.text) for _, text in block.texts)
                meter.read(block.position, size)
                finished = journal.finished(block)
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
        except InputError:
            with suppress(InputError, BrokenProcessPool):  # what is under way is kept for the next time
                while running:
                    finish_oldest()
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    notes.report(report)
    _report_faults(intake, report)
    found = any(counts.get("spans") for _, result in written for counts in result.sources.values())
    if report is not None and not found and (asked or reading.spans not in (None, NO_SPANS)):
        report("no identifier was found: check spans and patterns")
    if reading.strict:
        notes.require_all_read()
    if not any(_has_text(result) for _, result in written):
        raise InputError(
            f"{', '.join(inputs)}: {_reason_for_nothing(written, intake)}, so there is nothing to prepare",
            code="nothing-to-prepare",
        )
    identity = TokenizerIdentity.of(tokenizer)
    held_out_shards = [result for name, result in written if name.startswith(HELD_OUT)]
    manifest = _manifest(identity, [r for name, r in written if not name.startswith(HELD_OUT)], intake, asked)
    with disk_errors_as_input_errors(output / NAME):
        journal.remove_others(name for name, _ in written)
        if held_out_shards:
            write_manifest(output / HELD_OUT, _manifest(identity, held_out_shards, Intake(), asked))
        if canaries is not None:
            line = write_canaries(output, canaries, manifest)
            if report is not None:
                report(line)
        manifest = replace(manifest, prepared_from={"text": list(inputs), "reading": _choice(reading)})
        write_manifest(output, manifest)
    journal.remove()
    return manifest


def _choice(reading: Reading) -> dict[str, Any]:
    """The settings that decide which documents a text holds, where they are not the default."""
    keys = {"text", "where", "split", "lines", "encoding", "format"}
    return reading.model_dump(mode="json", include=keys, exclude_defaults=True)


def _shard_text(total: int) -> int:
    """Bytes of text per shard, for a total of input bytes; a power of two, so that it rarely changes with the total."""
    return min(SHARD_TEXT, max(2 ** (total // 16).bit_length() // 2, 2**20))


def _has_text(result: WrittenShard) -> bool:
    """Whether a shard has tokens beside those of canaries."""
    return any(counts.get("tokens") for source, counts in result.sources.items() if source != PLANTED)


def _report_faults(intake: Intake, report: Report | None) -> None:
    for count, first in list(intake.faults.values())[:FAULTY_FILES] if report is not None else ():
        report(f"skipped: {count:,} faulty records; the first: {first}")  # type: ignore[misc]
    if report is not None and len(intake.faults) > FAULTY_FILES:
        report(f"skipped: faulty records of {len(intake.faults) - FAULTY_FILES:,} more files")


def _reason_for_nothing(written: list[tuple[str, WrittenShard]], intake: Intake) -> str:
    """The reason why no document is left."""
    counts: Counter[str] = Counter()
    for by_reason in [*intake.left_out.values(), *(c for _, result in written for c in result.sources.values())]:
        counts.update({reason: count for reason, count in by_reason.items() if reason not in KEPT})
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"no text in there is kept ({reasons})" if counts.keys() - {"empty"} else "no text in there"


def ensure_prepared(
    data: Data, tokenizer: Tokenizer, progress: Progress | None = None, report: Report | None = None
) -> None:
    """Prepare every source that names its `text` and has no shards yet. Runs that start together prepare it once.

    Args:
        data: Settings of the data.
        tokenizer: Tokenizer of the run.
        progress: Receives progress lines.
        report: Receives facts about the text, as in `prepare`.

    Raises:
        InputError: The text cannot be read, or the shards cannot be written.
    """
    evaluation = [] if data.evaluation is None else [data.evaluation.source]
    for source in (*data.sources, *evaluation):
        output = local_path(source.shards)
        if source.text and source.reading.canaries and (output / NAME).exists():
            require_planted(output, source.reading.canaries)
        if source.text and not (output / NAME).exists():
            show, say = (None if send is None else _prefixed(send, source.name) for send in (progress, report))
            with exclusive(output):
                if not (output / NAME).exists():
                    _prepare(source.text, tokenizer, output, show, KEEP_ALL, source.reading, say, 0)
        elif source.text:
            _require_same_text(source, read_manifest(output).prepared_from, report)
        _require_identifiers(source, data)


def _require_same_text(source: Source, prepared_from: dict[str, Any], report: Report | None) -> None:
    """Raise InputError if shards were prepared by another `reading` than their source asks for.

    Another `text`, or a reading that the source does not have, is told alone: the shards may come from another machine,
    or from `detour prepare`.
    """
    before, now = prepared_from.get("reading", {}), _choice(source.reading)
    if prepared_from and now and before != now:
        raise InputError(
            f"source {source.name}: {source.shards} was prepared with reading {before}, and the source has {now}; "
            "delete the shards to prepare them anew, let `shards` name another directory, or set `reading` to theirs",
            key="data.sources.reading",
            code="other-reading",
        )
    text = prepared_from.get("text", list(source.text))
    if report is not None and (text != list(source.text) or before != now) and prepared_from:
        report(
            f"{source.name}: {source.shards} was prepared from {', '.join(text)} with reading {before}. It is used as "
            f"it is, and {', '.join(source.text)} is not read"
        )


def _require_identifiers(source: Source, data: Data) -> None:
    """Raise InputError if shards were prepared without the identifiers that their source asks for."""
    asked = policy(source.reading)
    if not asked:
        return
    store, _ = open_store(source.shards, data, threading.Event())
    with closing(store):
        manifest = store.manifest()
    if manifest is None or manifest.identifiers != asked:
        raise InputError(
            f"source {source.name}: {store.name} was not prepared with these identifiers and mask_spans; prepare its "
            "text into another directory, or set `reading` to the settings it was prepared with",
            key="data.sources.reading",
            code="other-identifiers",
        )


def _prefixed(progress: Progress, name: str) -> Progress:
    return lambda line: progress(f"{name}: {line}")


def _manifest(
    identity: TokenizerIdentity, written: list[WrittenShard], intake: Intake, identifiers: dict[str, str | bool]
) -> Manifest:
    sources: dict[str, dict[str, int]] = {}
    parts: list[Mapping[str, Mapping[str, int]]] = [intake.left_out, *(result.sources for result in written)]
    for counted in parts:
        for name, counts in counted.items():
            add_counts(sources.setdefault(name, {}), counts)
    faults = {name: intake.faults[name] for name in list(intake.faults)[:FAULTY_FILES]}
    shards = tuple(result.shard for result in written)
    return Manifest(identity, shards, {name: sources[name] for name in sorted(sources)}, faults, identifiers)


def _identity(tokenizer: Tokenizer, selection: Selection, reading: Reading, identifiers: dict[str, str | bool]) -> str:
    """Identity of the settings that decide the bytes of a shard of given documents."""
    settings = [FORMAT_VERSION, tokenizer.sha256, asdict(selection), reading.canaries, identifiers]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()
