"""Averaged checkpoints compute what a decay of the learning rate would have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.merge import Decay, averaged, coefficients

SCALES = {"mean": lambda share: 1 - share, "1-sqrt": lambda share: 1 - math.sqrt(share)}


@given(st.integers(1, 30), st.sampled_from(["mean", "1-sqrt"]), st.integers(0, 2**16))
def test_the_average_is_the_end_of_the_decay(count: int, decay: Decay, seed: int) -> None:
    """theta_0 plus the increments, each scaled as the decay scales the learning rate at its place."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 5, generator=generator).double().cumsum(0)
    weights = coefficients(count, decay)
    assert sum(weights) == pytest.approx(1.0)
    assert min(weights) > 0
    decayed = points[0].clone()
    for i in range(1, count):
        decayed += SCALES[decay](i / count) * (points[i] - points[i - 1])
    found = averaged([lambda name, point=point: point for point in points], weights)("any")
    torch.testing.assert_close(found, decayed.float(), rtol=1e-5, atol=1e-6)


def test_a_planted_quadratic_is_solved_better_by_the_average() -> None:
    """Noisy descent at a constant rate circles the minimum; the averages end much nearer to it than its last point."""
    generator = torch.Generator().manual_seed(1)
    minimum, point = torch.randn(50, generator=generator).double(), torch.zeros(50).double()
    points = []
    for _ in range(400):
        point = point - 0.1 * (point - minimum + torch.randn(50, generator=generator))
        points.append(point)
    last = [lambda name, point=point: point for point in points[-64:]]
    distance = {
        decay: float((averaged(last, coefficients(64, decay))("any").double() - minimum).norm())
        for decay in ("mean", "1-sqrt")
    }
    alone = float((points[-1] - minimum).norm())
    assert distance["mean"] < 0.5 * alone
    assert distance["1-sqrt"] < 0.5 * alone
