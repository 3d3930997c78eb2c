"""Shares of the sources, their epochs and ends, and what a resumed mixture remembers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema import Data
from datapipe.batch import PackedSequence, StepData
from datapipe.loader import Loader, check_sources
from datapipe.source import Source
from datapipe.stream import Stream, StreamState
from datapipe.targets import NextToken
from datapipe.tokenizer import Tokenizer
from tests.datapipe.conftest import refused, write_shards


def make(
    folder: Path, tokenizer: Tokenizer, sizes: dict[str, tuple[int, int]], rng: np.random.Generator
) -> dict[str, str]:
    """Shard sets by name, each of `documents` of about `length` tokens; its number is the one token of source n."""
    paths = {}
    for number, (name, (documents, length)) in enumerate(sizes.items()):
        lengths = rng.integers(length // 2, length * 3 // 2, documents)
        shards = np.array_split(lengths, 3)
        paths[name] = str(write_shards(folder / name, [[[number] * n for n in shard] for shard in shards], tokenizer))
    return paths


def streams(data: Data, tokenizer: Tokenizer) -> list[Stream]:
    sources = [Source(source, data, tokenizer) for source in data.sources]
    return [
        Stream(sources, data.streams, number, data.seed, data.sequence_length, tokenizer.pad_id)
        for number in range(data.streams)
    ]


def shares(rows: list[PackedSequence], sources: int) -> np.ndarray:
    """Share of the tokens per source, special tokens included; a document's one ordinary token is its source."""
    counts = np.zeros(sources + 1)
    for row in rows:
        ends = np.cumsum(row.lengths)
        for start, end in zip(ends - row.lengths, ends, strict=True):
            counts[min(int(row.ids[start:end].min()), sources)] += end - start
    return counts[:sources] / counts.sum()


