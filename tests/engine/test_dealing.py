"""Rows change ranks by their cost, and nothing else about a run changes."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.schema import RunConfig
from datapipe.batch import PackedSequence
from datapipe.targets import Masked, Mixed, NextToken
from engine.build import build
from engine.dealing import CancelledError, RowExchange, row_cost
from engine.megatron.adam import FusedAdam
from tests.engine.world import run_world, toy_config

ROWS, LENGTH = 6, 64


def made(stream: int, number: int) -> PackedSequence:
    """Make a row of documents whose lengths depend on its place; half of the rows end in padding."""
    rng = np.random.default_rng((stream, number))
    size = int(rng.choice([4, 16, LENGTH]))
    lengths = (size,) * (LENGTH // size - number % 2) or (LENGTH // 2,)
    documents = tuple((0, 2**33, place, 0, length) for place, length in enumerate(lengths))
    return PackedSequence(rng.integers(0, 9, LENGTH, np.int32), lengths, stream, number, documents)


def cost(row: PackedSequence) -> float:
    return float(sum(length**2 for length in row.lengths))


def exchange_rows() -> list[list[PackedSequence]]:
    """Exchange the rows of three steps."""
    exchange = RowExchange(dist.group.WORLD, timedelta(seconds=60))
    rank, never = dist.get_rank(), threading.Event()
    steps = [[made(rank, ROWS * step + number) for number in range(ROWS)] for step in range(3)]
    dealt = [exchange(rows, never, cost, 2) for rows in steps]
    exchange.close()
    return dealt


def test_ranks_get_as_many_rows_and_about_equal_costs() -> None:
    ranks = run_world(4, exchange_rows)
    moved = 0
    for step in range(3):
        dealt = {(row.stream, row.number): row for rank in ranks for row in rank[step]}
        assert len(dealt) == 4 * ROWS and [len(rank[step]) for rank in ranks] == [ROWS] * 4
        for (stream, number), row in dealt.items():
            expected = made(stream, number)
            np.testing.assert_array_equal(row.ids, expected.ids)
            assert (row.lengths, row.documents) == (expected.lengths, expected.documents)
        before = [sum(cost(made(rank, ROWS * step + number)) for number in range(ROWS)) for rank in range(4)]
        after = [sum(map(cost, rank[step])) for rank in ranks]
        assert max(after) - min(after) < max(before) - min(before)
        moved += sum(row.stream != rank for rank, dealing in enumerate(ranks) for row in dealing[step])
    assert moved > 0


def cancel_on_one_rank() -> float:
    """Wait in an exchange that the other rank never joins; return the seconds until both have left."""
    exchange = RowExchange(dist.group.WORLD, timedelta(seconds=60))
    started = time.perf_counter()
    if dist.get_rank() == 0:
        cancelled = threading.Event()
        threading.Timer(0.2, cancelled.set).start()
        try:
            exchange([made(0, 0)], cancelled, cost, 1)
        except CancelledError:
            pass
        else:
            raise AssertionError("not cancelled")
    else:
        time.sleep(2)
    exchange.close()
    return time.perf_counter() - started


def test_a_rank_that_stops_does_not_wait_for_another_in_an_exchange() -> None:
    assert max(run_world(2, cancel_on_one_rank)) < 30


def test_cost_grows_with_the_documents_and_counts_padding(alone: None, tmp_path: Path) -> None:
    from transformers import ModernBertConfig

    architecture = ModernBertConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, local_attention=16)
    one, four = (PackedSequence(np.zeros(LENGTH, np.int32), lengths, 0, 0) for lengths in ((64,), (16,) * 4))
    padded = PackedSequence(np.zeros(LENGTH, np.int32), (16,), 0, 0)
    causal = row_cost(architecture, NextToken())
    masked = Masked(0.15, (0.8, 0.1, 0.1), 7, 4, 100, (0, 1, 2, 3, 4))
    assert causal(one) > causal(four) > causal(padded) > 0
    assert row_cost(architecture, masked)(one) < causal(one), "the head computes 15 % of the positions"
    mixed = row_cost(architecture, Mixed((NextToken(), masked), (0.5, 0.5), 7))
    rows = [PackedSequence(np.zeros(LENGTH, np.int32), (64,), 0, number) for number in range(16)]
    assert {mixed(row) for row in rows} == {causal(one), row_cost(architecture, masked)(one)}


def rows_of_both_ways(config: RunConfig, directory: Path) -> list[Any]:
    """Return rows, state and counts of this rank's batches, as dealt and as made."""
    run = build(config, directory)
    span, found = run.schedule.spans[0], []
    objective = run.begin_phase(span)
    for exchange in (run.row_exchange, None):
        run.row_exchange, kept = exchange, run.row_exchange
        batches = list(run.batches(span, objective, 0, 3, None))
        rows = [[origin for micro in batch.micro_batches for origin in micro.origins] for batch in batches]
        found.append((rows, [batch.state for batch in batches], batches[-1].drawn))
        run.row_exchange = kept
    run.close()
    return found


def test_the_batch_and_the_state_of_the_data_stay(shards: Path, tmp_path: Path) -> None:
    """Also with tensor parallelism, where two ranks train on the same rows."""
    first, same, second, equal = run_world(4, rows_of_both_ways, toy_config(shards, parallel={"tensor": 2}), tmp_path)
    assert first == same and second == equal
    ranks = first, second
    assert all(dealt[1:] == own[1:] for dealt, own in ranks), "a rank saves the streams that it serves"
    for step in range(3):
        dealt, own = ({origin for rank in ranks for origin in rank[way][0][step]} for way in (0, 1))
        assert dealt == own
    assert [dealt[0] for dealt, _ in ranks] != [own[0] for _, own in ranks]


def test_a_skipped_step_that_the_host_knows_of_late_does_not_count() -> None:
    """Adam's bias correction is that of the steps which were taken."""

    def weights(skipped: int | None, late: bool) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.ones(8))
        adam = FusedAdam([parameter], lr=0.1)
        adam.state[parameter] = {"exp_avg": torch.zeros(8), "exp_avg_sq": torch.zeros(8)}
        for step in range(4 if skipped is None else 5):
            parameter.grad = torch.full((8,), 1.0 + step - (skipped is not None and step > skipped))
            adam.found_inf = torch.tensor(float(step == skipped))
            adam.step()
            if skipped is not None and step == skipped + late:
                adam.undo_step_count()
        assert adam.param_groups[0]["step"] == 4
        return parameter.detach()

    assert torch.equal(weights(1, late=True), weights(None, late=False))
    assert torch.equal(weights(1, late=False), weights(None, late=False))
