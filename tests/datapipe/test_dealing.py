"""Rows dealt by their cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.dealing import deal


@settings(max_examples=50, deadline=None)
@given(hands=st.integers(1, 9), room=st.integers(1, 6), data=st.data())
def test_every_item_is_dealt_once_into_hands_of_equal_size(hands: int, room: int, data: st.DataObject) -> None:
    count = hands * room
    costs = data.draw(st.lists(st.floats(0, 1e18), min_size=count, max_size=count))
    dealt = deal(costs, hands)
    assert [len(hand) for hand in dealt] == [room] * hands
    assert sorted(item for hand in dealt for item in hand) == list(range(count))
    assert all(hand == sorted(hand) for hand in dealt)


def test_the_costliest_hand_is_close_to_the_mean() -> None:
    costs = 1 + np.random.default_rng(0).uniform(0, 2, 384)
    totals = [sum(costs[hand]) for hand in deal(costs.tolist(), 64)]
    assert max(totals) < 1.03 * np.mean(totals)
    assert costs.reshape(64, 6).sum(1).max() > 1.15 * np.mean(totals), "as they come"


def test_items_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="5 items do not divide over 2 hands"):
        deal([1.0] * 5, 2)
