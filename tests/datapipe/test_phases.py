"""Streams over phases that change sources, weights and row lengths."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema import Batch, Data, Phase
from configs.spans import PhaseSpan, phase_spans
from datapipe.batch import StepData
from datapipe.loader import Loader
from datapipe.targets import NextToken
from datapipe.tokenizer import Tokenizer
from tests.datapipe.conftest import refused, write_shards

NAMES = ("a", "b", "c")
STREAMS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Data:
    """Three sources of documents from 1 to 300 tokens; a document is told by its first token."""
    folder, rng = tmp_path_factory.mktemp("phases"), np.random.default_rng(0)
    sources = []
    for place, name in enumerate(NAMES):
        documents = [
            [1000 * (place + 1) + i, *rng.integers(10_000, 20_000, int(rng.choice([0, 5, 40, 299])))]
            for i in range(400)
        ]
        shards = write_shards(folder / name, [documents[:250], documents[250:]], tokenizer)
        sources.append({"name": name, "shards": str(shards)})
    return Data(sequence_length=64, streams=STREAMS, sources=sources)


def run(
    spans: tuple[PhaseSpan, ...], tokenizer: Tokenizer, size: int, first: int, last: int, state: dict[str, Any] | None
) -> tuple[list[list[np.ndarray]], list[dict[str, Any]]]:
    """Rows of the steps first..last-1 by stream, as the ranks of a run make them, and the state after each."""
    batches, states = [], []
    for span in spans:
        begin, end = max(first, span.first), min(last, span.last)
        if begin >= end:
            continue
        ranks = [
            list(
                Loader(span.data, span.sequences, tokenizer, rank, size).steps(
                    NextToken(), 1, begin, end, state, begins_phase=begin == span.first
                )
            )
            for rank in range(size)
        ]
        for parts in zip(*ranks, strict=True):
            batches.append(by_stream(parts))
            states.append(json.loads(json.dumps({k: v for part in parts for k, v in part.state.items()})))
        state = states[-1]
    return batches, states


def by_stream(parts: tuple[StepData, ...]) -> list[np.ndarray]:
    rows = [(micro.origins[0], micro.inputs) for part in parts for micro in part.micro_batches]
    return [inputs for _, inputs in sorted(rows, key=lambda row: row[0][:2])]


phase = st.builds(
    lambda steps, length, rows, weights: Phase(
        objective="clm",
        steps=steps,
        sequence_length=length,
        batch={"sequences": rows * STREAMS},
        sources=weights or None,
    ),
    st.integers(1, 6),
    st.sampled_from([None, 16, 64, 200]),
    st.integers(1, 3),
    st.dictionaries(st.sampled_from(NAMES), st.floats(0.1, 1.0)),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(phases=st.lists(phase, min_size=2, max_size=4), size=st.sampled_from([1, 2, 4]), where=st.floats(0, 1))
def test_any_phases_continue_from_any_step_on_any_ranks(
    data: Data, tokenizer: Tokenizer, phases: list[Phase], size: int, where: float
) -> None:
    spans = phase_spans(phases, data, Batch(sequences=STREAMS))
    total = spans[-1].last
    batches, states = run(spans, tokenizer, 1, 0, total, None)
    stop = 1 + int(where * (total - 1))
    before, saved = run(spans, tokenizer, size, 0, stop, None)
    after, ends = run(spans, tokenizer, 1 if size > 1 else 4, stop, total, saved[-1])
    for one, other in zip(before + after, batches, strict=True):
        np.testing.assert_array_equal(np.stack(one), np.stack(other))
    assert saved + ends == states
    for span in spans:  # a phase trains on its own sources alone
        ordinary = np.concatenate([np.concatenate(rows) for rows in batches[span.first : span.last]])
        drawn = {int(token) // 1000 for token in ordinary if 1000 <= token < 4000}
        assert drawn <= {NAMES.index(source.name) + 1 for source in span.data.sources}


def test_no_text_is_lost_or_repeated_over_a_source_that_leaves_and_returns(data: Data, tokenizer: Tokenizer) -> None:
    """In one epoch of each source every token is trained on once, whatever the phases in between."""
    once = data.model_copy(
        update={"sources": tuple(source.model_copy(update={"epochs": 1}) for source in data.sources)}
    )
    phases = [
        Phase(objective="clm", steps=20, sources={"a": 1, "b": 0.5}),
        Phase(objective="clm", steps=9, sources={"c": 1}, sequence_length=16),
        Phase(objective="clm", steps=10_000, sequence_length=200),
    ]
    seen: Counter[int] = Counter()
    state = None
    with refused("end-of-data", key="data.sources"):
        for span in phase_spans(phases, once, Batch(sequences=STREAMS)):
            loader = Loader(span.data, span.sequences, tokenizer, 0, 1)
            for step in loader.steps(NextToken(), 1, span.first, span.last, state, begins_phase=True):
                state = step.state
                for micro in step.micro_batches:
                    seen.update(int(token) for token in micro.inputs if 1000 <= token < 4000)
    firsts = {1000 * (place + 1) + i for place in range(len(NAMES)) for i in range(400)}
    assert all(count == 1 for count in seen.values())
    assert len(firsts - seen.keys()) <= 0.1 * len(firsts), "the last rows of streams that ended later are not made"


def test_shares_of_the_rows_hold_within_each_phase(data: Data, tokenizer: Tokenizer) -> None:
    weights = [{"a": 0.9, "b": 0.1}, {"a": 0.2, "b": 0.3, "c": 0.5}, {"b": 0.6, "c": 0.4}]
    phases = [Phase(objective="clm", steps=1500, sources=shares) for shares in weights]
    state: dict[str, Any] | None = None
    for span in phase_spans(phases, data, Batch(sequences=STREAMS)):
        tokens: Counter[str] = Counter()
        loader = Loader(span.data, span.sequences, tokenizer, 0, 1)
        for step in loader.steps(NextToken(), 4, span.first, span.last, state, begins_phase=True):
            for micro in step.micro_batches:
                for origin in micro.origins:
                    for source, *_, start, end in origin.documents:
                        tokens[span.data.sources[source].name] += end - start
        state = step.state
        for name, share in (span.phase.sources or {}).items():
            assert tokens[name] / tokens.total() == pytest.approx(share, abs=0.003)


def test_a_phase_does_not_take_changed_shards(data: Data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    phases = [Phase(objective="clm", steps=2), Phase(objective="clm", steps=2, sources={"a": 1})]
    spans = phase_spans(phases, data, Batch(sequences=STREAMS))
    _, states = run(spans[:1], tokenizer, 1, 0, 2, None)
    other = str(write_shards(tmp_path / "other", [[[7] * 30] * 50], tokenizer))
    changed = data.model_copy(
        update={"sources": (data.sources[0].model_copy(update={"shards": other}), *data.sources[1:])}
    )
    with refused("data-changed", "source a:"):
        run(phase_spans(phases, changed, Batch(sequences=STREAMS)), tokenizer, 1, 2, 4, states[-1])


def test_a_position_of_an_earlier_version_continues(data: Data, tokenizer: Tokenizer) -> None:
    """It counts documents in parts of a row's length, and knows neither idle sources nor bases of shares."""
    phases = [Phase(objective="clm", steps=9)]
    spans = phase_spans(phases, data, Batch(sequences=STREAMS))
    batches, states = run(spans, tokenizer, 1, 0, 9, None)

    def in_parts(source: int, epoch: int, position: int, start: int, end: int) -> list[int]:
        return [source, epoch, position, start // spans[0].data.sequence_length]

    old = {}
    for number, state in states[4].items():
        cursors = {name: {k: v for k, v in cursor.items() if k != "base"} for name, cursor in state["sources"].items()}
        document = state["document"] and in_parts(*state["document"])
        buffer = [in_parts(*reference) for reference in state["buffer"]]
        old[number] = {"data": state["data"], "number": state["number"], "sources": cursors}
        old[number] |= {"buffer": buffer, "document": document}
    again, ends = run(spans, tokenizer, 2, 5, 9, old)
    for one, other in zip(again, batches[5:], strict=True):
        np.testing.assert_array_equal(np.stack(one), np.stack(other))
    assert ends == states[5:]
