"""What the model sees and what it must predict, from packed tokens: pure functions of each row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from datapipe.batch import IGNORE, Ids, MicroBatch, PackedSequence, frame


class Targets(Protocol):
    def __call__(self, rows: Sequence[PackedSequence]) -> tuple[Ids, Ids]:
        """Inputs and labels, int64 [rows, sequence_length]; labels are IGNORE where no loss is paid.

        A row's are the same whatever rows come with it: together they take fewer calls of NumPy.
        """
        ...


@dataclass(frozen=True)
class NextToken:
    """Causal language modelling: every token of a document but the last predicts the one after it."""

    def __call__(self, rows: Sequence[PackedSequence]) -> tuple[Ids, Ids]:
        inputs = _ids(rows).astype(np.int64)
        labels = np.full_like(inputs, IGNORE)
        labels[:, :-1] = inputs[:, 1:]
        for row, paid in zip(rows, labels, strict=True):
            paid[np.cumsum(row.lengths, dtype=np.int64) - 1] = IGNORE
            paid[sum(row.lengths) :] = IGNORE
        return inputs, labels


@dataclass(frozen=True)
class Masked:
    """Masked language modelling (Devlin et al. 2019) by an integer hash instead of a random generator.

    Whether and how a position is masked depends on (seed, stream, number of the row, position) only. Special tokens
    are never masked. A random replacement is uniform over the tokenizer's other tokens: a [CLS] or [SEP] in the middle
    of a document would tell the model of a boundary that is not there.
    """

    rate: float
    """Share of the maskable tokens that is predicted."""
    split: tuple[float, float, float]
    """Of these: shares replaced by the mask token, by a random token, left as they are."""
    seed: int
    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    _maskable: NDArray[np.bool_] = field(init=False, repr=False, compare=False)
    _ordinary: Ids = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        maskable = np.ones(self.vocab_size, bool)
        maskable[list(self.special_ids)] = False
        object.__setattr__(self, "_maskable", maskable)
        object.__setattr__(self, "_ordinary", np.flatnonzero(maskable))

    def __call__(self, rows: Sequence[PackedSequence]) -> tuple[Ids, Ids]:
        ids = _ids(rows)
        inputs = ids.astype(np.int64)
        labels = np.full_like(inputs, IGNORE)
        choice, action, draw = np.stack([keys(self.seed, row) for row in rows], axis=1)
        ends = np.array([sum(row.lengths) for row in rows])
        chosen = hashes(choice[:, None], np.arange(ids.shape[1], dtype=np.uint32)) < threshold(self.rate)
        row, place = np.nonzero(chosen)
        maskable = self._maskable[ids[row, place]] & (place < ends[row])
        row, place = row[maskable], place[maskable]
        labels[row, place] = inputs[row, place]
        actions = hashes(action[row], place.astype(np.uint32))
        hidden = actions < threshold(self.split[0])
        inputs[row[hidden], place[hidden]] = self.mask_id
        randomised = ~hidden & (actions < threshold(sum(self.split[:2])))
        row, place = row[randomised], place[randomised]
        # The high half of a 64-bit product maps a uint32 to 0..n-1 evenly.
        ranks = hashes(draw[row], place.astype(np.uint32)).astype(np.uint64) * np.uint64(len(self._ordinary))
        inputs[row, place] = self._ordinary[ranks >> np.uint64(32)]
        return inputs, labels


@dataclass(frozen=True)
class NumpyBatches:
    """Micro-batches on the CPU, by NumPy."""

    targets: Targets

    def __call__(self, batches: Sequence[Sequence[PackedSequence]]) -> list[MicroBatch]:
        """Rows of each micro-batch -> the micro-batches."""
        inputs, labels = self.targets(list(chain.from_iterable(batches)))
        made, first = [], 0
        for rows in batches:
            here = slice(first, first + len(rows))
            made.append(frame(rows, inputs[here].reshape(-1), labels[here].reshape(-1)))
            first = here.stop
        return made


def _ids(rows: Sequence[PackedSequence]) -> NDArray[np.int32]:
    return np.stack([row.ids for row in rows])


def threshold(share: float) -> np.uint32:
    """A uniform uint32 lies below it with probability `share` (to 2**-32)."""
    return np.uint32(min(round(share * 2**32), 2**32 - 1))


def keys(seed: int, row: PackedSequence) -> NDArray[np.uint32]:
    """[3] keys of a row: which positions are predicted, what becomes of each, and the random replacements."""
    words = f"{seed} {row.stream} {row.number}".encode()
    return np.frombuffer(hashlib.blake2b(words, digest_size=12).digest(), "<u4")


def hashes(key: NDArray[np.uint32], positions: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A uniform uint32 for each position; the two are broadcast.

    Only uint32 additions, multiplications, exclusive ors and shifts, which every backend computes to the same bits.
    """
    return mix(mix(positions * np.uint32(0x9E3779B9) + key) + key)


def mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The `lowbias32` integer hash (C. Wellons, "Prospecting for Hash Functions", 2018): a bijection of uint32."""
    x = x ^ (x >> np.uint32(16))
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x
