"""The decision rule of a study, which is written down before the first step, and the power that it has."""

from __future__ import annotations

import math

from pydantic import Field, PositiveFloat

from configs.schema import Section
from studies.intervals import LEVEL

PROBE, FINE_TUNED = "probe", "fine-tuned"
"""Outcomes that are means over all tasks that are probed, or fine-tuned."""
ENOUGH_POWER = 0.8
"""Power below which the plan warns."""


class Rule(Section):
    """The outcomes of a study and the numbers that decide them. They are fixed before the first step."""

    outcomes: tuple[str, ...] = Field(default=(PROBE, FINE_TUNED), min_length=1)
    """Primary outcome first. `probe` is the mean over the tasks of the linear probe, itself the mean over the layers.
    `fine-tuned` is the mean over the tasks of the score after fine-tuning. The name of a
    task's file is that task alone: fine-tuned, or probed if it is not fine-tuned."""
    margin: PositiveFloat = 0.01
    """Gain that is looked for, as a share: 0.01 is one point."""
    loss_within: PositiveFloat = 0.10
    """Manipulation check: nats that an arm's held-out MLM loss may lie from the baseline's. Beyond, it is not read."""
    spread: PositiveFloat = 0.007
    """Assumed standard deviation of a paired difference over orders, as a share, for the power that the plan prints."""
    look_after: int | None = Field(default=None, ge=2)
    """Orders after which the spread of the primary outcome's differences is looked at, and not their sign."""
    largest_spread: PositiveFloat = 0.01
    """Spread at that look, as a share, above which the study stops and is published as it is."""

    def sentences(self, orders: int, arms: int = 1, settings: int = 1) -> list[str]:
        """State the rule in words, with its power.

        Args:
            orders: Pairs of each comparison.
            arms: Arms that are compared with the baseline.
            settings: Settings of the grid that are read: sizes and rates, but not seeds or decays.
        """
        points, tests = points_of(self.margin), len(self.outcomes) * arms * settings
        family = (("outcome", len(self.outcomes)), ("arm", arms), ("setting", settings))
        counted = " x ".join(f"{number} {name}s" for name, number in family if number > 1)
        corrected = f", corrected for {tests} tests ({counted}) by Holm's method" if tests > 1 else ""
        co_primary = f"; co-primary: {', '.join(self.outcomes[1:])}" if self.outcomes[1:] else ""
        lines = [
            f"Primary outcome: {self.outcomes[0]}{co_primary}. Held-out MLM loss is no outcome.",
            f"Paired Student intervals over orders, two-sided 5 %{corrected}. Lower end above 0: the arm helps. Upper "
            f"end below +{points}: no gain of {points}. Else: undecided.",
            f"Manipulation check: an arm is read only if its held-out MLM loss lies within {self.loss_within:g} nats "
            "of the baseline's after the decay. Of several decays, the first in the grid that passes is read; "
            "the others are described.",
        ]
        if self.look_after is not None:
            lines.append(
                f"After {self.look_after} orders only the spread of the primary outcome's differences is looked at: "
                f"above {points_of(self.largest_spread)} the study stops and is published as it is."
            )
        return [*lines, self.power_sentence(orders, tests)]

    def power_sentence(self, orders: int, tests: int) -> str:
        """State the chance that one of several tests finds a gain of the margin, and warn of a low one."""
        if orders < 2:
            return "Power: none, because one order shows no spread. Give data.seed several values."
        found = power(orders, self.spread, self.margin, tests)
        enough = next((n for n in range(2, 1000) if power(n, self.spread, self.margin, tests) >= ENOUGH_POWER), None)
        remedy = f" Below 80 %: {enough} orders would have it." if found < ENOUGH_POWER and enough else ""
        return (
            f"Power: {orders} orders find a gain of {points_of(self.margin)} in {100 * found:.0f} % of such "
            f"studies, if the paired difference varies by {points_of(self.spread)} over orders (assumed).{remedy}"
        )


def points_of(share: float) -> str:
    """Write a share as points: 0.01 is one point."""
    return f"{100 * share:g} point{'s' * (share != 0.01)}"


def power(orders: int, spread: float, gain: float, tests: int = 1) -> float:
    """Compute the chance that a paired t-test finds a gain, at the strictest level of Holm's correction.

    Args:
        orders: Pairs.
        spread: Standard deviation of the paired difference.
        gain: True mean difference, in the unit of the spread.
        tests: Tests that are corrected.
    """
    from scipy.stats import nct, t

    freedom = orders - 1
    critical = t.ppf(1 - (1 - LEVEL) / tests / 2, freedom)
    shift = gain / spread * math.sqrt(orders)
    return float(nct.sf(critical, freedom, shift) + nct.cdf(-critical, freedom, shift))
