"""Near-duplicates between held-out documents and training documents, counted while the shards are written."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from datapipe.near_duplicates import band_keys, bands, least, signature
from datapipe.selection import HELD_OUT, Block, Selection

HELD_OUT_DOCUMENTS = 10_000
"""Most held-out documents that training documents are compared with; those of the smallest digests."""
TRAINING_DOCUMENTS = 100_000
"""Training documents that are compared, about, because a signature costs a fifth of the tokenization."""
SIMILARITY = 0.8
"""Similarity that is looked for without `Selection.near_dedup`."""


@dataclass(frozen=True)
class HeldOutDocuments:
    """Signatures of held-out documents."""

    signatures: NDArray[np.uint16]
    """`[documents, HASHES]`"""
    similarity: float
    """Least similarity, from 0 to 1."""
    share: float
    """Share of the training documents that is compared."""

    _tables: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = field(init=False, repr=False)
    """Per band the sorted keys of the documents, and the documents in their order."""

    def __post_init__(self) -> None:
        number, rows = bands(self.similarity)
        keys = [band_keys(self.signatures, band, rows) for band in range(number)]
        orders = [np.argsort(key, kind="stable") for key in keys]
        tables = [(key[order], order) for key, order in zip(keys, orders, strict=True)]
        object.__setattr__(self, "_tables", tables)

    def is_near(self, text: bytes) -> bool | None:
        """Whether a training text is near a held-out document; None if it is not compared."""
        if int.from_bytes(_digest(text)[8:], "little") >= self.share * 2**64:
            return None
        own = signature(text)
        _, rows = bands(self.similarity)
        for band, (keys, order) in enumerate(self._tables if own.any() else ()):
            (key,) = band_keys(own[None], band, rows)
            first, end = np.searchsorted(keys, key), np.searchsorted(keys, key, "right")
            candidates = self.signatures[order[first:end]]
            if len(candidates) and (candidates == own).mean(axis=1).max() >= least(self.similarity):
                return True
        return False


def held_out_documents(
    blocks: Iterable[Block], selection: Selection, total: int, progress: Callable[[str], None] | None = None
) -> HeldOutDocuments | None:
    """Take the signatures of held-out documents; None if there are none.

    Args:
        blocks: The documents that are kept.
        selection: The choice of documents.
        total: Bytes of input.
        progress: Receives progress lines.
    """
    training, order = 0, count()
    # By content, so that the same documents are looked at in any order of the files; the largest digest comes first.
    smallest: list[tuple[int, int, NDArray[np.uint16]]] = []
    for block in blocks:
        if progress is not None:
            progress(f"looked for held-out documents in {block.position / 1e6:,.1f} of {total / 1e6:,.1f} MB")
        if not block.name.startswith(HELD_OUT):
            training += len(block.texts)
            continue
        for _, text in block.texts:
            key = -int.from_bytes(_digest(text.text)[8:], "little")
            if len(smallest) < HELD_OUT_DOCUMENTS:
                heapq.heappush(smallest, (key, next(order), signature(text.text)))
            elif key > smallest[0][0]:
                heapq.heapreplace(smallest, (key, next(order), signature(text.text)))
    if not smallest:
        return None
    share = min(1.0, TRAINING_DOCUMENTS / max(1, training))
    signatures = np.stack([own for *_, own in smallest])
    return HeldOutDocuments(signatures[signatures.any(axis=1)], selection.near_dedup or SIMILARITY, share)


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()
