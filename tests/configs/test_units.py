"""Counts and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.units import Duration, parse_count


@given(st.integers(0, 10**15), st.sampled_from([("k", 3), ("M", 6), ("B", 9), ("T", 12)]))
def test_a_count_with_a_fraction_is_exact(count: int, suffix: tuple[str, int]) -> None:
    letter, digits = suffix
    whole, fraction = divmod(count, 10**digits)
    assert parse_count(f"{whole}.{fraction:0{digits}}{letter}") == count


@pytest.mark.parametrize("text", ["1e6", "1_000_000", "1M", "1000 k", 1e6, 10**6])
def test_spellings_of_a_million(text: object) -> None:
    assert parse_count(text) == 10**6


@pytest.mark.parametrize("text", ["10MB", "1,000", "1.5", "-1", "1e999999999", True, "", float("inf"), "0.1e0k5"])
def test_what_is_no_count(text: object) -> None:
    with pytest.raises(ValueError, match="expected a count"):
        parse_count(text)


def test_durations() -> None:
    assert Duration.parse("1e6 tokens") == Duration.parse("1M") == Duration(10**6, "tokens")
    with pytest.raises(ValueError, match="'10 minutes'"):
        Duration.parse("10m")  # minutes to its writer, and 10M tokens before
