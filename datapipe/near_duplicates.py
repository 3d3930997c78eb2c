"""Near-duplicates of earlier documents, by MinHash signatures and locality-sensitive hashing (Broder 1997).

A document is the set of its pairs of successive words, in lower case. The similarity of two documents is the share of
their pairs that they have in common (Dice), as estimated from their signatures. The result does not depend on the
number of processes, because each signature depends on its document alone.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import re
import signal
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.files import partial_path
from configs.schema import Reading
from datapipe.disk import disk_errors_as_input_errors
from datapipe.executor import InProcessExecutor
from datapipe.identifiers import policy
from datapipe.input_file import InputFile
from datapipe.notes import Notes
from datapipe.records import Text
from datapipe.selection import Intake
from datapipe.text import read_records

NAME = ".near-duplicates-"
"""Beginning of the name of the file, in an unfinished output, that holds the result."""
HASHES = 128
"""Values of a signature."""
SMALL = 2**20
"""Bytes of input that one process reads sooner than a pool."""
_BATCH = 2**20
_CHUNK = 4096
"""Pairs hashed at once: `[HASHES, _CHUNK]` numbers stay in the processor's cache."""
_PAIRS = 2**16
_RECALL = 0.99
"""Share of the pairs at the threshold that some band must bring together."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""A word; a character where words are not divided by spaces."""
_random = np.random.default_rng(20261127)
_FACTORS = _random.integers(1, 2**63, (HASHES, 1), np.uint64) | np.uint64(1)
_TERMS = _random.integers(0, 2**63, (HASHES, 1), np.uint64)


def near_duplicates(
    files: Sequence[InputFile],
    reading: Reading,
    threshold: float,
    output: Path,
    processes: int,
    progress: Callable[[str], None] | None = None,
) -> NDArray[np.bool_]:
    """Find the documents that are near-duplicates of an earlier one.

    The result is kept in `output`, so that an interrupted preparation does not look for them again.

    Args:
        files: The files in order.
        reading: Columns, condition, encoding.
        threshold: Least similarity, from 0 to 1.
        output: Folder of the preparation.
        processes: Number of processes.
        progress: Receives progress lines.

    Returns:
        `[documents]`, in the order in which `read_records` gives them.

    Raises:
        InputError: A record is wrong, and `reading` does not skip it.
    """
    path = output / f"{NAME}{_identity(files, reading, threshold)}.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    found = similar_to_earlier(signatures(files, reading, processes, progress), threshold)
    with disk_errors_as_input_errors(path):
        with partial_path(path).open("wb") as file:
            np.save(file, found)
        partial_path(path).replace(path)
    return found


def signatures(
    files: Sequence[InputFile], reading: Reading, processes: int, progress: Callable[[str], None] | None = None
) -> NDArray[np.uint16]:
    """The signature of every document, `[documents, HASHES]`."""
    total = sum(file.size for file in files)
    parts: list[NDArray[np.uint16]] = []
    running: deque[Future[NDArray[np.uint16]]] = deque()
    pool: Executor = InProcessExecutor()
    if processes > 1 and total > SMALL:
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_process)
    with pool:
        for batch, position in _batches(files, reading):
            running.append(pool.submit(_signatures_of, batch))
            if len(running) > 2 * processes:
                parts.append(running.popleft().result())
                if progress is not None:
                    progress(f"looked for near-duplicates in {position / 1e6:,.1f} of {total / 1e6:,.1f} MB")
        parts += [future.result() for future in running]
    return np.concatenate(parts) if parts else np.empty((0, HASHES), np.uint16)


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # because the parent decides what an interrupt means
    os.environ["OMP_NUM_THREADS"] = "1"


def _batches(files: Sequence[InputFile], reading: Reading) -> Iterator[tuple[list[bytes], int]]:
    intake = Intake(reading.on_error)
    batch: list[bytes] = []
    size = before = position = 0
    for file in files:
        for record in read_records(file, reading, Notes()):
            if isinstance(record, InputError):
                intake.fault(file, record)
            elif isinstance(record, Text):
                position = before + record.position
                batch.append(record.text)
                size += len(record.text)
                if size > _BATCH:
                    yield batch, position
                    batch, size = [], 0
        before += file.size
    intake.require_sound()
    if batch:
        yield batch, before


