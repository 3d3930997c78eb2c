"""The data of a run, step by step: one data-parallel rank's share of every global batch.

A batch comes together in these stages, each a pure function of the stage before it and of the seed:

    shard           000003.tar: documents of token ids
      v   Source          one corpus: any document by (shard, number), framed as the tokenizer frames it
      v   Cursor          position of one stream in one source; an order per epoch
      v   Mixture         picks the source that is furthest behind its share of the tokens
      v   Buffer          64 pieces that wait; a piece is a document, or a part of a document longer than a row
      v   PackedSequence  a row: the oldest piece, then the longest pieces that still fit, then padding
      v   Targets         inputs and labels of the row, masked by a hash of (seed, stream, row, position)
    MicroBatch      rows end to end, and `cu_seqlens`, the boundaries of their documents

An example with rows of 8 tokens, C = [CLS], S = [SEP], M = [MASK], _ = padding or no label:

    documents       C a b S     C c S     C d e f S
    rows            C a b S C c S _       C d e f S _ _ _
    inputs          C a M S C c S _       C M e f S _ _ _
    labels          _ _ b _ _ _ _ _       _ d _ _ _ _ _ _
    cu_seqlens      0 4 7 8 13 16

The unit of exactness is the stream. `data.streams` streams divide the documents among them, and each makes its rows
alone: `batch.sequences / data.streams` rows per step. Rank r of n serves the streams r, r + n, r + 2n, ... So global
batches are the same for any number of ranks, and a run continues from the streams' positions with any other number.
Which rank trains on a row does not matter to the result: ranks may exchange rows (`engine.dealing`).

A phase with other sources, weights or row lengths has a loader of its own. Its streams continue from the positions at
the end of the phase before: `StreamState.for_phase`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from configs.errors import InputError
from configs.schema import Data
from datapipe.batch import IGNORE, Drawn, MicroBatch, Origin, PackedSequence, StepData
from datapipe.mixture import MEMORY
from datapipe.order import FORMAT
from datapipe.packing import BUFFER
from datapipe.prefetch import LaunchGate, prefetched
from datapipe.source import Source, SourceSummary
from datapipe.stream import Stream, StreamSnapshot, StreamState
from datapipe.targets import BatchMaker, Mixed, MixedBatches, NumpyBatches, Targets
from datapipe.tokenizer import Tokenizer

EVALUATION = "(evaluation)"
"""Name of the evaluation set among the fingerprints; no source can have it."""
Exchange = Callable[[list[PackedSequence], threading.Event], list[PackedSequence]]
"""Takes the rows of a step, and an event that is set when no further step is wanted; returns as many rows."""
SCAN_BYTES = 256 * 2**20
"""Largest local source that is read whole when a run starts."""


@dataclass(frozen=True)
class StepPlan:
    """The steps that a caller asks for, and how to make their batches."""

    targets: Targets | Mixed
    micro_batch_size: int
    """Rows per micro-batch; the most where objectives are mixed."""
    first: int
    """0-based step to begin with."""
    last: int
    """0-based step to end before."""
    state: dict[str, Any] | None
    """The whole `StepData.state` of step `first - 1`; None begins with the data."""
    begins_phase: bool
    """Whether the state may be that of other sources, weights or row lengths."""
    stage: Callable[[MicroBatch], Any] | None
    """Called per micro-batch in the thread that makes it, to bring it to the training device."""
    exchange: Exchange | None
    """Gives this rank's rows of a step for those that it trains on; None trains on its own."""


