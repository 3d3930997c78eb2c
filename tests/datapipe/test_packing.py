"""Best-fit packing loses nothing, repeats nothing, and fills rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datapipe.packing import Buffer, Piece, packing_ratio


def piece(length: int, number: int = 0) -> Piece:
    return Piece(np.zeros(length, np.int32), (0, 0, number, 0))


@given(lengths=st.lists(st.integers(1, 50), max_size=60), spaces=st.lists(st.integers(0, 60), max_size=60))
def test_best_fit_is_the_longest_that_fits_and_of_equals_the_oldest(lengths: list[int], spaces: list[int]) -> None:
    buffer = Buffer(piece(length, number) for number, length in enumerate(lengths))
    left = dict(enumerate(lengths))
    for space in spaces:
        found = buffer.best_fit(space)
        fitting = [(length, -number) for number, length in left.items() if length <= space]
        if not fitting:
            assert found is None
            continue
        length, number = max(fitting)
        assert found is not None
        assert (len(found.ids), found.reference[2]) == (length, -number)
        del left[-number]
    rest = [buffer.oldest() for _ in range(len(buffer))]
    assert [r.reference[2] for r in rest if r] == sorted(left)
    assert buffer.oldest() is None


def test_packing_of_hard_lengths() -> None:
    """Pairs that fill a row to the token, shuffled: taken as they come, they leave a quarter of it empty."""
    lengths = np.random.default_rng(0).permutation([600, 424, 700, 324, 800, 224] * 1000).tolist()
    rows, used = 1, 0
    for length in lengths:
        rows, used = (rows + 1, length) if used + length > 1024 else (rows, used + length)
    assert sum(lengths) / rows / 1024 < 0.8
    assert packing_ratio(lengths, 1024) > 0.99
