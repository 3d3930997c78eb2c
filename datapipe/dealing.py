"""Deals rows, so that no data-parallel rank waits long for one with longer documents."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(costs: Sequence[float], hands: int) -> list[list[int]]:
    """Deal items to hands of equal size, so that the costliest hand costs little.

    The costliest item that is left goes to the cheapest hand that has room: longest processing time first (Graham,
    "Bounds on Multiprocessing Timing Anomalies", 1969). Equal costs give the same result on every rank.

    Args:
        costs: Cost of each item; `hands` divides their number.
        hands: Number of hands.

    Returns:
        Positions in `costs` by hand, ascending.
    """
    room = len(costs) // hands
    if room * hands != len(costs):
        raise ValueError(f"{len(costs)} items do not divide over {hands} hands")
    dealt: list[list[int]] = [[] for _ in range(hands)]
    cheapest = [(0.0, hand) for hand in range(hands)]  # a heap of the hands with room
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        total, hand = heapq.heappop(cheapest)
        dealt[hand].append(item)
        if len(dealt[hand]) < room:
            heapq.heappush(cheapest, (total + costs[item], hand))
    return [sorted(hand) for hand in dealt]
