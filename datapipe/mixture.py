"""Which document a stream takes next: positions in the sources, and the share of each by tokens."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from datapipe.order import Segment, permutation, segments
from datapipe.shards import DamagedError
from datapipe.source import Source

ENCODE_AHEAD = 64
"""Documents of raw text that are tokenized at once."""
MEMORY = 128
"""Draws over which the mean of the tokens that wait for a row is taken."""
_log = logging.getLogger(__name__)


class Document(NamedTuple):
    """A document as a stream draws it."""

    ids: NDArray[np.int32]
    """[CLS] ids [SEP]"""
    source: int
    epoch: int
    position: int
    """Among the stream's documents of the source in that epoch."""


@dataclass(frozen=True)
class CursorState:
    """What a cursor needs to go on; its fields are the cursor's."""

    epoch: int
    position: int
    tokens: int
    documents: int
    skipped: int
    waiting: float


class Cursor:
    """Where one stream stands in one source."""

    def __init__(self, source: Source, streams: int, stream: int, seed: int) -> None:
        self.source = source
        self.epoch = self.position = 0
        self.tokens = self.documents = self.skipped = 0
        """Drawn so far, special tokens included and empty documents not; and damaged documents left out."""
        self.waiting = 0.0
        """Mean tokens drawn that wait for a row."""
        self._share = (streams, stream)
        self._key = (seed, source.name)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    @property
    def exhausted(self) -> bool:
        return self.epoch == self.source.epochs

    def next(self) -> tuple[NDArray[np.int32], int, int] | None:
        """The next document that is not empty, its epoch and its position; None after the source's last epoch."""
        started = self.epoch
        while not self.exhausted:
            plan = self._plan(self.epoch)
            if self.position >= len(plan):
                self.epoch, self.position = self.epoch + 1, 0
                if self.epoch > started + self._share[0]:  # a stream gets documents once in so many epochs at least
                    if not self.source.usable():
                        raise InputError(
                            f"source {self.source.name}: every document is empty or damaged; prepare it again"
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
        """Count a document as left out. Raises the error where the run is to stop for it."""
        if not self.source.skips:
            raise error
        self.skipped += 1
        if str(error) not in self.source.reported:  # a damaged shard is met once for each of its documents
            self.source.reported.add(str(error))
            _log.warning("source %s: skipped: %s", self.source.name, error)

    def read(self, epoch: int, position: int) -> NDArray[np.int32]:
        return self.source.wrapped(*self.locate(epoch, position))

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """Shard and document number."""
        return self._plan(epoch).locate(position)

    def state(self) -> CursorState:
        return CursorState(self.epoch, self.position, self.tokens, self.documents, self.skipped, self.waiting)

    def restore(self, state: CursorState) -> None:
        vars(self).update(vars(state))

    def _plan(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = _Epoch(self.source.documents, *self._share, epoch, self._key)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _look_ahead(self, plan: _Epoch, position: int) -> None:
        """Have the next shard fetched, and the next documents of raw text tokenized."""
        shard = plan.next_shard(position)
        if shard is not None:
            self.source.store.ahead(self.source.shards[shard])
        if self.source.raw and position % ENCODE_AHEAD == 0:
            end = min(position + ENCODE_AHEAD, len(plan))
            self.source.encode_ahead([plan.locate(place) for place in range(position, end)])


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
        """The shard after the one that starts at this position, if one starts here and another follows."""
        number = bisect_right(self._starts, position)
        starts = self._starts[number - 1] == position and number < len(self._segments)
        return self._segments[number].shard if starts else None

    def _order(self, number: int, segment: Segment) -> NDArray[np.int64]:
        order = self._orders[number] = permutation(segment.count, *self._key, segment.shard, segment.first)
        if len(self._orders) > 2:
            self._orders.popitem(last=False)
        return order


class Mixture:
    """Draws from the sources so that each keeps its share of the tokens in rows, without a random number: the next
    document is of the source that is furthest behind. One that has reached its `epochs` leaves its share to the others.

    Two biases would otherwise add up over the streams. Documents that are hard to fit wait longest for a row, so of
    some sources more waits than their share: a slow mean of it is not counted. (Its value at the moment would be chased
    until nothing else waits, and rows would fill badly.) And a draw overshoots by half a document on average.
    """

    def __init__(self, sources: Sequence[Source], streams: int, stream: int, seed: int) -> None:
        self.cursors = [Cursor(source, streams, stream, seed) for source in sources]

    def next(self, waiting: Sequence[int]) -> Document | None:
        """None when every source has reached its `epochs`. waiting: tokens of each source that wait for a row."""
        draws = 1 + sum(cursor.documents for cursor in self.cursors)
        for cursor, tokens in zip(self.cursors, waiting, strict=True):
            cursor.waiting += (tokens - cursor.waiting) / min(draws, MEMORY)
        while True:
            best, number = float("inf"), -1
            for i, cursor in enumerate(self.cursors):
                half = cursor.tokens / cursor.documents / 2 if cursor.documents else 0.0
                progress = (cursor.tokens - cursor.waiting + half) / cursor.source.weight
                if not cursor.exhausted and progress < best:
                    best, number = progress, i
            if number < 0:
                return None
            drawn = self.cursors[number].next()
            if drawn is not None:
                ids, epoch, position = drawn
                return Document(ids, number, epoch, position)

    def state(self) -> dict[str, CursorState]:
        return {cursor.source.name: cursor.state() for cursor in self.cursors}

    def restore(self, state: dict[str, CursorState]) -> None:
        for cursor in self.cursors:
            cursor.restore(state[cursor.source.name])
