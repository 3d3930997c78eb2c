"""Online best-fit packing of documents into rows of a fixed length."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BUFFER = 64
"""Pieces that a stream holds back to fill rows from.

A larger buffer fills rows better. But its tokens are missing from the mixture's shares until they are trained on.
"""

Reference = tuple[int, int, int, int, int]
"""(source, epoch, position in the epoch, first token, end): enough to read a piece again."""


class Piece(NamedTuple):
    """A document, or a part of a document that is longer than a row."""

    ids: NDArray[np.int32]
    """`[tokens]`; marked ones as `identifiers.with_marks` writes them."""
    reference: Reference


class Buffer:
    """Pieces that wait for a row.

    A row starts with the oldest piece, so that every piece gets its turn. Then it takes the longest that still fits.
    """

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self._pieces: dict[int, Piece] = {}  # by arrival, oldest first
        self._lengths: list[
            tuple[int, int]
        ] = []  # (length, -arrival), ascending: among equal lengths the oldest comes last
        self._arrivals = 0
        for piece in pieces:
            self.add(piece)

    def __len__(self) -> int:
        return len(self._pieces)

    def pieces(self) -> tuple[Piece, ...]:
        """The pieces, oldest first."""
        return tuple(self._pieces.values())

    def add(self, piece: Piece) -> None:
        """Append the youngest piece."""
        self._pieces[self._arrivals] = piece
        insort(self._lengths, (len(piece.ids), -self._arrivals))
        self._arrivals += 1

    def oldest(self) -> Piece | None:
        """Remove and return the oldest piece; None if the buffer is empty."""
        if not self._pieces:
            return None
        arrival, piece = next(iter(self._pieces.items()))
        self._lengths.pop(bisect_right(self._lengths, (len(piece.ids), -arrival)) - 1)
        return self._pieces.pop(arrival)

    def best_fit(self, space: int) -> Piece | None:
        """Remove and return the longest piece of at most `space` tokens, the oldest of equals; None if none fits."""
        fitting = bisect_right(self._lengths, (space, 0))
        if fitting == 0:
            return None
        _, arrival = self._lengths.pop(fitting - 1)
        return self._pieces.pop(-arrival)


def packing_ratio(lengths: Iterable[int], row: int) -> float:
    """Share of tokens that are not padding in rows packed from documents of these lengths.

    Args:
        lengths: Tokens per document, special tokens included.
        row: Tokens per row.
    """
    blank = np.zeros(row, np.int32)
    parts = (min(row, length - start) for length in lengths for start in range(0, length, row))
    pieces = (Piece(blank[:part], (0, 0, 0, 0, 0)) for part in parts)
    buffer = Buffer(islice(pieces, BUFFER))
    rows: list[int] = []
    while (piece := buffer.oldest()) is not None:
        rows.append(0)
        while piece is not None:
            rows[-1] += len(piece.ids)
            for following in islice(pieces, 1):
                buffer.add(following)
            piece = buffer.best_fit(row - rows[-1])
    full = rows[:-1] or rows  # the last row holds the rest
    return sum(full) / (len(full) * row)
