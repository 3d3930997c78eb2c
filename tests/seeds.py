"""Random seeds of tests that differ from run to run and can be repeated."""

from __future__ import annotations

import os
import secrets

import pytest

VARIABLE = "DETOUR_TEST_SEED"


def draw_seed() -> int:
    """Draw a seed, or take the one in the environment variable DETOUR_TEST_SEED, and print it."""
    given = os.environ.get(VARIABLE)
    seed = int(given) if given else secrets.randbits(32)
    print(f"drawn seed: set {VARIABLE}={seed} to repeat this", flush=True)
    return seed


@pytest.fixture
def drawn_seed() -> int:
    """A drawn seed, which pytest shows if the test fails."""
    return draw_seed()
