"""The order of an epoch: pure functions of (seed, source, epoch), without state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
"""Version of the order. A change of it makes runs refuse checkpoints that were made with another order."""


def permutation(count: int, *key: str | int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on nothing but `count` and `key`.

    It sorts by SplitMix64 (Steele, Lea and Flood 2014) of key and number. That hash is a bijection, so there are no
    ties. Its bits are the same in every version of every library, unlike those of numpy's generators.
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
    """The documents of a source that one stream reads in one epoch.

    The shards, in permuted order and laid end to end, are cut into `streams` ranges of nearly equal length. So every
    document belongs to exactly one stream, and a stream reads few shards. The range of a stream moves on by one per
    epoch, so that the stream meets other documents. Within `streams` epochs every stream meets every range.

    Args:
        documents: Documents per shard.
        streams: Number of logical streams.
        stream: Number of this stream.
        epoch: 0-based epoch.
        key: Key of the order: seed and name of the source.
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
