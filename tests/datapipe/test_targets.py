"""Masks: rates, what is never masked, and that they depend on place alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.batch import IGNORE, Ids, PackedSequence, collate
from datapipe.targets import Masked, Mixed, NextToken, Targets

VOCABULARY, SPECIAL, MASK = 1000, (1, 500, 998, 999), 998
seeds = st.integers(0, 2**63)


def row(ids: np.ndarray, lengths: tuple[int, ...] | None = None, stream: int = 0, number: int = 0) -> PackedSequence:
    return PackedSequence(ids.astype(np.int32), lengths or (len(ids),), stream, number)


def only(targets: Targets, one: PackedSequence) -> tuple[Ids, Ids]:
    inputs, labels = targets([one])
    return inputs[0], labels[0]


def masked(rate: float = 0.3, split: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0) -> Masked:
    return Masked(rate, split, seed, MASK, VOCABULARY, SPECIAL)


@given(ids=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=200), seed=seeds, stream=st.integers(0, 2**31))
def test_labels_are_the_originals_and_special_tokens_stay(ids: list[int], seed: int, stream: int) -> None:
    original = np.array(ids)
    inputs, labels = only(masked(0.5, seed=seed), row(original, stream=stream))
    labelled = labels != IGNORE
    np.testing.assert_array_equal(labels[labelled], original[labelled])
    np.testing.assert_array_equal(inputs[~labelled], original[~labelled])
    assert not np.isin(original[labelled], SPECIAL).any()
    replaced = inputs[inputs != original]
    assert not np.isin(replaced, [s for s in SPECIAL if s != MASK]).any()


@settings(max_examples=20)
@given(seed=seeds, stream=st.integers(0, 1000), number=st.integers(0, 2**40))
def test_a_mask_depends_on_its_place_and_not_on_the_tokens(seed: int, stream: int, number: int) -> None:
    one, other = np.full(512, 7), np.full(512, 8)
    place = {"stream": stream, "number": number}
    positions = [only(masked(seed=seed), row(ids, **place))[1] != IGNORE for ids in (one, other)]
    np.testing.assert_array_equal(*positions)
    for change in ({"stream": stream + 1, "number": number}, {"stream": stream, "number": number + 1}):
        assert (positions[0] != (only(masked(seed=seed), row(one, **change))[1] != IGNORE)).any()
    assert (positions[0] != (only(masked(seed=seed + 1), row(one, **place))[1] != IGNORE)).any()


@given(data=st.data(), seed=seeds, length=st.integers(1, 100))
def test_a_row_is_the_same_alone_and_among_others(data: st.DataObject, seed: int, length: int) -> None:
    def one(number: int) -> PackedSequence:
        ends = data.draw(st.sets(st.integers(1, length)))
        ids = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=length, max_size=length))
        lengths = np.diff([0, *sorted(ends)]).tolist()
        return PackedSequence(np.array(ids, np.int32), tuple(lengths), data.draw(st.integers(0, 50)), number)

    rows = [one(number) for number in range(data.draw(st.integers(1, 4)))]
    for targets in (NextToken(), masked(0.5, seed=seed)):
        together = zip(*targets(rows), strict=True)
        for (inputs, labels), (ids, alone) in zip(together, (only(targets, row) for row in rows), strict=True):
            np.testing.assert_array_equal(inputs, ids)
            np.testing.assert_array_equal(labels, alone)


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3, 0.8])
@pytest.mark.parametrize("split", [(0.8, 0.1, 0.1), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.2, 0.3, 0.5)])
def test_rates(rate: float, split: tuple[float, float, float]) -> None:
    """Over a million positions every share lies within five standard deviations."""
    count, rows = 8192, 128
    ids = np.full(count, 7)
    drawn = [only(masked(rate, split), row(ids, number=number)) for number in range(rows)]
    inputs, labels = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    labelled = labels != IGNORE

    def close(found: int, share: float, total: int) -> bool:
        return abs(found - share * total) <= 5 * np.sqrt(share * (1 - share) * total) + 1e-9

    assert close(labelled.sum(), rate, count * rows)
    assert close((inputs[labelled] == MASK).sum(), split[0], labelled.sum())
    ordinary = VOCABULARY - len(SPECIAL)
    assert close((inputs[labelled] == 7).sum(), split[2] + split[1] / ordinary, labelled.sum())


def test_random_replacements_are_uniform() -> None:
    ids = np.full(8192, 7)
    inputs = np.concatenate([only(masked(0.9, (0.0, 1.0, 0.0)), row(ids, number=n))[0] for n in range(128)])
    counts = np.bincount(inputs[inputs != 7], minlength=VOCABULARY)
    assert not counts[list(SPECIAL)].any()
    drawn = np.delete(counts, [7, *SPECIAL])
    # Chi-squared with 994 degrees of freedom: mean 994, standard deviation 45.
    assert ((drawn - drawn.mean()) ** 2 / drawn.mean()).sum() < 994 + 5 * 45


def test_the_masks_are_the_same_for_ever() -> None:
    """A resumed run may meet another version of Detour or of NumPy: these bits may never change."""
    inputs, labels = only(masked(0.4, seed=42), row(np.arange(20) + 100, stream=3, number=7))
    assert inputs.tolist() == [
        998,
        101,
        102,
        103,
        998,
        998,
        106,
        998,
        108,
        998,
        110,
        111,
        112,
        113,
        114,
        998,
        116,
        117,
        118,
        119,
    ]
    assert np.flatnonzero(labels != IGNORE).tolist() == [0, 4, 5, 7, 9, 13, 15]


def test_padding_is_a_document_without_labels() -> None:
    ids = np.array([5, 6, 7, 8, 9, 0, 0, 0])
    for targets in (NextToken(), masked(0.9)):
        inputs, labels = only(targets, row(ids, (3, 2)))
        assert (labels[5:] == IGNORE).all() and (inputs[5:] == 0).all()
        batch = collate([row(ids, (3, 2)), row(ids, (8,))], inputs, labels, targets.objective)
        assert batch.cu_seqlens.tolist() == [0, 3, 5, 8, 16]
        assert batch.tokens == 13
    assert only(NextToken(), row(ids, (3, 2)))[1].tolist() == [6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE, IGNORE]


def test_an_empty_row_has_no_labels() -> None:
    for targets in (NextToken(), masked(0.9)):
        assert (only(targets, PackedSequence(np.full(8, 2, np.int32), (), 0, 0))[1] == IGNORE).all()


def test_a_mixture_has_the_asked_shares() -> None:
    """The draw of a row depends on its place and the seed alone, and not on the mask of any position."""
    mixed = Mixed((NextToken(), masked()), (1 / 16, 15 / 16), 3)
    ids = np.zeros(1, np.int32)
    rows = [PackedSequence(ids, (1,), number % 7, number) for number in range(300_000)]
    drawn = np.array([mixed.draw(one) for one in rows])
    assert abs(drawn.mean() - 15 / 16) < 0.001
    assert [mixed.draw(one) for one in rows[:20]] == drawn[:20].tolist()
    masks = [only(masked(0.5, seed=3), one)[1][0] != IGNORE for one in rows[:2000]]
    even = np.array([Mixed((NextToken(), masked()), (0.5, 0.5), 3).draw(one) for one in rows[:2000]])
    assert abs(np.corrcoef(masks, even)[0, 1]) < 5 / np.sqrt(2000)


def test_the_draws_are_the_same_for_ever() -> None:
    even = Mixed((NextToken(), masked()), (0.5, 0.5), 42)
    assert [even.draw(row(np.zeros(1), stream=3, number=number)) for number in range(16)] == [
        1,
        0,
        1,
        0,
        1,
        1,
        1,
        0,
        1,
        1,
        1,
        1,
        1,
        1,
        0,
        1,
    ]


def test_a_rate_changes_linearly_over_its_phase() -> None:
    """The asked rates within 0.1 %: those of the first and the last step, and their mean in the middle."""
    targets = Masked(0.3, (0.8, 0.1, 0.1), 0, MASK, VOCABULARY, SPECIAL, final_rate=0.15, steps=(100, 111))
    rows = [row(np.full(8192, 7), number=number) for number in range(200)]
    for step, rate in ((100, 0.3), (105, 0.225), (110, 0.15)):
        assert targets.rate_at(step) == pytest.approx(rate)
        assert abs((targets(rows, step)[1] != IGNORE).mean() - rate) < 1e-3
    assert Masked(0.3, (1, 0, 0), 0, MASK, VOCABULARY, SPECIAL, final_rate=0.1, steps=(5, 6)).rate_at(5) == 0.3
