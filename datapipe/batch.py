"""What the data pipeline hands to training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""Label of a position that pays no loss."""
Ids = NDArray[np.int64]


class Origin(NamedTuple):
    """Where a row comes from."""

    stream: int
    """The logical stream."""
    number: int
    """Its place in that stream, from 0; never restarts."""
    documents: tuple[tuple[int, int, int, int], ...]
    """Of each of its documents: source, epoch, position in the epoch, part."""


@dataclass(frozen=True)
class PackedSequence:
    """Documents laid end to end in one row of `sequence_length` tokens, padded at the end."""

    ids: NDArray[np.int32]
    """[sequence_length]"""
    lengths: tuple[int, ...]
    """Tokens of each document, in order; their sum is the real (not padding) tokens of the row."""
    stream: int
    """The logical stream it comes from."""
    number: int
    """Its place in that stream, from 0; never restarts."""
    documents: tuple[tuple[int, int, int, int], ...] = ()
    """Of each document: source, epoch, position in the epoch, part."""


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences laid end to end; T = micro-batch sequences x sequence length, padding included."""

    inputs: Ids
    """[T] token ids as the model sees them."""
    labels: Ids
    """[T] token ids to predict; IGNORE where no loss is paid."""
    cu_seqlens: NDArray[np.int32]
    """[documents + 1] from 0 to T; the padding at the end of a row counts as a document of its own."""
    tokens: int
    """Real tokens, padding not counted."""
    origins: tuple[Origin, ...] = ()
    """Of its rows, in order."""


class Drawn(NamedTuple):
    """Documents of one source that entered the streams."""

    tokens: int
    """Special tokens included."""
    documents: int
    skipped: int
    """Damaged documents left out (`on_error: skip`)."""


@dataclass(frozen=True)
class StepData:
    """One data-parallel rank's share of a global batch."""

    step: int
    """0-based step this batch belongs to."""
    micro_batches: tuple[MicroBatch, ...]
    state: dict[str, Any]
    """JSON: where each of this rank's streams stands after this batch, by stream. The union over ranks is whole."""
    epochs: dict[str, int]
    """Epoch (from 0) each source has reached on this rank's streams."""
    drawn: dict[str, Drawn] = field(default_factory=dict)
    """What was taken from each source since the run's first step, on this rank's streams."""
    ends: bool = False
    """Whether this rank's streams have no batch for the next step."""
    staged: tuple[Any, ...] = ()
    """What `stage` of `Loader.steps` made of the micro-batches."""


def frame(rows: Sequence[PackedSequence], inputs: Ids, labels: Ids) -> MicroBatch:
    """Rows end to end, with the padding of each as a document of its own; inputs and labels are of these rows."""
    lengths = [0]
    for row in rows:
        padding = len(row.ids) - sum(row.lengths)
        lengths += [*row.lengths, padding] if padding else row.lengths
    ends, tokens = np.cumsum(lengths, dtype=np.int32), sum(sum(row.lengths) for row in rows)
    return MicroBatch(
        inputs, labels, ends, tokens, tuple(Origin(row.stream, row.number, row.documents) for row in rows)
    )
