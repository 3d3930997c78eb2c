"""Phases and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import Phase, RunConfig


@dataclass(frozen=True)
class PhaseSpan:
    """A phase and the steps it covers."""

    index: int
    phase: Phase
    first: int
    """0-based step at which it starts."""
    last: int
    """The step after its end."""


class PhaseSchedule:
    """The phases of a run laid out on its 0-based steps: step s follows s completed steps."""

    def __init__(self, config: RunConfig) -> None:
        self.peak = config.optimizer.lr
        self.tokens_per_step = config.tokens_per_step
        self.spans: list[PhaseSpan] = []
        first = 0
        for index, phase in enumerate(config.phases):
            last = first + phase.length(self.tokens_per_step)
            self.spans.append(PhaseSpan(index, phase, first, last))
            first = last
        self.total = first

    def remaining(self, step: int) -> list[PhaseSpan]:
        """Return the phases that have steps left after `step` completed steps."""
        return [span for span in self.spans if span.last > step]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a 0-based step.

        It warms up linearly to the peak, then falls by the shape to `final` x peak at the phase's last step. The 1-sqrt
        shape is peak * (1 - (1 - final) * sqrt(t / T)), as in the paper (arXiv 2605.12438).
        """
        span = next(span for span in self.spans if step < span.last)
        lr, done = span.phase.lr, step - span.first + 1
        warmup = lr.warmup.steps(self.tokens_per_step)
        if done <= warmup:
            return self.peak * done / warmup
        progress = (done - warmup) / (span.last - span.first - warmup)
        fall = {
            "constant": 0.0,
            "linear": progress,
            "cosine": (1 - math.cos(math.pi * progress)) / 2,
            "1-sqrt": math.sqrt(progress),
        }[lr.shape]
        return self.peak * (1 - (1 - lr.final) * fall)