@pytest.mark.parametrize("count", [1, 8, 48])
def test_realised_shares_after_ten_million_tokens(tmp_path: Path, tokenizer: Tokenizer, count: int) -> None:
    """The paper's French mixture, from corpora of other proportions, to a hundredth of each share."""
    weights = {"articles": 0.70, "questions": 0.20, "cases": 0.04, "leaflets": 0.06}
    sizes = {"articles": (3000, 900), "questions": (6000, 120), "cases": (100, 400), "leaflets": (300, 1500)}
    paths = make(tmp_path, tokenizer, sizes, np.random.default_rng(0))
    sources = [{"name": name, "shards": path, "weight": weights[name]} for name, path in paths.items()]
    data = Data(sequence_length=1024, streams=count, sources=sources)
    mixed = streams(data, tokenizer)
    rows = [stream.next_row() for _ in range(10_000_000 // 1024 // count) for stream in mixed]
    found = shares([row for row in rows if row], len(weights))
    assert np.abs(found / list(weights.values()) - 1).max() < 0.01


def test_upsampling_multiplies_a_sources_own_size(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = make(tmp_path, tokenizer, {"large": (2000, 200), "rare": (20, 200)}, np.random.default_rng(1))
    sources = [
        {"name": name, "shards": paths[name], "upsample": times} for name, times in (("large", 1), ("rare", 100))
    ]
    data = Data(sequence_length=512, streams=2, sources=sources)
    summaries = check_sources(data, tokenizer, tokenizer.vocab_size)
    sizes = [summary.tokens + 2 * summary.documents for summary in summaries]
    expected = np.array([sizes[0], 100 * sizes[1]])
    assert [summary.share for summary in summaries] == pytest.approx(expected / expected.sum())
    mixed = streams(data, tokenizer)
    rows = [row for _ in range(1000) for stream in mixed if (row := stream.next_row())]
    assert np.abs(shares(rows, 2) / (expected / expected.sum()) - 1).max() < 0.01


def test_a_source_that_ends_leaves_its_share(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Every document of a source with `epochs: 2` is met twice, and then the other source continues alone."""
    rng = np.random.default_rng(2)
    texts = {name: [[1000 * n + i] * int(rng.integers(5, 60)) for i in range(90)] for n, name in enumerate(("a", "b"))}
    paths = {name: str(write_shards(tmp_path / name, [ids[:50], ids[50:]], tokenizer)) for name, ids in texts.items()}
    sources = [{"name": "a", "shards": paths["a"], "epochs": 2}, {"name": "b", "shards": paths["b"]}]
    data = Data(sequence_length=64, streams=4, sources=sources)
    seen: Counter[int] = Counter()
    last: StepData | None = None
    for last in Loader(data, 4, tokenizer, 0, 1).steps(NextToken(), 4, 0, 200, None):
        inputs = last.micro_batches[0].inputs
        seen.update(inputs[np.flatnonzero(inputs[:-1] == tokenizer.cls_id) + 1].tolist())
    assert last is not None
    assert last.epochs["a"] == 2 and last.drawn["a"].documents == 180 and last.drawn["b"].documents > 300
    assert all(seen[ids[0]] == 2 for ids in texts["a"])


def test_the_end_of_all_data_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = make(tmp_path, tokenizer, {"a": (40, 30)}, np.random.default_rng(3))
    data = Data(sequence_length=64, streams=2, sources=[{"name": "a", "shards": paths["a"], "epochs": 1}])
    for rank in range(2):
        ends = [False]
        with refused("end-of-data", key="data.sources"):
            for step in Loader(data, 2, tokenizer, rank, 2).steps(NextToken(), 1, 0, 1000, None):
                ends.append(step.ends)
        # The last batch says so, for the other ranks to hear of it in time.
        assert ends[-1] and sum(ends) == 1 and len(ends) < 20


def test_state_is_small_and_restoring_reads_little(tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    """At 48 streams and five sources under a megabyte; at a restore no more documents are read than are buffered."""
    sizes = {f"source-{n}": (3000, 40 * (n + 1)) for n in range(5)}
    paths = make(tmp_path, tokenizer, sizes, np.random.default_rng(4))
    data = Data(sequence_length=512, sources=[{"name": name, "shards": path} for name, path in paths.items()])
    (*_, last) = Loader(data, 96, tokenizer, 0, 1).steps(NextToken(), 4, 0, 12, None)
    state = json.loads(json.dumps(last.state))
    assert len(state) == 48 and len(json.dumps(state)) < 1_000_000
    reads: list[tuple[int, int]] = []
    read = Source.with_special_tokens
    monkeypatch.setattr(Source, "with_special_tokens", lambda self, *place: reads.append(place) or read(self, *place))
    sources = [Source(source, data, tokenizer) for source in data.sources]
    stream = Stream(sources, 48, 7, data.seed, data.sequence_length, tokenizer.pad_id)
    stream.restore(StreamState.from_json(state["7"], data.sequence_length))
    assert 0 < len(reads) <= len(state["7"]["buffer"]) + 1
    assert json.loads(json.dumps(stream.snapshot().state().to_json())) == {
        k: v for k, v in state["7"].items() if k not in ("data", "content")
    }


@pytest.mark.parametrize(
    ("change", "code", "changed"),
    [
        ({"seed": 1}, "data-changed", "a, b"),
        ({"streams": 2}, "data-changed", "a, b"),
        ({"streams": 8}, "data-changed", "a, b"),
        ({"sequence_length": 32}, "data-changed", "a, b"),
        ({"sources": {"weight": 0.9}}, "data-changed", "b"),
        ({"sources": {"turned": True}}, "data-changed", "a, b"),
    ],
)
def test_a_state_of_other_data_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, change: dict, code: str, changed: str
) -> None:
    paths = make(tmp_path, tokenizer, {"a": (40, 30), "b": (40, 30)}, np.random.default_rng(5))

    def configured(weight: float = 1.0, turned: bool = False, **more: Any) -> Data:
        sources = [{"name": "a", "shards": paths["a"]}, {"name": "b", "shards": paths["b"], "weight": weight}]
        return Data(**{"sequence_length": 64, "streams": 4, "sources": sources[:: -1 if turned else 1], **more})

    (*_, last) = Loader(configured(), 8, tokenizer, 0, 1).steps(NextToken(), 2, 0, 3, None)
    other = configured(**change.get("sources", change))
    with refused(code, f"source {changed}:"):
        next(Loader(other, 8, tokenizer, 0, 1).steps(NextToken(), 2, 3, 4, last.state))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(2, 80),
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=3),
    stop=st.integers(0, 60),
)
def test_any_stream_continues_from_any_row(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Tokenizer,
    seed: int,
    length: int,
    weights: list[float],
    stop: int,
) -> None:
    rng = np.random.default_rng(seed)
    sizes = {str(n): (int(rng.integers(3, 60)), int(rng.integers(2, 60))) for n in range(len(weights))}
    paths = make(tmp_path_factory.mktemp("any"), tokenizer, sizes, rng)
    sources = [{"name": name, "shards": paths[name], "weight": w} for name, w in zip(sizes, weights, strict=True)]
    data = Data(sequence_length=length, streams=1, seed=seed, sources=sources)
    (stream,), (other,) = streams(data, tokenizer), streams(data, tokenizer)
    for _ in range(stop):
        stream.next_row()
    other.restore(StreamState.from_json(json.loads(json.dumps(stream.snapshot().state().to_json())), length))
    for _ in range(20):
        one, two = stream.next_row(), other.next_row()
        assert one is not None and two is not None
        assert (one.lengths, one.stream, one.number) == (two.lengths, two.stream, two.number)
        np.testing.assert_array_equal(one.ids, two.ids)
        assert len(one.ids) == length and 0 < sum(one.lengths) <= length
    assert stream.snapshot().state() == other.snapshot().state()
