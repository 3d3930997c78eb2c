"""The batches that the data pipeline hands to training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.schema import ObjectiveName

IGNORE = -100
"""Label of a position that carries no loss."""
Ids = NDArray[np.int64]


class Origin(NamedTuple):
    """The place of a row in its stream."""

    stream: int
    """Number of the logical stream."""
    number: int
    """Rows of the stream before this row; never restarts."""
    documents: tuple[tuple[int, int, int, int, int], ...]
    """(source, epoch, position in the epoch, first token, end) per document."""


@dataclass(frozen=True)
class PackedSequence:
    """Documents laid end to end in one row of `sequence_length` tokens, padded at the end."""

    ids: NDArray[np.int32]
    """`[sequence_length]`, token ids."""
    lengths: tuple[int, ...]
    """Tokens per document, in order; their sum is the row's tokens without padding."""
    stream: int
    """Number of the logical stream that the row belongs to."""
    number: int
    """Rows of the stream before this row; never restarts."""
    documents: tuple[tuple[int, int, int, int, int], ...] = ()
    """(source, epoch, position in the epoch, part) per document."""
    marked: NDArray[np.bool_] | None = None
    """`[sequence_length]`, tokens of identifiers, which are never labels; None if there are none."""


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences laid end to end; T = sequences x sequence length, padding included."""

    inputs: Ids
    """`[T]`, token ids as the model sees them."""
    labels: Ids
    """`[T]`, token ids to predict; IGNORE at positions without a loss."""
    cu_seqlens: NDArray[np.int32]
    """`[documents + 1]`, document boundaries from 0 to T; the padding of a row is a document of its own."""
    tokens: int
    """Tokens without padding."""
    objective: ObjectiveName
    origins: tuple[Origin, ...] = ()
    """One origin per row, in order."""

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only the tokens before it in its document."""
        return self.objective == "clm"


def label_bytes(labels: Any, byte_lengths: NDArray[np.int32]) -> int:
    """UTF-8 bytes of the text that the labels stand for.

    Args:
        labels: `MicroBatch.labels`; those of the dali backend are on the GPU.
        byte_lengths: `Tokenizer.byte_lengths`.
    """
    ids = labels if isinstance(labels, np.ndarray) else labels.cpu().numpy()
    return int(byte_lengths[ids[ids != IGNORE]].sum())


class Drawn(NamedTuple):
    """Documents of one source that entered the streams."""

    tokens: int
    """Special tokens included."""
    documents: int
    skipped: int
    """Damaged documents that `on_error: skip` left out."""


@dataclass(frozen=True)
class StepData:
    """One data-parallel rank's share of a global batch."""

    step: int
    """0-based number of the step."""
    micro_batches: tuple[MicroBatch, ...]
    encode_state: Callable[[], dict[str, Any]] = field(repr=False, compare=False)
    """Encodes the positions that this rank's streams have after the batch; they are kept as an immutable snapshot."""
    epochs: dict[str, int]
    """Epoch per source, from 0: the highest that this rank's streams have reached."""
    drawn: dict[str, Drawn] = field(default_factory=dict)
    """Documents per source that this rank's streams have drawn since the run's first step."""
    ends: bool = False
    """Whether this rank's streams have no batch for the next step."""
    staged: tuple[Any, ...] = ()
    """Results of the `stage` of `Loader.steps`, one per micro-batch."""

    @cached_property
    def state(self) -> dict[str, Any]:
        """JSON by stream number, from which the next step continues; the union over ranks is the whole state.

        It is encoded when it is first asked for, because few steps are saved.
        """
        return self.encode_state()


def collate(rows: Sequence[PackedSequence], inputs: Ids, labels: Ids, objective: ObjectiveName) -> MicroBatch:
    """Join rows into a micro-batch.

    Args:
        rows: Packed sequences.
        inputs: `[T]`, made from these rows.
        labels: `[T]`, made from these rows.
        objective: Objective that made them.
    """
    lengths = [0]
    for row in rows:
        padding = len(row.ids) - sum(row.lengths)
        lengths += [*row.lengths, padding] if padding else row.lengths
    cu_seqlens, tokens = np.cumsum(lengths, dtype=np.int32), sum(sum(row.lengths) for row in rows)
    origins = tuple(Origin(row.stream, row.number, row.documents) for row in rows)
    return MicroBatch(inputs, labels, cu_seqlens, tokens, objective, origins)
