"""The order of an epoch: a pure hash of (seed, source, epoch). Nothing here has state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
"""Raised when the same data would come in another order, so that checkpoints of the old order are refused."""


def permutation(count: int, *key: str | int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on nothing but `count` and `key`.

    Sorts by SplitMix64 (Steele, Lea and Flood 2014) of key and number: it is a bijection, so there are no ties, and
    unlike numpy's generators its bits are the same in every version of every library.
    """
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    x = np.uint64(int.from_bytes(digest, "little")) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


@dataclass(frozen=True)
class Segment:
    """Documents first..first+count-1 of a shard, visited in a permuted order."""

    shard: int
    first: int
    count: int


def segments(documents: Sequence[int], streams: int, stream: int, epoch: int, *key: str | int) -> list[Segment]:
    """What one stream reads of a source in one epoch, given the documents of each shard.

    The shards in permuted order, laid end to end, are cut into `streams` ranges as equal as can be: every document
    belongs to exactly one stream, however few the shards, and a stream reads few shards. A stream's range moves on by
    one each epoch, so that it meets other documents, and so that with fewer documents than streams all get their turn.
    """
    shards = permutation(len(documents), *key, epoch).tolist()
    ends = list(accumulate(documents[shard] for shard in shards))
    total, slot = ends[-1], (stream + epoch) % streams
    low, high = slot * total // streams, (slot + 1) * total // streams
    result = []
    for shard, end in zip(shards, ends, strict=True):
        start = end - documents[shard]
        first, last = max(low, start), min(high, end)
        if first < last:
            result.append(Segment(shard, first - start, last - first))
    return result