def _signatures_of(texts: list[bytes]) -> NDArray[np.uint16]:
    return np.stack([signature(text) for text in texts])


def signature(text: bytes) -> NDArray[np.uint16]:
    """The low 16 bits of the smallest hash per hash function; zeros if there is no word."""
    words = [zlib.crc32(word.encode()) for word in _WORD.findall(text.decode("utf-8", "replace").lower())]
    if not words:
        return np.zeros(HASHES, np.uint16)
    numbers = np.array([*words, 0] if len(words) == 1 else words, np.uint64)
    pairs = np.unique(numbers[:-1] << np.uint64(32) | numbers[1:]) * np.uint64(0x9E3779B97F4A7C15)
    pairs ^= pairs >> np.uint64(29)
    smallest = np.full(HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(pairs), _CHUNK):
        hashes = pairs[None, start : start + _CHUNK] * _FACTORS + _TERMS
        np.minimum(smallest, hashes.min(axis=1), out=smallest)
    # The smallest values have few distinct high bits, and the low bits of a product depend on few bits of its factors.
    return (smallest >> np.uint64(24)).astype(np.uint16)


def least(threshold: float) -> float:
    """Overlap of two signatures from which documents count as similar: 99 % of the pairs at the threshold have more.

    Args:
        threshold: Share of the word pairs in common. Signatures estimate the Jaccard overlap instead.
    """
    overlap = threshold / (2 - threshold)
    return overlap - 2.5 * math.sqrt(overlap * (1 - overlap) / HASHES)


@cache
def bands(threshold: float) -> tuple[int, int]:
    """Number of bands and values per band: as selective as the recall at the threshold allows."""
    rows = [rows for rows in range(1, HASHES + 1) if 1 - (1 - least(threshold) ** rows) ** (HASHES // rows) >= _RECALL]
    return HASHES // max(rows, default=1), max(rows, default=1)


def similar_to_earlier(signatures: NDArray[np.uint16], threshold: float) -> NDArray[np.bool_]:
    """Compare each document with two of those that share a band with it.

    They are the first one, and the one beside it by the next band, because sharing both is likely similarity.
    """
    found = np.zeros(len(signatures), bool)
    full: NDArray[np.bool_] = np.asarray(signatures.any(axis=1))
    count, rows = bands(threshold)
    beside = band_keys(signatures, 0, rows)
    for band in range(count):
        keys, beside = beside, band_keys(signatures, (band + 1) % count, rows)
        order = np.lexsort((beside, keys))
        sorted_keys = keys[order]
        starts = np.flatnonzero(np.append([True], np.not_equal(sorted_keys[1:], sorted_keys[:-1]))[: len(order)])
        if not len(starts):
            return found
        firsts = np.repeat(np.minimum.reduceat(order, starts), np.diff(starts, append=len(order)))
        for other in (firsts, np.concatenate([order[:1], order[:-1]])):
            together = np.flatnonzero(np.equal(keys[other], sorted_keys) & np.not_equal(other, order) & full[order])
            one, two = np.minimum(other, order)[together], np.maximum(other, order)[together]
            one, two = one[~found[two]], two[~found[two]]
            for start in range(0, len(one), _PAIRS):
                left, right = one[start : start + _PAIRS], two[start : start + _PAIRS]
                similar = (signatures[left] == signatures[right]).mean(axis=1) >= least(threshold)
                found[right[similar]] = True
    return found


def band_keys(signatures: NDArray[np.uint16], band: int, rows: int) -> NDArray[np.uint64]:
    """One number per document for the values of a band, `[documents]`."""
    keys = np.zeros(len(signatures), np.uint64)
    for column in signatures[:, band * rows : (band + 1) * rows].T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(31)
    return keys


def _identity(files: Sequence[InputFile], reading: Reading, threshold: float) -> str:
    """Identity of the files, by size and time or what their store tells, and of the settings."""
    stats = [(file.name, file.size, file.path.stat().st_mtime_ns if file.path else file.version) for file in files]
    if reading.mask_spans:  # it changes the texts
        annotations = [hashlib.sha256(file.annotations() or b"").digest() for file in files if file.format == "txt"]
        stats += [(str(annotations), 0, "")]
    settings = [stats, reading.model_dump(), policy(reading), threshold, HASHES]
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
