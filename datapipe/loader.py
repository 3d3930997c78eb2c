"""The data of a run, step by step: one data-parallel rank's share of every global batch."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from configs.errors import InputError
from configs.schema import Data
from datapipe.batch import Drawn, MicroBatch, Origin, PackedSequence, StepData
from datapipe.mixture import MEMORY
from datapipe.order import FORMAT
from datapipe.packing import BUFFER
from datapipe.source import Source, SourceSummary
from datapipe.stream import Stream, StreamState
from datapipe.targets import NumpyBatches, Targets
from datapipe.tokenizer import Tokenizer

SCAN_BYTES = 256 * 2**20
"""Local sources up to this size are read whole when a run starts."""


class Loader:
    """Serves rank `rank` of `size` data-parallel ranks: the streams congruent to it, in order.

    device: the GPU that is trained on, and that the dali backend makes batches on; None for the CPU. Raises InputError
    where `size` does not divide the streams, the streams not the batch, or a source is unusable.
    """

    def __init__(
        self,
        data: Data,
        batch_sequences: int,
        tokenizer: Tokenizer,
        rank: int,
        size: int,
        device: int | None = None,
    ) -> None:
        if data.streams % size:
            raise InputError(f"data.streams: {size} data-parallel ranks must divide the {data.streams} streams")
        if batch_sequences % data.streams:
            raise InputError(f"data.streams: {data.streams} must divide batch.sequences ({batch_sequences})")
        self._data = data
        self._tokenizer = tokenizer
        self._device = device
        self._streams = range(rank, data.streams, size)
        self._rows = batch_sequences // data.streams
        self._turn = threading.Event()

    def steps(
        self,
        targets: Targets,
        micro: int,
        first: int,
        last: int,
        state: dict[str, Any] | None,
        stage: Callable[[MicroBatch], Any] | None = None,
    ) -> Generator[StepData, None, None]:
        """Batches of the 0-based steps first..last-1, prepared ahead in a thread that ends with the generator.

        `micro` rows make a micro-batch and divide the rows of a rank. `state` is the `state` of step first-1, united
        over the ranks whatever their number was then; None starts from the beginning. `stage` is called in the thread
        for each micro-batch, to have it where training takes it. Raises InputError for a state of other data, documents
        that cannot be read, and the end of the data; RunFailedError where a remote store does not answer.
        """
        if len(self._streams) * self._rows % micro:
            raise InputError(f"batch.micro: {micro} must divide the {len(self._streams) * self._rows} rows of a rank")
        closed = threading.Event()
        steps = self._prepare(targets, micro, first, last, state, stage, closed)
        return _ahead(steps, self._data.prefetch, closed, self._turn, yields=self._device is not None)

    def launched(self) -> None:
        """To be called when the host has given a GPU the work of a step and is about to wait for it: further batches
        are prepared from here on.

        Before, the thread that prepares them would take the interpreter from the one that launches kernels, just when
        the GPU has none in store: steps of ModernBERT-base on an H100 were 30 ms longer than on batches made before. On
        a CPU both work at all times.
        """
        self._turn.set()

    def describe(self, origin: Origin) -> str:
        """A row for people: its stream, its number, and the shards and documents it was packed from."""
        data, sources = self._data, [Source(source, self._data, self._tokenizer) for source in self._data.sources]
        stream = Stream(sources, data.streams, origin.stream, data.seed, data.sequence_length, self._tokenizer.pad_id)
        try:
            found = [stream.locate(*document[:3]) for document in origin.documents]
        finally:
            for source in sources:
                source.close()
        documents = ", ".join(f"{shard} document {number}" for shard, number in dict.fromkeys(found))
        return f"sequence {origin.number} of stream {origin.stream} ({documents})"

    def _prepare(
        self,
        targets: Targets,
        micro: int,
        first: int,
        last: int,
        state: dict[str, Any] | None,
        stage: Callable[[MicroBatch], Any] | None,
        closed: threading.Event,
    ) -> Generator[StepData, None, None]:
        data, here = self._data, len(self._streams)
        sources = [Source(source, data, self._tokenizer, here, closed) for source in data.sources]
        limited = all(source.epochs is not None for source in sources)
        make = self._batch_maker(targets, micro)
        prints = {source.name: _fingerprint(data, place, source) for place, source in enumerate(sources)}
        if data.evaluation is not None:  # its losses before and after a restart are of one curve
            with closing(Source(data.evaluation.source, data, self._tokenizer)) as held_out:
                prints["(evaluation)"] = held_out.fingerprint
        streams = {
            number: Stream(sources, data.streams, number, data.seed, data.sequence_length, self._tokenizer.pad_id)
            for number in self._streams
        }
        try:
            if state is not None:
                for number, stream in streams.items():
                    stream.restore(StreamState.from_json(_checked(state, number, prints)))
            rows = None
            for step in range(first, last):
                rows = rows or self._take(streams.values())
                if rows is None:
                    raise end_of_data(step)
                micro_batches = tuple(make([rows[i : i + micro] for i in range(0, len(rows), micro)]))
                made = StepData(
                    step=step,
                    micro_batches=micro_batches,
                    staged=tuple(map(stage, micro_batches)) if stage else (),
                    state={
                        str(number): {"data": prints, **stream.state().to_json()} for number, stream in streams.items()
                    },
                    **_progress(sources, list(streams.values())),
                )
                # Ranks reach the end at different steps, so they are told of it while they all still have a batch.
                more = limited and step + 1 < last
                rows = self._take(streams.values()) if more else None
                yield replace(made, ends=more and rows is None)
        finally:
            for source in sources:
                source.close()

    def _batch_maker(self, targets: Targets, micro: int) -> Callable[[list[list[PackedSequence]]], list[MicroBatch]]:
        if self._data.backend == "numpy":
            return NumpyBatches(targets)
        from datapipe.dali import DaliBatches

        length, pad_id = self._data.sequence_length, self._tokenizer.pad_id
        return DaliBatches(targets, micro, length, pad_id, self._device)

    def _take(self, streams: Collection[Stream]) -> list[PackedSequence] | None:
        """The rows of a step; None where a stream has no more of them."""
        rows = [row for stream in streams for _ in range(self._rows) if (row := stream.next_row()) is not None]
        return rows if len(rows) == len(streams) * self._rows else None


def end_of_data(step: int) -> InputError:
    return InputError(
        f"data.sources: all have reached their `epochs` at step {step}, before the phases end; `detour export` takes "
        "what the checkpoints hold, and for another run shorten the phases, or let a source repeat"
    )


def check_sources(data: Data, tokenizer: Tokenizer, vocab_size: int) -> list[SourceSummary]:
    """What the sources, and last the evaluation set if there is one, hold.

    Raises InputError for shards of another tokenizer, ids beyond a model of `vocab_size`, and, under `on_error: stop`,
    for a missing, empty or truncated shard.
    """
    if data.backend == "dali":
        from datapipe.dali import require_dali

        require_dali()
    sources = [Source(config, data, tokenizer) for config in data.sources]
    total = sum(source.weight for source in sources)
    shares = [source.weight / total for source in sources]
    if data.evaluation is not None:
        sources.append(Source(data.evaluation.source, data, tokenizer))
        shares.append(0.0)
    return [_checked_summary(source, share, vocab_size) for source, share in zip(sources, shares, strict=True)]


def _checked_summary(source: Source, share: float, vocab_size: int) -> SourceSummary:
    with closing(source):
        problems = source.check(vocab_size, SCAN_BYTES)
    if problems and not source.skips:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"source {source.name}: {problems[0]}{more}")
    documents, size = sum(source.documents), sum(shard.bytes for shard in source.shards)
    return SourceSummary(source.name, len(source.shards), documents, source.tokens, size, share, tuple(problems))


def evaluation_batches(
    data: Data, targets: Targets, micro: int, tokenizer: Tokenizer, rank: int, size: int
) -> list[MicroBatch]:
    """This rank's share of the evaluation set: the same sequences at every call, and over all ranks at every size.

    Sequences are dealt to the ranks in turn. Every rank gets equally many micro-batches of `micro` rows; rows of
    padding, which pay no loss, fill them up.
    """
    assert data.evaluation is not None
    with closing(Source(data.evaluation.source, data, tokenizer)) as source:
        stream = Stream([source], 1, 0, data.seed, data.sequence_length, tokenizer.pad_id)
        rows = [row for row, _ in zip(iter(stream.next_row, None), range(data.evaluation.sequences), strict=False)]
    if not rows:
        raise InputError("data.evaluation: none of its documents can be read; `detour inspect` names what is damaged")
    padding = np.full(data.sequence_length, tokenizer.pad_id, np.int32)
    while len(rows) % (micro * size):
        rows.append(PackedSequence(padding, (), 0, len(rows)))
    mine = rows[rank::size]
    return NumpyBatches(targets)([mine[i : i + micro] for i in range(0, len(mine), micro)])


def _progress(sources: Sequence[Source], streams: Sequence[Stream]) -> dict[str, Any]:
    by_source = {source.name: [stream.mixture.cursors[i] for stream in streams] for i, source in enumerate(sources)}
    return {
        "epochs": {name: max(cursor.epoch for cursor in cursors) for name, cursors in by_source.items()},
        "drawn": {
            name: Drawn(
                *(sum(counts) for counts in zip(*((c.tokens, c.documents, c.skipped) for c in cursors), strict=True))
            )
            for name, cursors in by_source.items()
        },
    }


def _fingerprint(data: Data, place: int, source: Source) -> str:
    """Identity of everything that decides the order of the tokens of a source, the one at `place` of the mixture."""
    layout = (data.seed, data.sequence_length, data.streams, BUFFER, MEMORY, FORMAT)
    settings = (source.fingerprint, source.weight, source.epochs, place, *layout)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def _checked(state: dict[str, Any], stream: int, prints: dict[str, str]) -> dict[str, Any]:
    """The state of one stream, provided that it is of this data."""
    found: dict[str, Any] | None = state.get(str(stream))
    if found is None:
        raise InputError(f"data.streams: the checkpoint holds no stream {stream}; set the number it was made with")
    old = found["data"]
    changed = sorted(name for name in old.keys() | prints.keys() if old.get(name) != prints.get(name))
    if changed:
        raise InputError(
            f"source {', '.join(changed)}: its shards, weight, epochs or place among the sources, or data.streams, "
            "seed or sequence_length are not those of the checkpoint, so the run cannot continue exactly; restore "
            "them, or start another run"
        )
    return found


def _ahead(
    steps: Generator[StepData, None, None], depth: int, closed: threading.Event, turn: threading.Event, *, yields: bool
) -> Generator[StepData, None, None]:
    """The same steps, `depth` of them made in advance in a thread that ends when the generator is closed.

    closed: Set then, so that the thread does not wait for a store that is not answering. turn: while it is set, steps
    are made. yields: it is cleared when a step is taken, unless none is left.
    """
    ready: queue.Queue[StepData | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()
    turn.set()

    def put(item: StepData | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            while not stop.is_set():
                turn.wait()
                step = next(steps, None)
                put(step)
                if step is None:
                    return
        except BaseException as error:
            put(error)
        finally:
            steps.close()

    thread = threading.Thread(target=work, name="detour-data", daemon=True)
    thread.start()
    try:
        while True:
            if ready.empty():
                turn.set()
            elif yields:
                turn.clear()
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        turn.set()
        closed.set()
        thread.join()
