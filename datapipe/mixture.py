"""Which document a stream takes next: positions in the sources, and the share of each by tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from datapipe.order import Segment, permutation, segments
from datapipe.source import Source


class Document(NamedTuple):
    """A document as a stream draws it."""

    ids: NDArray[np.int32]
    """[CLS] ids [SEP]"""
    source: int
    epoch: int
    position: int
    """Of the stream's documents of the source in that epoch."""


class Cursor:
    """Where one stream stands in one source."""

    def __init__(self, source: Source, streams: int, stream: int, seed: int) -> None:
        self.source = source
        self.epoch = self.position = 0
        self.tokens = self.documents = 0
        """Drawn so far; special tokens included, empty documents not."""
        self._share = (streams, stream)
        self._key = (seed, source.name)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def next(self) -> tuple[NDArray[np.int32], int, int]:
        """The next document that is not empty, its epoch and its position; the source starts over at its end."""
        barren = 0
        while True:
            if self.position >= len(self._plan(self.epoch)):
                self.epoch, self.position = self.epoch + 1, 0
                barren += 1
                if barren > self._share[0]:  # every turn of the rotation was met: all the documents are empty
                    raise InputError(
                        f"source {self.source.name}: every document is empty; prepare it from text that has some"
                    )
                continue
            epoch, position = self.epoch, self.position
            self.position += 1
            ids = self.read(epoch, position)
            if len(ids):
                self.tokens += len(ids)
                self.documents += 1
                return ids, epoch, position

    def read(self, epoch: int, position: int) -> NDArray[np.int32]:
        return self.source.wrapped(*self._plan(epoch).locate(position))

    def _plan(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = _Epoch(self.source.documents, *self._share, epoch, self._key)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


class _Epoch:
    """The documents of one stream, source and epoch, by position."""

    def __init__(
        self, documents: Sequence[int], streams: int, stream: int, epoch: int, key: tuple[str | int, ...]
    ) -> None:
        self._segments = segments(documents, streams, stream, epoch, *key)
        self._ends = np.cumsum([segment.count for segment in self._segments])
        self._key = (*key, epoch)
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._segments else 0

    def locate(self, position: int) -> tuple[int, int]:
        """Shard and document number."""
        number = int(np.searchsorted(self._ends, position, side="right"))
        segment = self._segments[number]
        within = position - int(self._ends[number]) + segment.count
        return segment.shard, segment.first + int(self._order(number, segment)[within])

    def _order(self, number: int, segment: Segment) -> NDArray[np.int64]:
        if number not in self._orders:
            self._orders[number] = permutation(segment.count, *self._key, segment.shard, segment.first)
            if len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[number]


class Mixture:
    """Draws from the sources so that each keeps its share of the tokens, without a random number: the next document
    is of the source that is furthest behind."""

    def __init__(self, sources: Sequence[Source], streams: int, stream: int, seed: int) -> None:
        self.cursors = [Cursor(source, streams, stream, seed) for source in sources]

    def next(self) -> Document:
        number = min(range(len(self.cursors)), key=lambda i: self.cursors[i].tokens / self.cursors[i].source.weight)
        ids, epoch, position = self.cursors[number].next()
        return Document(ids, number, epoch, position)

    def state(self) -> dict[str, list[int]]:
        """Source -> epoch, position, tokens, documents."""
        return {c.source.name: [c.epoch, c.position, c.tokens, c.documents] for c in self.cursors}

    def restore(self, state: dict[str, Any]) -> None:
        for c in self.cursors:
            c.epoch, c.position, c.tokens, c.documents = state[c.source.name]
