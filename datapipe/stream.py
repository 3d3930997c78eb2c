"""A logical stream: a sequence of packed rows that continues exactly from any row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from datapipe.batch import PackedSequence
from datapipe.mixture import CursorState, Document, Mixture
from datapipe.packing import BUFFER, Buffer, Piece, Reference
from datapipe.shards import DamagedError
from datapipe.source import Source


class StreamState(NamedTuple):
    """The position of a stream. Buffered documents are named, not stored."""

    number: int
    """Rows made so far."""
    sources: dict[str, CursorState]
    """Cursors by source."""
    buffer: tuple[Reference, ...]
    """Pieces that wait for a row, oldest first."""
    document: Reference | None
    """The document that is being cut, and the next part of it."""

    def to_json(self) -> dict[str, Any]:
        """The form in which a checkpoint holds it."""
        return {**self._asdict(), "sources": {name: state._asdict() for name, state in self.sources.items()}}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> StreamState:
        """The inverse of `to_json`."""
        return cls(
            tree["number"],
            {name: CursorState(**state) for name, state in tree["sources"].items()},
            tuple(_reference(*reference) for reference in tree["buffer"]),
            None if tree["document"] is None else _reference(*tree["document"]),
        )


def _reference(source: int, epoch: int, position: int, part: int) -> Reference:
    return source, epoch, position, part


class StreamSnapshot(NamedTuple):
    """The position of a stream as it is kept for every step: cheap to take, and shared with the stream, not copied."""

    number: int
    sources: dict[str, CursorState]
    pieces: tuple[Piece, ...]
    document: Reference | None

    def state(self) -> StreamState:
        """The position without the tokens of the pieces."""
        buffer = tuple(piece.reference for piece in self.pieces)
        return StreamState(self.number, self.sources, buffer, self.document)


class Stream:
    """Makes rows from the documents that one stream owns; a function of its arguments and of nothing else.

    Args:
        sources: The corpora, in the order of the mixture.
        streams: Number of logical streams.
        stream: Number of this stream.
        seed: Seed of the order.
        length: Tokens per row.
        pad_id: Padding token.
    """

    def __init__(
        self, sources: Sequence[Source], streams: int, stream: int, seed: int, length: int, pad_id: int
    ) -> None:
        self._stream, self._length, self._pad_id = stream, length, pad_id
        self.mixture = Mixture(sources, streams, stream, seed)
        self._number = 0
        self._buffer = Buffer()
        self._waiting = [0] * len(sources)  # tokens in the buffer, per source
        # A document is cut as its parts are needed, so that a huge document never fills the buffer.
        self._document: Document | None = None
        self._part = 0

    def next_row(self) -> PackedSequence | None:
        """Make the next row; None at the end of the data, which comes only if every source has `epochs`."""
        self._fill()
        piece = self._buffer.oldest()
        if piece is None:
            return None
        ids = np.full(self._length, self._pad_id, np.int32)
        lengths, documents, used = [], [], 0
        while piece is not None:
            self._waiting[piece.reference[0]] -= len(piece.ids)
            ids[used : used + len(piece.ids)] = piece.ids
            lengths.append(len(piece.ids))
            documents.append(piece.reference)
            used += len(piece.ids)
            self._fill()
            piece = self._buffer.best_fit(self._length - used)
        self._number += 1
        return PackedSequence(ids, tuple(lengths), self._stream, self._number - 1, tuple(documents))

    def locate(self, source: int, epoch: int, position: int) -> tuple[str, int]:
        """The `source/shard` of a document, and its number in that shard."""
        cursor = self.mixture.cursors[source]
        shard, number = cursor.locate(epoch, position)
        return f"{cursor.source.name}/{cursor.source.shards[shard].name}", number

    def snapshot(self) -> StreamSnapshot:
        """The present position, immutable."""
        document = None if self._document is None else self._piece(self._document, self._part).reference
        return StreamSnapshot(self._number, self.mixture.state(), self._buffer.pieces(), document)

    def restore(self, state: StreamState) -> None:
        """Continue from a state of the same stream; only the buffered documents are read again.

        A document that was lost meanwhile counts as damaged.
        """
        self._number = state.number
        self.mixture.restore(state.sources)
        pieces = [*state.buffer, *([state.document] if state.document else [])]
        documents = {name: self._read(*name) for name in dict.fromkeys(piece[:3] for piece in pieces)}
        for piece in state.buffer:
            if (document := documents[piece[:3]]) is not None:
                self._add(self._piece(document, piece[3]))
        if state.document is not None:
            self._document, self._part = documents[state.document[:3]], state.document[3]

    def _fill(self) -> None:
        while len(self._buffer) < BUFFER:
            if self._document is None:
                self._document, self._part = self.mixture.next(self._waiting), 0
                if self._document is None:
                    return
            self._add(self._piece(self._document, self._part))
            self._part += 1
            if self._part * self._length >= len(self._document.ids):
                self._document = None

    def _add(self, piece: Piece) -> None:
        self._buffer.add(piece)
        self._waiting[piece.reference[0]] += len(piece.ids)

    def _piece(self, document: Document, part: int) -> Piece:
        ids = document.ids[part * self._length : (part + 1) * self._length]
        return Piece(ids, (document.source, document.epoch, document.position, part))

    def _read(self, source: int, epoch: int, position: int) -> Document | None:
        """Read a document that was drawn before; None if it is skipped."""
        cursor = self.mixture.cursors[source]
        try:
            return Document(cursor.read(epoch, position), source, epoch, position)
        except DamagedError as error:
            cursor.skip(error)
            return None
