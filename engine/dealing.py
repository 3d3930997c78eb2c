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
from itertools import accumulate, pairwise

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
        costs, sizes = self._gather([(cost(row), len(data)) for row, data in zip(rows, packed, strict=True)], cancelled)
        hands = deal(costs, self._size)
        received = self._exchange(packed, hands, sizes, cancelled)
        own_costs = [costs[item] for item in hands[self._rank]]
        micro_batches = deal(own_costs, len(own_costs) // micro_batch_size)
        return [received[place] for micro_batch in micro_batches for place in micro_batch]

    def _gather(self, own: Sequence[tuple[float, int]], cancelled: threading.Event) -> tuple[list[float], list[int]]:
        """Return the costs, and the sizes in bytes, of the rows of all ranks: rank 0's rows first."""
        table = torch.tensor(own, dtype=torch.float64)  # [rows of a rank, 2]
        gathered = [torch.empty_like(table) for _ in range(self._size)]
        self._wait(dist.all_gather(gathered, table, group=self._group, async_op=True), cancelled)
        costs, sizes = torch.cat(gathered).T.tolist()
        return costs, [int(size) for size in sizes]

    def _exchange(
        self, packed: Sequence[bytes], hands: Sequence[Sequence[int]], sizes: Sequence[int], cancelled: threading.Event
    ) -> list[PackedSequence]:
        """Send each rank the rows of its hand, and return the rows of this rank's hand in the hand's order.

        Args:
            packed: The rows that this rank has, as bytes.
            hands: Rows that each rank is dealt, as ascending positions among the rows of all ranks.
            sizes: Bytes of the rows of all ranks.
            cancelled: Ends the exchange when set.
        """
        count, hand = len(packed), hands[self._rank]
        first_own = self._rank * count
        outgoing = [[packed[i - first_own] for i in other if 0 <= i - first_own < count] for other in hands]
        bytes_out = [sum(map(len, rows)) for rows in outgoing]
        bytes_in = [sum(sizes[i] for i in hand if i // count == sender) for sender in range(self._size)]
        sent = torch.frombuffer(bytearray(b"".join(row for rows in outgoing for row in rows)), dtype=torch.uint8)
        arrived = torch.empty(sum(bytes_in), dtype=torch.uint8)
        work = dist.all_to_all_single(arrived, sent, bytes_in, bytes_out, group=self._group, async_op=True)
        self._wait(work, cancelled)
        content, ends = arrived.numpy().tobytes(), list(accumulate((sizes[i] for i in hand), initial=0))
        return [pickle.loads(content[first:end]) for first, end in pairwise(ends)]

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
