"""Norms of gradients on a CPU."""

from __future__ import annotations

import math

import torch

from engine.megatron.cpu import squared_norm


def test_the_norm_of_many_numbers_is_exact() -> None:
    """A sum of all squares in fp32 is off by 0.4 % here."""
    numbers = torch.randn(2**25 + 77, generator=torch.Generator().manual_seed(0))
    exact = sum(float(part.double().square().sum()) for part in numbers.split(2**20))
    assert math.isclose(float(squared_norm(numbers)), exact, rel_tol=1e-6)
