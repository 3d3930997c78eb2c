"""Inputs and labels of packed rows: pure functions of each row."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.schema import ObjectiveName
from datapipe.batch import IGNORE, Ids, MicroBatch, PackedSequence, collate


class Targets(Protocol):
    """An objective as the data sees it."""

    objective: ClassVar[ObjectiveName]

    def __call__(self, rows: Sequence[PackedSequence], step: int = 0) -> tuple[Ids, Ids]:
        """Inputs and labels, `[rows, sequence_length] int64`; labels are IGNORE at positions without a loss.

        Args:
            rows: Packed sequences of one step.
            step: The 0-based step that trains on them.

        The result for a row does not depend on the other rows. They come together to save NumPy calls.
        """
        ...


@dataclass(frozen=True)
class NextToken:
    """Causal language modelling: every token of a document, except the last, predicts the next token.

    A token before a marked one predicts nothing. Tokens after it may attend to it.
    """

    objective: ClassVar[ObjectiveName] = "clm"

    def __call__(self, rows: Sequence[PackedSequence], step: int = 0) -> tuple[Ids, Ids]:
        """Inputs and labels, as `Targets` says."""
        inputs = _ids(rows).astype(np.int64)
        labels = np.full_like(inputs, IGNORE)
        labels[:, :-1] = inputs[:, 1:]
        for row, row_labels in zip(rows, labels, strict=True):
            row_labels[np.cumsum(row.lengths, dtype=np.int64) - 1] = IGNORE
            row_labels[sum(row.lengths) :] = IGNORE
            if row.marked is not None:
                row_labels[:-1][row.marked[1:]] = IGNORE
        return inputs, labels


def linear_rate(first: float, last: float, steps: tuple[int, int], step: int) -> float:
    """Return the mask rate of a 0-based step in a phase of the steps steps[0]..steps[1]-1, from first to last."""
    return first + (last - first) * (step - steps[0]) / max(1, steps[1] - 1 - steps[0])


@dataclass(frozen=True)
class Masked:
    """Masked language modelling (Devlin et al. 2019) by an integer hash instead of a random generator.

    The treatment of a position depends on (seed, stream, number of the row, position) only. Special tokens are never
    masked. A random replacement is uniform over the ordinary tokens, because a [CLS] or [SEP] inside a document would
    tell the model of a boundary that does not exist. It comes from the vocabulary and never from a text, so no
    identifier is one.

    A marked token is never chosen, so it is neither a label nor replaced. The rest of its word may be chosen.

    With `starts_word` a word is predicted as a whole: the hash of its first position decides for all its tokens. A word
    ends before the next start, at a special token, and at the end of its document or row.
    """

    objective: ClassVar[ObjectiveName] = "mlm"
    rate: float
    """Share of the ordinary tokens that is predicted."""
    split: tuple[float, float, float]
    """Shares of the predicted tokens: replaced by the mask token, replaced by a random token, left as they are."""
    seed: int
    """Seed of the hash."""
    mask_id: int
    vocab_size: int
    """Number of ids, special tokens included."""
    special_ids: tuple[int, ...]
    starts_word: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)
    """`[vocab_size]`, whether a piece begins a word (`datapipe.words`); None masks token by token."""
    final_rate: float | None = None
    """`rate` of the phase's last step, if it changes linearly; None keeps it."""
    steps: tuple[int, int] = (0, 1)
    """0-based first step of the phase, and the step after its end."""
    maskable: NDArray[np.bool_] = field(init=False, repr=False, compare=False)
    """`[vocab_size]`, whether a token is an ordinary one."""
    ordinary: Ids = field(init=False, repr=False, compare=False)
    """The ordinary tokens, in ascending order."""

    def __post_init__(self) -> None:
        maskable = np.ones(self.vocab_size, bool)
        maskable[list(self.special_ids)] = False
        object.__setattr__(self, "maskable", maskable)
        object.__setattr__(self, "ordinary", np.flatnonzero(maskable))

    def __call__(self, rows: Sequence[PackedSequence], step: int = 0) -> tuple[Ids, Ids]:
        """Inputs and labels, as `Targets` says."""
        ids = _ids(rows)
        inputs = ids.astype(np.int64)
        labels = np.full_like(inputs, IGNORE)
        choice, action, draw = np.stack([row_keys(self.seed, row) for row in rows], axis=1)
        ends = np.array([sum(row.lengths) for row in rows])
        chosen = position_hashes(choice[:, None], self.units(rows)) < threshold(self.rate_at(step))
        for row_chosen, one in zip(chosen, rows, strict=True):
            if one.marked is not None:
                row_chosen &= ~one.marked
        row, position = np.nonzero(chosen)
        maskable = self.maskable[ids[row, position]] & (position < ends[row])
        row, position = row[maskable], position[maskable]
        labels[row, position] = inputs[row, position]
        actions = position_hashes(action[row], position.astype(np.uint32))
        masked = actions < threshold(self.split[0])
        inputs[row[masked], position[masked]] = self.mask_id
        randomised = ~masked & (actions < threshold(sum(self.split[:2])))
        row, position = row[randomised], position[randomised]
        # The high half of a 64-bit product maps a uint32 to 0..n-1 evenly.
        draws = position_hashes(draw[row], position.astype(np.uint32)).astype(np.uint64)
        ranks = draws * np.uint64(len(self.ordinary))
        inputs[row, position] = self.ordinary[ranks >> np.uint64(32)]
        return inputs, labels

    def rate_at(self, step: int) -> float:
        """Return the share of the ordinary tokens that a 0-based step predicts."""
        return self.rate if self.final_rate is None else linear_rate(self.rate, self.final_rate, self.steps, step)

    def units(self, rows: Sequence[PackedSequence]) -> NDArray[np.uint32]:
        """`[rows, sequence_length]`, the position that is hashed to decide for each position: its word's first."""
        ids = _ids(rows)
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.uint32), ids.shape)
        if self.starts_word is None:
            return positions
        starts = self.starts_word[ids]
        starts[:, 1:] |= ~self.maskable[ids[:, :-1]]
        for row, row_starts in zip(rows, starts, strict=True):
            row_starts[np.cumsum((0, *row.lengths[:-1]), dtype=np.int64)] = True
        return np.maximum.accumulate(np.where(starts, positions, np.uint32(0)), axis=1)


