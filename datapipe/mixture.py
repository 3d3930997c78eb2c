"""The next document of a stream: its position in each source, and the sources' shares of the tokens."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from datapipe.order import Segment, permutation, segments
from datapipe.source import Source
from datapipe.tar_members import DamagedError

ENCODE_AHEAD = 64
"""Documents of raw text tokenized at once."""
MEMORY = 128
"""Draws over which the tokens that wait for a row are averaged."""
_log = logging.getLogger(__name__)


class Document(NamedTuple):
    """A document as a stream draws it."""

    ids: NDArray[np.int32]
    """`[tokens]`, [CLS] and [SEP] included; marked ones as `identifiers.with_marks` writes them."""
    source: int
    """Number of the source."""
    epoch: int
    position: int
    """Position among the stream's documents of the source in that epoch."""


class CursorState(NamedTuple):
    """The state from which a cursor continues; its fields are the cursor's attributes."""

    epoch: int
    position: int
    tokens: int
    documents: int
    skipped: int
    waiting: float
    base: float = 0.0


class Cursor:
    """The position of one stream in one source."""

    def __init__(self, source: Source, streams: int, stream: int, seed: int) -> None:
        self.source = source
        self.epoch = self.position = 0
        self.tokens = self.documents = self.skipped = 0
        """Tokens and documents drawn so far, special tokens included, and damaged documents left out."""
        self.waiting = 0.0
        """Mean of the drawn tokens that wait for a row."""
        self.base = 0.0
        """Tokens in rows when the present shares began; shares hold from there on."""
        self._share = (streams, stream)
        self._key = (seed, source.name)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    @property
    def exhausted(self) -> bool:
        """Whether the source has reached its `epochs`."""
        return self.epoch == self.source.epochs

    def next(self) -> tuple[NDArray[np.int32], int, int] | None:
        """The next document that is not empty, its epoch and its position; None after the source's last epoch."""
        started = self.epoch
        while not self.exhausted:
            plan = self._plan(self.epoch)
            if self.position >= len(plan):
                self.epoch, self.position = self.epoch + 1, 0
                if self.epoch > started + self._share[0]:  # within `streams` epochs every stream meets a document
                    if not self.source.usable():
                        raise InputError(
                            f"source {self.source.name}: every document is empty or damaged; prepare it again",
                            key="data.sources",
                            code="no-usable-document",
                        )
                    started = self.epoch
                continue
            epoch, position = self.epoch, self.position
            self._look_ahead(plan, position)
            self.position += 1
            try:
                ids = self.read(epoch, position)
            except DamagedError as error:
                self.skip(error)
                continue
            if len(ids):
                self.tokens += len(ids)
                self.documents += 1
                return ids, epoch, position
        return None

    def skip(self, error: DamagedError) -> None:
        """Count a document as left out; raise the error if the run stops at damage."""
        if not self.source.skips:
            raise error
        self.skipped += 1
        if str(error) not in self.source.reported:  # because a damaged shard is met once per document
            self.source.reported.add(str(error))
            _log.warning("source %s: skipped: %s", self.source.name, error)

    def read(self, epoch: int, position: int) -> NDArray[np.int32]:
        """A document with its special tokens, without moving the cursor."""
        return self.source.with_special_tokens(*self.locate(epoch, position))

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """Shard and document number."""
        return self._plan(epoch).locate(position)

    def state(self) -> CursorState:
        """An immutable snapshot."""
        return CursorState(*(getattr(self, name) for name in CursorState._fields))

    def restore(self, state: CursorState) -> None:
        """Continue from a snapshot."""
        vars(self).update(state._asdict())

    def _plan(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = _Epoch(self.source.documents, *self._share, epoch, self._key)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _look_ahead(self, plan: _Epoch, position: int) -> None:
        """Start fetching the next shard, and tokenize the next documents of raw text."""
        shard = plan.next_shard(position)
        if shard is not None:
            self.source.store.prefetch(self.source.shards[shard])
        if self.source.raw and position % ENCODE_AHEAD == 0:
            end = min(position + ENCODE_AHEAD, len(plan))
            self.source.encode_ahead([plan.locate(next_position) for next_position in range(position, end)])


class _Epoch:
    """The documents of one stream, source and epoch, by position."""

    def __init__(
        self, documents: Sequence[int], streams: int, stream: int, epoch: int, key: tuple[str | int, ...]
    ) -> None:
        self._segments = segments(documents, streams, stream, epoch, *key)
        self._starts = [0, *accumulate(segment.count for segment in self._segments)]
        self._key = (*key, epoch)
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, position: int) -> tuple[int, int]:
        """Shard and document number."""
        number = bisect_right(self._starts, position) - 1
        segment = self._segments[number]
        order = self._orders.get(number)
        if order is None:
            order = self._order(number, segment)
        return segment.shard, segment.first + int(order[position - self._starts[number]])

    def next_shard(self, position: int) -> int | None:
        """The shard to read after the shard that starts at this position; None unless one starts here."""
        number = bisect_right(self._starts, position)
        starts_here = self._starts[number - 1] == position and number < len(self._segments)
        return self._segments[number].shard if starts_here else None

    def _order(self, number: int, segment: Segment) -> NDArray[np.int64]:
        order = self._orders[number] = permutation(segment.count, *self._key, segment.shard, segment.first)
        if len(self._orders) > 2:
            self._orders.popitem(last=False)
        return order


class Mixture:
    """Draws documents so that each source keeps its share of the tokens in rows, without a random number.

    The next document comes from the source that is furthest behind. A source that has reached its `epochs` leaves its
    share to the others.

    Two biases are corrected, because they would add up over the streams:

    - Documents that are hard to fit wait longest for a row. So the mean of a source's waiting tokens is not counted.
      The mean is slow: with the present value, one source would fill the buffer, and rows would fill badly.
    - A draw overshoots by half a document on average.
    """

    def __init__(self, sources: Sequence[Source], streams: int, stream: int, seed: int) -> None:
        self.cursors = [Cursor(source, streams, stream, seed) for source in sources]

    def next(self, waiting: Sequence[int]) -> Document | None:
        """Draw the next document; None if every source has reached its `epochs`.

        Args:
            waiting: Tokens per source that wait for a row.
        """
        draws = 1 + sum(cursor.documents for cursor in self.cursors)
        for cursor, tokens in zip(self.cursors, waiting, strict=True):
            cursor.waiting += (tokens - cursor.waiting) / min(draws, MEMORY)
        while True:
            least, number = float("inf"), -1
            for i, cursor in enumerate(self.cursors):
                half = cursor.tokens / cursor.documents / 2 if cursor.documents else 0.0
                progress = (cursor.tokens - cursor.waiting - cursor.base + half) / cursor.source.weight
                if not cursor.exhausted and progress < least:
                    least, number = progress, i
            if number < 0:
                return None
            drawn = self.cursors[number].next()
            if drawn is not None:
                ids, epoch, position = drawn
                return Document(ids, number, epoch, position)

    def state(self) -> dict[str, CursorState]:
        """Immutable snapshots of the cursors, by source."""
        return {cursor.source.name: cursor.state() for cursor in self.cursors}

    def restore(self, state: dict[str, CursorState]) -> None:
        """Continue from snapshots. A source without a snapshot begins with its first document."""
        for cursor in self.cursors:
            if cursor.source.name in state:
                cursor.restore(state[cursor.source.name])
