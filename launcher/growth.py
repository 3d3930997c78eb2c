"""The growth of an elastic run onto nodes that have become free."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path

from launcher.nodes import alive_nodes, free_nodes, silent_nodes
from launcher.topology import Topology
from monitoring.events import Resized
from monitoring.log import read_events

ASK_SECONDS = 5.0
"""Seconds between two questions to Ray."""


class GrowthWatch:
    """Finds room for more workers: nodes that answer, that no job uses, and that come `every` seconds after a growth.

    Args:
        directory: The run directory, whose events tell when the run last grew.
        larger: Topologies with more nodes than now.
        own_nodes: Ray's ids of the nodes of the present workers.
        every: Fewest seconds between two growths.
    """

    def __init__(self, directory: Path, larger: Sequence[Topology], own_nodes: Collection[str], every: float) -> None:
        self._larger, self._own_nodes = larger, own_nodes
        resized = [event["time"] for event in read_events(directory) if event["event"] == Resized.KIND]
        since = time.time() - datetime.fromisoformat(resized[-1]).timestamp() if resized else every
        self._next = time.monotonic() + min(every, max(0.0, every - since))  # another machine's clock may be ahead

    def has_room(self) -> bool:
        """Return whether the run can grow now."""
        if not self._larger or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + ASK_SECONDS
        nodes = alive_nodes()
        own = [node for node in nodes if node.id in self._own_nodes]
        others = [node for node in nodes if node.id not in self._own_nodes]
        if not any(topology.fits_on([*own, *others]) for topology in self._larger):
            return False
        silent = silent_nodes(others)
        free = free_nodes([node for node in others if node.id not in silent])
        return any(topology.fits_on([*own, *free]) for topology in self._larger)
