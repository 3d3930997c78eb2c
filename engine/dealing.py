"""Deals the rows of each global batch to the data-parallel ranks by their cost.

Attention's work grows with the square of a document's length, so rows of equal length differ in cost. Each step ends
when the costliest rank ends. The rows of a global batch stay the same, and so does the state of the data: only the rank
that trains on a row changes.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import ModernBertConfig

from datapipe.batch import PackedSequence
from datapipe.dealing import deal
from datapipe.targets import Masked, Mixed, Targets
from engine.flops import training_flops

ATTENTION_COST = 2.5
"""Time per FLOP of attention over time per FLOP of the matrix products, on an H100."""
POLL_SECONDS = 0.001
"""Time between two looks at a pending collective."""

RowCost = Callable[[PackedSequence], float]


class CancelledError(RuntimeError):
    """The exchange was cancelled, because training takes no further batch."""


def row_cost(architecture: ModernBertConfig, targets: Targets | Mixed) -> RowCost:
    """Return a function that estimates the time of a row, in FLOPs of matrix products.

    Args:
        architecture: The model's configuration.
        targets: The phase's objective, or a mixture.
    """

    def cost(row: PackedSequence) -> float:
        own = targets.targets[targets.draw(row)] if isinstance(targets, Mixed) else targets
        tokens = sum(row.lengths)
        labels = int(own.rate * tokens) if isinstance(own, Masked) else tokens
        lengths = (*row.lengths, len(row.ids) - tokens)  # padding is computed too
        return training_flops(architecture, lengths, labels, own.objective == "clm", ATTENTION_COST)

    return cost


class RowExchange:
    """Exchanges rows among the ranks of a data-parallel group; all of them call it at every step, in the same order.

    Args:
        group: The data-parallel group.
        timeout: Time limit of its collectives.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        # Collectives of another thread need a group of their own, because they would mix with the training's.
        self._group: dist.ProcessGroup | None = dist.new_group(
            dist.get_process_group_ranks(group), timeout, backend="gloo", use_local_synchronization=True
        )
        self._rank, self._size = dist.get_rank(self._group), dist.get_world_size(self._group)

    def __call__(
        self, rows: Sequence[PackedSequence], cancelled: threading.Event, cost: RowCost, micro_batch_size: int
    ) -> list[PackedSequence]:
        """Give away this rank's rows of a global batch, and return those that it trains on.

        Args:
            rows: The rows that this rank's streams have made; every rank has as many.
            cancelled: Set when training takes no further batch. A pending exchange then ends, and no other may follow.
            cost: Cost of a row.
            micro_batch_size: Rows per micro-batch; micro-batches of a rank are balanced too.

        Raises:
            CancelledError: `cancelled` was set.
        """
        # Pickles come from ranks of this run alone, as in torch's collectives of objects.
        packed = [pickle.dumps(row, protocol=5) for row in rows]
        own = torch.tensor(
            [[cost(row), len(data)] for row, data in zip(rows, packed, strict=True)], dtype=torch.float64
        )
        gathered = [torch.empty_like(own) for _ in range(self._size)]
        self._wait(dist.all_gather(gathered, own, group=self._group, async_op=True), cancelled)
        costs, sizes = torch.cat(gathered).T.tolist()
        hands = deal(costs, self._size)

        offset = self._rank * len(rows)
        sent = [[packed[item - offset] for item in hand if 0 <= item - offset < len(rows)] for hand in hands]
        hand = hands[self._rank]
        starts = range(0, len(costs), len(rows))
        expected = [int(sum(sizes[item] for item in hand if start <= item < start + len(rows))) for start in starts]
        outgoing = torch.frombuffer(bytearray(b"".join(data for part in sent for data in part)), dtype=torch.uint8)
        incoming = torch.empty(sum(expected), dtype=torch.uint8)
        splits = [sum(map(len, part)) for part in sent]
        work = dist.all_to_all_single(incoming, outgoing, expected, splits, group=self._group, async_op=True)
        self._wait(work, cancelled)

        received: list[PackedSequence] = []
        first, content = 0, incoming.numpy().tobytes()
        for item in hand:
            received.append(pickle.loads(content[first : first + int(sizes[item])]))
            first += int(sizes[item])
        micro_batches = deal([costs[item] for item in hand], len(hand) // micro_batch_size)
        return [received[place] for micro_batch in micro_batches for place in micro_batch]

    def close(self) -> None:
        """Leave the group. A collective that was cancelled fails on the ranks that wait in it."""
        dist.destroy_process_group(self._group)
        self._group = None  # because its connections last as long as it is referred to

    @staticmethod
    def _wait(work: dist.Work, cancelled: threading.Event) -> None:
        while not work.is_completed():
            if cancelled.wait(POLL_SECONDS):
                raise CancelledError
        work.wait()