class Loader:
    """Serves one data-parallel rank: the streams congruent to it, in order.

    Args:
        data: Settings of the data.
        batch_sequences: Rows of the global batch.
        tokenizer: Tokenizer of the run.
        rank: Number of the data-parallel rank.
        size: Number of data-parallel ranks.
        device: GPU that is trained on, and that the dali backend makes batches on; None for the CPU.
        gate: Gate that the training step opens; a gate of its own if not given.

    Raises:
        InputError: `size` does not divide the streams, or the streams do not divide the batch.
    """

    def __init__(
        self,
        data: Data,
        batch_sequences: int,
        tokenizer: Tokenizer,
        rank: int,
        size: int,
        device: int | None = None,
        gate: LaunchGate | None = None,
    ) -> None:
        if data.streams % size:
            raise _streams_error(f"{size} data-parallel ranks must divide the {data.streams} streams")
        if batch_sequences % data.streams:
            raise _streams_error(f"{data.streams} must divide batch.sequences ({batch_sequences})")
        self._data = data
        self._tokenizer = tokenizer
        self._device = device
        self._streams = range(rank, data.streams, size)
        self._rows_per_stream = batch_sequences // data.streams
        self.gate = gate or LaunchGate()

    def steps(
        self,
        targets: Targets | Mixed,
        micro_batch_size: int,
        first: int,
        last: int,
        state: dict[str, Any] | None,
        stage: Callable[[MicroBatch], Any] | None = None,
        exchange: Exchange | None = None,
        *,
        begins_phase: bool = False,
    ) -> Generator[StepData, None, None]:
        """Yield the batches of the 0-based steps first..last-1, made ahead in a thread that ends with the generator.

        Args:
            targets: Objective, or a mixture, of which each micro-batch has one.
            micro_batch_size: Rows per micro-batch, the most in a mixture; divides the rows of a rank.
            first: Step to begin with.
            last: Step to end before.
            state: `StepData.state` of step `first - 1`, united over the ranks, whatever their number was. None begins
                with the data.
            stage: Called per micro-batch in the thread, to bring it to the training device.
            exchange: Called per step in the thread, to exchange rows with other ranks.
            begins_phase: A phase begins with `first`, so the state may be that of other sources, weights or lengths.

        Raises:
            InputError: The state is of other data, a document cannot be read, or the data ends.
            RunFailedError: A remote store does not answer.
        """
        rows = len(self._streams) * self._rows_per_stream
        if rows % micro_batch_size:
            raise InputError(
                f"batch.micro: {micro_batch_size} must divide the {rows} rows of a rank",
                key="batch.micro",
                code="not-a-divisor",
            )
        plan = StepPlan(targets, micro_batch_size, first, last, state, begins_phase, stage, exchange)
        cancelled = threading.Event()
        steps = self._make_steps(plan, cancelled)
        return prefetched(steps, self._data.prefetch, cancelled, self.gate, closes=self._device is not None)

    def describe(self, origin: Origin) -> str:
        """A row for people: its number, its stream, and the shards and documents that it was packed from."""
        with ExitStack() as stack:
            stream = self._open_streams(self._open_sources(stack), [origin.stream])[origin.stream]
            locations = [stream.locate(*document[:3]) for document in origin.documents]
        documents = ", ".join(f"{shard} document {number}" for shard, number in dict.fromkeys(locations))
        return f"sequence {origin.number} of stream {origin.stream} ({documents})"

    def _open_sources(self, stack: ExitStack, *more: Any) -> list[Source]:
        return [
            stack.enter_context(closing(Source(config, self._data, self._tokenizer, *more)))
            for config in self._data.sources
        ]

    def _open_streams(self, sources: Sequence[Source], numbers: Collection[int]) -> dict[int, Stream]:
        data, pad_id = self._data, self._tokenizer.pad_id
        return {
            number: Stream(sources, data.streams, number, data.seed, data.sequence_length, pad_id) for number in numbers
        }

    def _make_steps(self, plan: StepPlan, cancelled: threading.Event) -> Generator[StepData, None, None]:
        with ExitStack() as stack:
            sources = self._open_sources(stack, len(self._streams), cancelled)
            streams = self._open_streams(sources, self._streams)
            identity = self._identity(sources)
            if plan.state is not None:
                for number, stream in streams.items():
                    stream.restore(self._stream_state(_saved(plan.state, number), identity, plan.begins_phase))
                identity = identity.with_idle(next(iter(plan.state.values())))
            make_batches = self._batch_maker(plan.targets, plan.micro_batch_size)
            limited = all(source.epochs is not None for source in sources)
            rows = None
            for step in range(plan.first, plan.last):
                rows = rows or self._next_rows(streams.values())
                if rows is None:
                    raise end_of_data(step)
                if plan.exchange:
                    rows = plan.exchange(rows, cancelled)
                size = plan.micro_batch_size
                micro_batches = tuple(make_batches([rows[i : i + size] for i in range(0, len(rows), size)], step))
                snapshots = {str(number): stream.snapshot() for number, stream in streams.items()}
                made = StepData(
                    step=step,
                    micro_batches=micro_batches,
                    staged=tuple(map(plan.stage, micro_batches)) if plan.stage else (),
                    encode_state=partial(_encode, snapshots, identity),
                    **_progress(sources, list(streams.values())),
                )
                # Ranks reach the end at different steps, so they are told while they all still have a batch.
                looks_ahead = limited and step + 1 < plan.last
                rows = self._next_rows(streams.values()) if looks_ahead else None
                yield replace(made, ends=looks_ahead and rows is None)

    def _identity(self, sources: Sequence[Source]) -> _Identity:
        data = self._data
        order = {source.name: _order_fingerprint(data, place, source) for place, source in enumerate(sources)}
        content = {source.name: _content_fingerprint(data, source) for source in sources}
        if data.evaluation is not None:  # because losses before and after a restart belong to one curve
            with closing(Source(data.evaluation.source, data, self._tokenizer)) as held_out:
                order[EVALUATION] = held_out.fingerprint
        return _Identity(order, content)

    def _stream_state(self, saved: dict[str, Any], identity: _Identity, begins_phase: bool) -> StreamState:
        """The state from which a stream continues, provided that it is of this data."""
        state = StreamState.from_json(saved, self._data.sequence_length)
        before, now = saved["data"], identity.order
        if before == now:
            return state
        if not begins_phase or before.get(EVALUATION, now.get(EVALUATION)) != now.get(EVALUATION):
            raise _data_changed(before, now)
        if {**before, EVALUATION: None} == {**now, EVALUATION: None}:  # a branch may add an evaluation set
            return state
        known = {name: saved.get("content", {}).get(name) for name in [*state.sources, *state.idle]}
        content = {name: fingerprint for name, fingerprint in identity.content.items() if name in known}
        if changed := {name: known[name] for name in content if known[name] != content[name]}:
            raise _data_changed(changed, {name: content[name] for name in changed})
        return state.for_phase(list(identity.content), self._data.sequence_length)

    def _batch_maker(self, targets: Targets | Mixed, micro_batch_size: int) -> BatchMaker:
        if isinstance(targets, Mixed):
            return MixedBatches(targets, partial(self._batch_maker, micro_batch_size=micro_batch_size))
        if self._data.backend == "numpy":
            return NumpyBatches(targets)
        from datapipe.dali import DaliBatches

        length, pad_id = self._data.sequence_length, self._tokenizer.pad_id
        return DaliBatches(targets, micro_batch_size, length, pad_id, self._device)

    def _next_rows(self, streams: Collection[Stream]) -> list[PackedSequence] | None:
        """Rows of the next step; None if a stream has no more of them."""
        count = self._rows_per_stream
        rows = [row for stream in streams for _ in range(count) if (row := stream.next_row()) is not None]
        return rows if len(rows) == len(streams) * count else None


