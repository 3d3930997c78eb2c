"""A logical stream: a sequence of packed rows that continues exactly from any row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from datapipe.batch import PackedSequence
from datapipe.identifiers import split_marks
from datapipe.mixture import CursorState, Document, Mixture
from datapipe.packing import BUFFER, Buffer, Piece, Reference
from datapipe.source import Source
from datapipe.tar_members import DamagedError


class IdleSource(NamedTuple):
    """A source that the present phase does not draw from."""

    cursor: CursorState
    pieces: tuple[tuple[int, int, int, int], ...]
    """(epoch, position, first token, end) of its text that was drawn and waits for the source's return."""


class StreamState(NamedTuple):
    """The position of a stream. Buffered documents are named, not stored."""

    number: int
    """Rows made so far."""
    sources: dict[str, CursorState]
    """Cursors by source, in the order of the mixture."""
    buffer: tuple[Reference, ...]
    """Pieces that wait for a row, oldest first."""
    document: Reference | None
    """The document that is being cut, from its next part to its end."""
    idle: dict[str, IdleSource]
    """Sources that earlier phases drew from and this phase does not."""

    def to_json(self) -> dict[str, Any]:
        """The form in which a checkpoint holds it."""
        return {
            **self._asdict(),
            "sources": {name: cursor._asdict() for name, cursor in self.sources.items()},
            "idle": {
                name: {"cursor": source.cursor._asdict(), "pieces": source.pieces} for name, source in self.idle.items()
            },
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any], length: int) -> StreamState:
        """The inverse of `to_json`.

        Args:
            tree: The state.
            length: Tokens per row of the phase that saved it. Older checkpoints count documents in parts of it.
        """
        idle = {
            name: IdleSource(CursorState(**source["cursor"]), tuple(_span(*piece) for piece in source["pieces"]))
            for name, source in tree.get("idle", {}).items()
        }
        return cls(
            tree["number"],
            {name: CursorState(**state) for name, state in tree["sources"].items()},
            tuple(_reference(length, *reference) for reference in tree["buffer"]),
            None if tree["document"] is None else _reference(length, *tree["document"]),
            idle,
        )

    def for_phase(self, names: Sequence[str], length: int) -> StreamState:
        """The position at the start of a phase with other sources, other weights or rows of another length.

        No text is lost or repeated. Pieces of sources that the phase leaves out wait until the source returns. Pieces
        longer than a row are cut. The shares of the phase are counted from its start.

        Args:
            names: Sources of the phase, in the order of its mixture.
            length: Tokens per row of the phase.
        """
        before = list(self.sources)
        cursors = {**{name: source.cursor for name, source in self.idle.items()}, **self.sources}
        waiting = {name: list(source.pieces) for name, source in self.idle.items()}
        buffer: list[Reference] = []
        for source, *piece in self.buffer:
            if before[source] in names:
                buffer += _cut(names.index(before[source]), _span(*piece), length)
            else:
                waiting.setdefault(before[source], []).append(_span(*piece))
        document = None
        if self.document is not None:
            source, *piece = self.document
            if before[source] in names:
                document = (names.index(before[source]), *_span(*piece))
            else:
                waiting.setdefault(before[source], []).append(_span(*piece))
        for place, name in enumerate(names):
            buffer += [part for span in waiting.pop(name, ()) for part in _cut(place, span, length)]
        active = {
            name: cursors[name]._replace(base=cursors[name].tokens - cursors[name].waiting)
            for name in names
            if name in cursors
        }
        idle = {
            name: IdleSource(cursor, tuple(waiting.get(name, ())))
            for name, cursor in cursors.items()
            if name not in names
        }
        return StreamState(self.number, active, tuple(buffer), document, idle)


def _span(epoch: int, position: int, start: int, end: int) -> tuple[int, int, int, int]:
    return epoch, position, start, end


def _cut(source: int, span: tuple[int, int, int, int], length: int) -> list[Reference]:
    epoch, position, first, end = span
    return [(source, epoch, position, start, min(start + length, end)) for start in range(first, end, length)]


def _reference(length: int, source: int, epoch: int, position: int, start: int, end: int | None = None) -> Reference:
    if end is None:  # an older checkpoint: `start` counts parts of a row's length
        return source, epoch, position, start * length, (start + 1) * length
    return source, epoch, position, start, end


class StreamSnapshot(NamedTuple):
    """The position of a stream as it is kept for every step: cheap to take, and shared with the stream, not copied."""

    number: int
    sources: dict[str, CursorState]
    pieces: tuple[Piece, ...]
    document: Reference | None
    idle: dict[str, IdleSource]

    def state(self) -> StreamState:
        """The position without the tokens of the pieces."""
        buffer = tuple(piece.reference for piece in self.pieces)
        return StreamState(self.number, self.sources, buffer, self.document, self.idle)


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
        self._start = 0  # the first token of its next part
        self._idle: dict[str, IdleSource] = {}

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
        ids, marked = split_marks(ids)
        return PackedSequence(ids, tuple(lengths), self._stream, self._number - 1, tuple(documents), marked)

    def locate(self, source: int, epoch: int, position: int) -> tuple[str, int]:
        """The `source/shard` of a document, and its number in that shard."""
        cursor = self.mixture.cursors[source]
        shard, number = cursor.locate(epoch, position)
        return f"{cursor.source.name}/{cursor.source.shards[shard].name}", number

    def snapshot(self) -> StreamSnapshot:
        """The present position, immutable."""
        document = None
        if self._document is not None:
            ids, source, epoch, position = self._document
            document = source, epoch, position, self._start, len(ids)
        return StreamSnapshot(self._number, self.mixture.state(), self._buffer.pieces(), document, self._idle)

    def restore(self, state: StreamState) -> None:
        """Continue from a state of the same stream; only the buffered documents are read again.

        A document that was lost meanwhile counts as damaged.
        """
        self._number, self._idle = state.number, state.idle
        self.mixture.restore(state.sources)
        pieces = [*state.buffer, *([state.document] if state.document else [])]
        documents = {name: self._read(*name) for name in dict.fromkeys(piece[:3] for piece in pieces)}
        for piece in state.buffer:
            if (document := documents[piece[:3]]) is not None:
                self._add(self._piece(document, *piece[3:]))
        if state.document is not None:
            self._document, self._start = documents[state.document[:3]], state.document[3]

    def _fill(self) -> None:
        while len(self._buffer) < BUFFER:
            if self._document is None:
                self._document, self._start = self.mixture.next(self._waiting), 0
                if self._document is None:
                    return
            self._add(self._piece(self._document, self._start, self._start + self._length))
            self._start += self._length
            if self._start >= len(self._document.ids):
                self._document = None

    def _add(self, piece: Piece) -> None:
        self._buffer.add(piece)
        self._waiting[piece.reference[0]] += len(piece.ids)

    def _piece(self, document: Document, start: int, end: int) -> Piece:
        ids = document.ids[start:end]
        return Piece(ids, (document.source, document.epoch, document.position, start, start + len(ids)))

    def _read(self, source: int, epoch: int, position: int) -> Document | None:
        """Read a document that was drawn before; None if it is skipped."""
        cursor = self.mixture.cursors[source]
        try:
            return Document(cursor.read(epoch, position), source, epoch, position)
        except DamagedError as error:
            cursor.skip(error)
            return None
