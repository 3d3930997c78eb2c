"""Averages of checkpoints: `detour merge`.

A weighted mean of the checkpoints of a run at constant learning rate computes what a decay of the learning rate would
have (WSM, arXiv 2507.17634). With increments d_i between checkpoints i-1 and i, a decay that scales d_i by w_i ends at
theta_0 + sum_i w_i d_i, which is the mean of the checkpoints with coefficients c_i = w_i - w_(i+1), where w_0 = 1 and
w_n = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from engine.modernbert.convert import WeightSource

Decay = Literal["mean", "1-sqrt"]


def coefficients(count: int, decay: Decay) -> list[float]:
    """Coefficients of `count` checkpoints, oldest first; they add up to 1.

    `mean` weighs all alike, as a linear decay does (w_i = 1 - i/count). `1-sqrt` computes the paper's decay
    (w_i = 1 - sqrt(i/count)), and so leans towards the oldest.
    """
    shares = [i / count for i in range(count + 1)]
    scales = [1 - (math.sqrt(share) if decay == "1-sqrt" else share) for share in shares]
    return [scales[i] - scales[i + 1] for i in range(count)]


def averaged(sources: Sequence[WeightSource], weights: Sequence[float]) -> WeightSource:
    """The weighted mean of several models' tensors, added up in float64 and returned in float32."""

    def source(name: str) -> Tensor:
        total = sum(weight * read(name).double() for read, weight in zip(sources, weights, strict=True))
        return torch.as_tensor(total).float()

    return source