def end_of_data(step: int) -> InputError:
    """The error for sources that end before the phases of the run."""
    return InputError(
        f"data.sources: all have reached their `epochs` at step {step}, before the phases end; `detour export` takes "
        "what the checkpoints hold, and for another run shorten the phases, or let a source repeat",
        key="data.sources",
        code="end-of-data",
    )


def check_sources(data: Data, tokenizer: Tokenizer, vocab_size: int) -> list[SourceSummary]:
    """Check the sources and the evaluation set, and return a summary of each; the evaluation set comes last.

    Args:
        data: Settings of the data.
        tokenizer: Tokenizer of the run.
        vocab_size: Vocabulary of the model.

    Raises:
        InputError: Shards are of another tokenizer, or their ids are beyond the vocabulary. Under `on_error: stop` also
            a missing, empty or truncated shard.
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
        raise InputError(f"source {source.name}: {problems[0]}{more}", key="data.sources", code=problems[0].code)
    documents, size = sum(source.documents), sum(shard.bytes for shard in source.shards)
    texts = tuple(map(str, problems))
    counts = (source.tokens, source.framed_tokens)
    contents = frozenset(shard.sha256 for shard in source.shards if shard.sha256) | {source.fingerprint}
    return SourceSummary(source.name, len(source.shards), documents, *counts, size, share, texts, contents)


def evaluation_batches(
    data: Data, targets: Targets, micro_batch_size: int, tokenizer: Tokenizer, rank: int, size: int
) -> list[MicroBatch]:
    """This rank's share of the evaluation set: the same sequences at every call, and over all ranks at every size.

    Sequences are dealt to the ranks in turn. Every rank gets the same number of micro-batches. Rows of padding, which
    have no labels, fill them up.

    Args:
        data: Settings of the data.
        targets: Objective.
        micro_batch_size: Rows per micro-batch.
        tokenizer: Tokenizer of the run.
        rank: Number of the data-parallel rank.
        size: Number of data-parallel ranks.

    Raises:
        InputError: No document of the set can be read.
    """
    assert data.evaluation is not None
    with closing(Source(data.evaluation.source, data, tokenizer)) as source:
        stream = Stream([source], 1, 0, data.seed, data.sequence_length, tokenizer.pad_id)
        rows = [row for row, _ in zip(iter(stream.next_row, None), range(data.evaluation.sequences), strict=False)]
    if not rows:
        raise InputError(
            "data.evaluation: none of its documents can be read; `detour inspect` names what is damaged",
            key="data.evaluation",
            code="no-usable-document",
        )
    padding = np.full(data.sequence_length, tokenizer.pad_id, np.int32)
    while len(rows) % (micro_batch_size * size):
        rows.append(PackedSequence(padding, (), 0, len(rows)))
    make = NumpyBatches(targets)
    if not any((make([[row]])[0].labels != IGNORE).any() for row in rows):  # of all ranks, so that all of them tell it
        raise InputError(
            f"data.evaluation: none of its tokens is a label of {targets.objective}, because all are marked as "
            "identifiers or are alone in their documents; hold out other documents, or leave data.evaluation out",
            key="data.evaluation",
            code="no-label",
        )
    own_rows = rows[rank::size]
    starts = range(0, len(own_rows), micro_batch_size)
    return make([own_rows[i : i + micro_batch_size] for i in starts])


def _streams_error(fault: str) -> InputError:
    return InputError(f"data.streams: {fault}", key="data.streams", code="not-a-divisor")


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


class _Identity(NamedTuple):
    """Fingerprints of the sources, by name."""

    order: dict[str, str]
    """Everything that decides the rows made from the source in this phase."""
    content: dict[str, str]
    """Everything that decides the order of the source's own documents, in any phase. Idle sources are included."""

    def with_idle(self, saved: dict[str, Any]) -> _Identity:
        """Keep the fingerprints of the sources that a saved stream names and this phase does not draw from."""
        return self._replace(content={**saved.get("content", {}), **self.content})