@dataclass(frozen=True)
class Mixed:
    """Several objectives: each row has one, drawn by a hash of (seed, stream, number of the row)."""

    targets: tuple[Targets, ...]
    shares: tuple[float, ...]
    """Share of the rows that each has; they add up to 1."""
    seed: int
    """Seed of the hash."""

    def draw(self, row: PackedSequence) -> int:
        """Return the place in `targets` of a row's objective."""
        # `person` keeps the hash apart from that of the masks.
        words = f"{self.seed} {row.stream} {row.number}".encode()
        drawn = int.from_bytes(hashlib.blake2b(words, digest_size=4, person=b"objective").digest(), "little")
        return bisect_right(self._bounds, drawn)

    @cached_property
    def _bounds(self) -> list[int]:
        return [int(threshold(bound)) for bound in accumulate(self.shares[:-1])]


class BatchMaker(Protocol):
    """A backend that makes micro-batches."""

    def __call__(self, batches: Sequence[Sequence[PackedSequence]], step: int = 0) -> list[MicroBatch]:
        """Make one micro-batch from each list of rows, as the 0-based step trains on them."""
        ...


class MixedBatches:
    """Makes micro-batches that have one objective each, because attention has one direction in a micro-batch.

    A step has as many micro-batches of an objective as its rows need, so their number differs from step to step.

    Args:
        mixed: The objectives and their shares.
        make: Returns the backend for one of them.
    """

    def __init__(self, mixed: Mixed, make: Callable[[Targets], BatchMaker]) -> None:
        self._mixed = mixed
        self._makers = [make(targets) for targets in mixed.targets]

    def __call__(self, batches: Sequence[Sequence[PackedSequence]], step: int = 0) -> list[MicroBatch]:
        """Group the rows of all batches by objective, in their order, into micro-batches no larger than the first."""
        size, rows = len(batches[0]), list(chain.from_iterable(batches))
        drawn = [self._mixed.draw(row) for row in rows]
        made: list[MicroBatch] = []
        for number, maker in enumerate(self._makers):
            own = [row for row, place in zip(rows, drawn, strict=True) if place == number]
            made += maker([own[i : i + size] for i in range(0, len(own), size)], step) if own else []
        return made


@dataclass(frozen=True)
class NumpyBatches:
    """Makes micro-batches on the CPU, by NumPy."""

    targets: Targets

    def __call__(self, batches: Sequence[Sequence[PackedSequence]], step: int = 0) -> list[MicroBatch]:
        """Make one micro-batch from each list of rows."""
        inputs, labels = self.targets(list(chain.from_iterable(batches)), step)
        micro_batches, first = [], 0
        for rows in batches:
            own = slice(first, first + len(rows))
            micro_batches.append(
                collate(rows, inputs[own].reshape(-1), labels[own].reshape(-1), self.targets.objective)
            )
            first = own.stop
        return micro_batches


def _ids(rows: Sequence[PackedSequence]) -> NDArray[np.int32]:
    return np.stack([row.ids for row in rows])


def threshold(share: float) -> np.uint32:
    """The number that a uniform uint32 falls below with probability `share`, to 2**-32."""
    return np.uint32(min(round(share * 2**32), 2**32 - 1))


def row_keys(seed: int, row: PackedSequence) -> NDArray[np.uint32]:
    """`[3]` keys of a row: for the positions to predict, for their treatment, and for the random replacements."""
    words = f"{seed} {row.stream} {row.number}".encode()
    return np.frombuffer(hashlib.blake2b(words, digest_size=12).digest(), "<u4")


def position_hashes(key: NDArray[np.uint32], positions: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A uniform uint32 per position; `key` and `positions` are broadcast.

    It takes only uint32 additions, multiplications, exclusive ors and shifts. Every backend gives the same bits.
    """
    return mix(mix(positions * np.uint32(0x9E3779B9) + key) + key)


def mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The integer hash `lowbias32` (C. Wellons, "Prospecting for Hash Functions", 2018), a bijection of uint32."""
    x = x ^ (x >> np.uint32(16))
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x
