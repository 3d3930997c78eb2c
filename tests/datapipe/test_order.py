"""Every document belongs to exactly one stream in every epoch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datapipe.order import permutation, segments


@given(
    documents=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    streams=st.integers(1, 30),
    epoch=st.integers(0, 100),
)
def test_streams_share_an_epoch_out(documents: list[int], streams: int, epoch: int) -> None:
    owners = [np.zeros(count, int) for count in documents]
    sizes = []
    for stream in range(streams):
        parts = segments(documents, streams, stream, epoch, 3, "source")
        for part in parts:
            owners[part.shard][part.first : part.first + part.count] += 1
        sizes.append(sum(part.count for part in parts))
    assert all((shard == 1).all() for shard in owners)
    assert max(sizes) - min(sizes) <= 1


@given(documents=st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any), streams=st.integers(1, 20))
def test_every_stream_gets_documents_within_one_rotation(documents: list[int], streams: int) -> None:
    for stream in range(streams):
        assert any(segments(documents, streams, stream, epoch, "key") for epoch in range(streams))


@given(count=st.integers(0, 500), key=st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_permutation(count: int, key: list[int]) -> None:
    assert sorted(permutation(count, *key).tolist()) == list(range(count))


def test_permutation_is_the_same_for_ever() -> None:
    """A checkpoint holds positions in these orders: they may never change."""
    assert permutation(10, 42, "pmc", 0).tolist() == [6, 9, 3, 0, 5, 8, 4, 2, 7, 1]