def _order_fingerprint(data: Data, place: int, source: Source) -> str:
    layout = (data.seed, data.sequence_length, data.streams, BUFFER, MEMORY, FORMAT)
    return _hash(source.fingerprint, source.weight, source.epochs, place, *layout)


def _content_fingerprint(data: Data, source: Source) -> str:
    return _hash(source.fingerprint, source.epochs, data.seed, data.streams, FORMAT)


def _hash(*settings: Any) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def _encode(snapshots: dict[str, StreamSnapshot], identity: _Identity) -> dict[str, Any]:
    fingerprints = {"data": identity.order, "content": identity.content}
    return {number: {**fingerprints, **snapshot.state().to_json()} for number, snapshot in snapshots.items()}


def _saved(state: dict[str, Any], stream: int) -> dict[str, Any]:
    """The saved state of one stream."""
    saved: dict[str, Any] | None = state.get(str(stream))
    if saved is None:
        raise InputError(
            f"data.streams: the checkpoint holds no stream {stream}; set the number it was made with",
            key="data.streams",
            code="stream-missing",
        )
    return saved


def _data_changed(old: dict[str, Any], new: dict[str, Any]) -> InputError:
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return InputError(
        f"source {', '.join(changed)}: its shards, weight, epochs or place among the sources, or data.streams, "
        "seed or sequence_length are not those of the checkpoint, so the run cannot continue exactly; restore "
        "them, or start another run",
        key="data.sources",
        code="data-changed",
    )
