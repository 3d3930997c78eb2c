"""Rows dealt to data-parallel ranks by cost, against rows as their streams make them.

Efficiency is the mean time of the ranks over the time of the slowest, by simulation on the real documents of MedQuAD in
rows of 8,192 tokens, 384 rows per step. The time of a row is what an H100 was measured at (results/gpu-2026-11-26.md):
0.281 s (CLM) or 0.227 s (MLM) per 16 rows, besides global attention at 225 or 290 TFLOP/s. Rows are dealt by
`engine.dealing.row_cost`, which knows no such rates. The exchange itself is measured on gloo processes of this machine.

    python -m benchmarks.dealing [--quick] [--json FILE]
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from transformers import ModernBertConfig

from benchmarks.cpu_vs_transformers import in_processes, process_group, run_config
from benchmarks.table import Row, arguments, report
from datapipe.batch import PackedSequence
from datapipe.dealing import deal
from datapipe.loader import Loader
from datapipe.prepare import ensure_prepared
from datapipe.targets import Masked, NextToken, Targets
from datapipe.tokenizer import load_tokenizer

ROWS, LENGTH = 384, 8192
SKIP = 6
"""Steps before those that are simulated: a packing buffer gives long documents first."""
BASE = ModernBertConfig()
GLOBAL_LAYERS = 8
REST_SECONDS = {"clm": 0.281 / 16, "mlm": 0.227 / 16}
ATTENTION_RATE = {"clm": 225e12, "mlm": 290e12}


def batches(folder: Path, steps: int) -> Iterator[list[PackedSequence]]:
    """Yield the rows of each step, in the order of their streams."""
    tokenizer = load_tokenizer("package://tokenizer/modernbert")
    config = run_config(folder, "clm", LENGTH, ROWS, SKIP + steps)
    ensure_prepared(config.data, tokenizer)
    made: list[PackedSequence] = []

    def keep(rows: list[PackedSequence], _: threading.Event) -> list[PackedSequence]:
        made.extend(rows)
        return rows

    with closing(
        Loader(config.data, ROWS, tokenizer, 0, 1).steps(NextToken(), 1, 0, SKIP + steps, None, None, keep)
    ) as data:
        for _ in data:
            pass
    yield from (made[i : i + ROWS] for i in range(SKIP * ROWS, len(made), ROWS))


def seconds(row: PackedSequence, objective: str) -> float:
    """Time of a row of base on an H100, forward and backward."""
    padding = len(row.ids) - sum(row.lengths)
    pairs = sum(length**2 for length in (*row.lengths, padding)) * (0.5 if objective == "clm" else 1)
    flops = 4 * BASE.hidden_size * pairs * 3.5 * GLOBAL_LAYERS  # backward has five products for forward's two
    return flops / ATTENTION_RATE[objective] + REST_SECONDS[objective]


def efficiency(times: list[float], hands: list[list[int]]) -> float:
    """Return the mean time of the ranks over that of the slowest."""
    totals = [sum(times[item] for item in hand) for hand in hands]
    return statistics.mean(totals) / max(totals)


def simulated(steps: list[list[PackedSequence]]) -> list[Row]:
    from engine.dealing import row_cost

    masked = Masked(0.15, (0.8, 0.1, 0.1), 7, 4, 100, (0, 1, 2, 3, 4))
    targets: tuple[Targets, ...] = (NextToken(), masked)
    rows = []
    for ranks in (8, 16, 32, 64, 128):
        per_rank = ROWS // ranks
        as_made = [list(range(first, first + per_rank)) for first in range(0, ROWS, per_rank)]
        for target in targets:
            cost = row_cost(BASE, target)
            found = np.array(
                [
                    (efficiency(times, deal([cost(row) for row in step], ranks)), efficiency(times, as_made))
                    for step in steps
                    for times in ([seconds(row, target.objective) for row in step],)
                ]
            )
            dealt, made = map(float, found.mean(axis=0))
            name = f"{target.objective.upper()}, {ranks} ranks x {per_rank} rows: efficiency (peer: not dealt)"
            rows.append(Row(name, dealt, made, dealt / made, None, "", None))
            if ranks == 64:
                rows.append(Row.at_least(f"{target.objective.upper()}, 64 ranks: efficiency", dealt, 1.0, 0.95, ""))
    return rows


def exchange_seconds(folder: Path, rank: int, size: int, count: int) -> float:
    """Median time of an exchange of six rows per rank, as one of `size` processes."""
    from engine.dealing import RowExchange, row_cost
    from engine.megatron import cpu

    cpu.install()
    rng = np.random.default_rng(rank)
    cost, times = row_cost(BASE, NextToken()), []
    with process_group(size, rank, str(folder / "store")):
        exchange = RowExchange(dist.new_group(), timedelta(seconds=60))
        for _ in range(count):
            parts = [int(rng.integers(1, 65)) for _ in range(6)]
            rows = [
                PackedSequence(np.zeros(LENGTH, np.int32), (LENGTH // n,) * n, rank, 0, ((0, 0, 0, 0, 1),) * n)
                for n in parts
            ]
            started = time.perf_counter()
            exchange(rows, threading.Event(), cost, 1)
            times.append(time.perf_counter() - started)
        exchange.close()
    return statistics.median(times)


def main() -> None:
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = list(batches(folder, 3 if options.quick else 8))
        rows = simulated(steps)
        size = 4
        found = in_processes(partial(exchange_seconds, size=size, count=20), [(folder, rank) for rank in range(size)])
        label = f"exchange of 6 rows per rank, {size} processes of this machine (peer: a step of 16 rows)"
        rows.append(Row.at_most(label, 1e3 * max(found), 335.0, None, "ms"))
    report(rows, options.json)


if __name__ == "__main__":
    main()
