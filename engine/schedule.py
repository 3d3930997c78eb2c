"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math

from configs.schema import RunConfig
from configs.spans import PhaseSpan


class PhaseSchedule:
    """The phases of a run laid out on its 0-based steps: step s follows s completed steps."""

    def __init__(self, config: RunConfig) -> None:
        self.spans = config.spans
        self.total = self.spans[-1].last
        self._peak = config.optimizer.lr

    def remaining(self, step: int) -> list[PhaseSpan]:
        """Return the phases that have steps left after `step` completed steps."""
        return [span for span in self.spans if span.last > step]

    def peak(self, span: PhaseSpan) -> float:
        """Return the peak learning rate of a phase."""
        return span.phase.lr.peak or self._peak

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a 0-based step.

        It warms up linearly to the peak, then falls by the shape to `final` x peak at the phase's last step. The 1-sqrt
        shape is peak * (1 - (1 - final) * sqrt(t / T)), as in the paper (arXiv 2605.12438).
        """
        span = next(span for span in self.spans if step < span.last)
        lr, peak, done = span.phase.lr, self.peak(span), step - span.first + 1
        warmup = lr.warmup.steps(span.tokens_per_step)
        if done <= warmup:
            return peak * done / warmup
        progress = (done - warmup) / (span.steps - warmup)
        fall = {
            "constant": 0.0,
            "linear": progress,
            "cosine": (1 - math.cos(math.pi * progress)) / 2,
            "1-sqrt": math.sqrt(progress),
        }[lr.shape]
        return peak * (1 - (1 - lr.final) * fall)
