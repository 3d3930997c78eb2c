"""The same global batches whatever the number of ranks, the interruptions and the restarts."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema import Data
from datapipe.batch import IGNORE, MicroBatch, StepData
from datapipe.loader import Loader
from datapipe.prefetch import LaunchGate
from datapipe.targets import Masked, NextToken
from datapipe.tokenizer import Tokenizer
from tests.datapipe.conftest import write_shards

STREAMS, ROWS, LENGTH = 24, 2, 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Data:
    """Two sources; every document is told by its first token, and the small one is met many times over."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    large = [[_document(rng, 1000 + 100 * shard + i) for i in range(100)] for shard in range(7)]
    small = [[_document(rng, 5000 + i) for i in range(50)]]
    sources = [
        {"name": "large", "shards": str(write_shards(folder / "large", large, tokenizer)), "weight": 0.7},
        {"name": "small", "shards": str(write_shards(folder / "small", small, tokenizer)), "weight": 0.3},
    ]
    return Data(sequence_length=LENGTH, streams=STREAMS, sources=sources)


def _document(rng: np.random.Generator, name: int) -> list[int]:
    """No tokens, a few, or more than a row."""
    length = int(rng.choice([0, 1, 5, 12, 31, 80], p=[0.05, 0.1, 0.35, 0.3, 0.1, 0.1]))
    return [name, *rng.integers(10_000, 20_000, length - 1)] if length else []


def run(
    data: Data, tokenizer: Tokenizer, size: int, first: int, last: int, state: dict[str, Any] | None, micro: int = 1
) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Global batches of steps first..last-1, [rows, 2, LENGTH] by stream, and the state after each."""
    masked = Masked(0.3, (0.8, 0.1, 0.1), 7, tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)
    ranks = [
        list(Loader(data, STREAMS * ROWS, tokenizer, rank, size).steps(masked, micro, first, last, state))
        for rank in range(size)
    ]
    batches, states = [], []
    for parts in zip(*ranks, strict=True):
        batch = np.empty((STREAMS // size, size, ROWS, 2, LENGTH), np.int64)
        for rank, part in enumerate(parts):
            batch[:, rank] = np.stack([rows(part, "inputs"), rows(part, "labels")], axis=1).reshape(-1, ROWS, 2, LENGTH)
        batches.append(batch.reshape(-1, 2, LENGTH))
        states.append(json.loads(json.dumps({k: v for part in parts for k, v in part.state.items()})))
    return batches, states


def rows(step: StepData, field: str) -> np.ndarray:
    return np.concatenate([getattr(m, field) for m in step.micro_batches]).reshape(-1, LENGTH)


@pytest.fixture(scope="module")
def undisturbed(data: Data, tokenizer: Tokenizer) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    return run(data, tokenizer, 1, 0, 30, None)


def test_covers_several_epochs(undisturbed: tuple[list[np.ndarray], list[dict[str, Any]]]) -> None:
    epochs = [stream["sources"]["small"]["epoch"] for stream in undisturbed[1][-1].values()]
    assert min(epochs) >= 3


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from([1, 2, 3, 4, 6, 8]), stop=st.integers(1, 29), again=st.sampled_from([1, 2, 3, 4, 6, 8]))
def test_same_batches_at_every_size_and_restart(
    data: Data, tokenizer: Tokenizer, undisturbed: tuple[list[np.ndarray], list[dict]], size: int, stop: int, again: int
) -> None:
    batches, states = undisturbed
    before, between = run(data, tokenizer, size, 0, stop, None)
    after, end = run(data, tokenizer, again, stop, 30, between[-1], micro=2)
    np.testing.assert_array_equal(before + after, batches)
    assert between[-1] == states[stop - 1]
    assert end == states[stop:]


class WatchedGate(LaunchGate):
    """Says when the data thread stands before the closed gate."""

    def __init__(self) -> None:
        super().__init__()
        self.held = threading.Event()

    def close(self) -> None:
        self.held.clear()
        super().close()

    def wait(self) -> None:
        if not self._opened.is_set():
            self.held.set()
        super().wait()


def test_beside_a_gpu_batches_are_made_while_the_host_waits(data: Data, tokenizer: Tokenizer) -> None:
    """Taking a batch makes no other until the step opens the gate; without that word all of them come still."""
    gate = WatchedGate()
    made = threading.Semaphore(0)
    count = 0
    loader = Loader(data, STREAMS * ROWS, tokenizer, 0, 1, device=0, gate=gate)

    def stage(micro: MicroBatch) -> tuple[str, MicroBatch]:  # once per step, since a step is one micro-batch here
        nonlocal count
        count += 1
        made.release()
        return threading.current_thread().name, micro

    with closing(loader.steps(NextToken(), STREAMS * ROWS, 0, 30, None, stage)) as steps:
        first = next(steps)
        ((thread, staged),) = first.staged
        assert staged is first.micro_batches[0] and thread == "detour-data"
        ahead = data.prefetch + 2  # taken, in the queue, and the next in hand
        for _ in range(ahead):
            assert made.acquire(timeout=60)
        next(steps)
        assert gate.held.wait(60) and count == ahead
        loader.gate.open()
        assert made.acquire(timeout=60) and count == ahead + 1
        assert [step.step for step in steps] == list(range(2, 30))


def test_the_state_is_encoded_only_when_it_is_asked_for(data: Data, tokenizer: Tokenizer) -> None:
    """And it is the position after its own step, however far the thread has gone on meanwhile."""
    loader = Loader(data, STREAMS * ROWS, tokenizer, 0, 1)
    steps = list(loader.steps(NextToken(), 4, 0, 6, None))
    assert not any("state" in vars(step) for step in steps)
    resumed = loader.steps(NextToken(), 4, 3, 6, json.loads(json.dumps(steps[2].state)))
    for one, other in zip(steps[3:], resumed, strict=True):
        assert one.state == other.state
        np.testing.assert_array_equal(rows(one, "inputs"), rows(other, "inputs"))


def test_next_token_labels_stay_inside_documents(data: Data, tokenizer: Tokenizer) -> None:
    for step in Loader(data, STREAMS * ROWS, tokenizer, 0, 2).steps(NextToken(), 3, 0, 5, None):
        for batch in step.micro_batches:
            assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == 3 * LENGTH
            for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
                document = batch.inputs[start:end]
                labels = np.append(document[1:], IGNORE)
                padding = document[0] == tokenizer.pad_id
                np.testing.assert_array_equal(
                    batch.labels[start:end], np.full_like(labels, IGNORE) if padding else labels
                )
            assert batch.tokens == np.count_nonzero(batch.inputs != tokenizer.pad_id)
