"""The data of a run, step by step: one data-parallel rank's share of every global batch."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from configs.errors import InputError
from configs.schema import Data
from datapipe.batch import MicroBatch, PackedSequence, StepData
from datapipe.packing import BUFFER
from datapipe.source import Source, SourceSummary
from datapipe.stream import Stream
from datapipe.targets import Targets
from datapipe.tokenizer import Tokenizer

PREFETCH = 2
"""Steps prepared ahead of the one in training."""
SCAN_BYTES = 256 * 2**20
"""Sources up to this size are read whole when a run starts."""


class Loader:
    """Serves rank `rank` of `size` data-parallel ranks: the streams congruent to it, in order.

    Raises InputError where `size` does not divide the streams, the streams not the batch, or a source is unusable.
    """

    def __init__(self, data: Data, batch_sequences: int, tokenizer: Tokenizer, rank: int, size: int) -> None:
        if data.streams % size:
            raise InputError(f"data.streams: {size} data-parallel ranks must divide the {data.streams} streams")
        if batch_sequences % data.streams:
            raise InputError(f"data.streams: {data.streams} must divide batch.sequences ({batch_sequences})")
        self._data = data
        self._tokenizer = tokenizer
        self._streams = range(rank, data.streams, size)
        self._rows = batch_sequences // data.streams
        self._fingerprints = {source.name: _fingerprint(data, source) for source in self._sources()}

    def steps(
        self, targets: Targets, micro: int, first: int, last: int, state: dict[str, Any] | None
    ) -> Iterator[StepData]:
        """Batches of the 0-based steps first..last-1, prepared ahead in a thread that ends with the generator.

        `micro` rows make a micro-batch and divide the rows of a rank. `state` is the `state` of step
        first-1, united over the ranks whatever their number was then; None starts from the beginning. Raises InputError for
        a state of other data, and for documents that cannot be read.
        """
        if len(self._streams) * self._rows % micro:
            raise InputError(f"batch.micro: {micro} must divide the {len(self._streams) * self._rows} rows of a rank")
        ready: queue.Queue[StepData | BaseException | None] = queue.Queue(PREFETCH)
        stop = threading.Event()

        def put(item: StepData | BaseException | None) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def prepare() -> None:
            try:
                for step in self._prepare(targets, micro, first, last, state):
                    if not put(step):
                        return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=prepare, name="detour-data", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _prepare(
        self, targets: Targets, micro: int, first: int, last: int, state: dict[str, Any] | None
    ) -> Iterator[StepData]:
        data, sources = self._data, self._sources()
        streams = {
            number: Stream(sources, data.streams, number, data.seed, data.sequence_length, self._tokenizer.pad_id)
            for number in self._streams
        }
        if state is not None:
            for number, stream in streams.items():
                stream.restore(self._checked(state, number))
        for step in range(first, last):
            rows = [stream.next_row() for stream in streams.values() for _ in range(self._rows)]
            yield StepData(
                step=step,
                micro_batches=tuple(_micro_batch(rows[i : i + micro], targets) for i in range(0, len(rows), micro)),
                state={str(number): {"data": self._fingerprints, **s.state()} for number, s in streams.items()},
                epochs={
                    source.name: max(stream.mixture.cursors[i].epoch for stream in streams.values())
                    for i, source in enumerate(sources)
                },
            )

    def _sources(self) -> list[Source]:
        return [Source(source, self._tokenizer) for source in self._data.sources]

    def _checked(self, state: dict[str, Any], stream: int) -> dict[str, Any]:
        """The state of one stream, provided that it is of this data."""
        found = state.get(str(stream))
        if found is None:
            raise InputError(f"data.streams: the checkpoint holds no stream {stream} of {self._data.streams}")
        changed = {
            k for k in found["data"].keys() | self._fingerprints if found["data"].get(k) != self._fingerprints.get(k)
        }
        if changed:
            raise InputError(
                f"source {', '.join(sorted(changed))}: its shards, its weight, data.streams, data.seed or data.sequence_length are "
                "not those of the checkpoint, so the run cannot be continued exactly; restore them or start another run"
            )
        return found


def check_sources(data: Data, tokenizer: Tokenizer, vocab_size: int) -> list[SourceSummary]:
    """What the sources hold. Raises InputError for a missing, empty or truncated shard, shards of another tokenizer,
    and ids beyond a model of `vocab_size`."""
    summaries = []
    for config in data.sources:
        source = Source(config, tokenizer)
        source.check(vocab_size, SCAN_BYTES)
        summaries.append(source.summary)
    return summaries


def _fingerprint(data: Data, source: Source) -> str:
    """Identity of everything that decides the order of a source's tokens."""
    settings = (source.fingerprint, source.weight, data.seed, data.sequence_length, data.streams, BUFFER)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def _micro_batch(rows: list[PackedSequence], targets: Targets) -> MicroBatch:
    inputs, labels = zip(*(targets(row) for row in rows), strict=True)
    lengths = [0]
    for row in rows:
        padding = len(row.ids) - sum(row.lengths)
        lengths += [*row.lengths, padding] if padding else row.lengths
    return MicroBatch(
        inputs=np.concatenate(inputs),
        labels=np.concatenate(labels),
        cu_seqlens=np.cumsum(lengths, dtype=np.int32),
        tokens=sum(sum(row.lengths) for row in rows),
    )
