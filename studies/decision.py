"""The decision rule applied to a study's records: what each arm shows in each outcome."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from studies.differences import Record, order, setting, value
from studies.intervals import LEVEL, Interval, holm, mean_interval, paired_p
from studies.rule import Rule, points_of


@dataclass(frozen=True)
class Decision:
    """One outcome of one arm at one setting of the grid."""

    arm: str
    baseline: str
    outcome: str
    at: dict[str, Any]
    pairs: tuple[float, ...]
    """arm - baseline per order, as shares."""
    students: Interval
    p: float | None
    """Two-sided, of no difference, corrected by Holm's method for all tests that are read."""
    p_margin: float | None
    """Two-sided, of a difference of the margin, corrected in the same way."""
    loss: Interval
    """Difference of the held-out MLM loss, in nats."""
    read: bool
    """Whether the rule reads this setting. Else it is described, and its p-values are None."""
    verdict: str

    def cells(self) -> dict[str, str]:
        """Return the decision as cells of a table."""
        low, high = 100 * self.students.low, 100 * self.students.high
        return {
            "arms": f"{self.arm} - {self.baseline}",
            "at": ", ".join(f"{key} {chosen}" for key, chosen in self.at.items()) or "all",
            "outcome": self.outcome,
            "orders": str(len(self.pairs)),
            "mean difference": f"{100 * self.students.mean:+.2f} points",
            "95 % interval": f"{low:+.2f} to {high:+.2f} points" if math.isfinite(low) else "-",
            "decision": self.verdict,
            "p of 0, corrected": _p(self.p),
            "p of the margin, corrected": _p(self.p_margin),
            "held-out MLM loss": f"{self.loss.mean:+.3f} nats",
            "read": "yes" if self.read else "no",
        }


def decide(records: Sequence[Record], rule: Rule, baseline: str) -> list[Decision]:
    """Apply a rule to every arm at every setting.

    An arm is read where its held-out MLM loss passes the manipulation check. Of several decays only the first in the
    grid that passes is read. Holm's method corrects the p-values for all tests that are read.
    """
    decisions: list[Decision] = []
    taken: dict[str, dict[str, Any]] = {}  # arm and setting without its decay -> the setting that is read
    for at, rows in _by_setting(records):
        decay = rows[0].get("decay", {})
        for arm in dict.fromkeys(record["arm"] for record in rows if record["arm"] != baseline):
            loss = mean_interval(_pairs(rows, arm, baseline, "loss"))
            if abs(loss.mean) <= rule.loss_within:
                apart = str((arm, {key: chosen for key, chosen in at.items() if key not in decay}))
                first = taken.setdefault(apart, at)
                is_read = first is at
                verdict = f"described only: {', '.join(f'{key} {first[key]}' for key in decay)} is read"
            else:
                is_read = False
                verdict = (
                    f"not read: the held-out MLM loss differs by {loss.mean:+.2f} nats, more than {rule.loss_within:g}"
                )
            for outcome in rule.outcomes:
                pairs = _pairs(rows, arm, baseline, outcome)
                p, p_margin = (
                    paired_p([pair - shift for pair in pairs]) if is_read else None for shift in (0.0, rule.margin)
                )
                decisions.append(
                    Decision(
                        arm, baseline, outcome, at, pairs, mean_interval(pairs), p, p_margin, loss, is_read, verdict
                    )
                )
    corrected = zip(
        decisions, holm([entry.p for entry in decisions]), holm([entry.p_margin for entry in decisions]), strict=True
    )
    return [
        replace(entry, p=p, p_margin=p_margin, verdict=_verdict(rule, fmean(entry.pairs), p, p_margin))
        if entry.read
        else entry
        for entry, p, p_margin in corrected
    ]


def spread_of(records: Sequence[Record], rule: Rule, baseline: str) -> float:
    """Return the largest spread of the primary outcome's paired differences over orders, without their sign.

    It is taken over the settings that are read, or over all if none is.
    """
    primary = [entry for entry in decide(records, rule, baseline) if entry.outcome == rule.outcomes[0]]
    several = [entry for entry in primary if len(entry.pairs) > 1]
    return max((stdev(entry.pairs) for entry in [entry for entry in several if entry.read] or several), default=0.0)


def loss_rows(records: Sequence[Record], baseline: str, within: float | None) -> list[dict[str, str]]:
    """List each arm's held-out MLM loss after the decay, for the manipulation check.

    Args:
        records: The records of the study.
        baseline: The arm that the others are compared with.
        within: Nats that the difference may have; None if the study has no rule.
    """
    rows = []
    for at, group in _by_setting(records):
        for arm in dict.fromkeys(record["arm"] for record in group):
            own = mean_interval([record["loss"] for record in group if record["arm"] == arm])
            pairs = _pairs(group, arm, baseline, "loss")
            difference = mean_interval(pairs)
            has_interval = arm != baseline and math.isfinite(difference.low)
            row = {
                "arm": arm,
                "at": ", ".join(f"{key} {chosen}" for key, chosen in at.items()) or "all",
                "orders": str(len(pairs)),
                "held-out MLM loss": f"{own.mean:.4f} nats",
                f"difference to {baseline}": f"{difference.mean:+.4f} nats" if arm != baseline else "-",
                "95 % interval": f"{difference.low:+.4f} to {difference.high:+.4f} nats" if has_interval else "-",
            }
            if within is not None:
                passed = f"within {within:g}" if abs(difference.mean) <= within else f"beyond {within:g}: not read"
                row["check"] = passed if arm != baseline else "-"
            rows.append(row)
    return rows


def _verdict(rule: Rule, mean: float, p: float | None, p_margin: float | None) -> str:
    level = 1 - LEVEL
    if p is not None and p < level and mean > 0:
        return "helps here"
    if p_margin is not None and p_margin < level and mean < rule.margin:
        return f"no gain of {points_of(rule.margin)} here"
    return "undecided"


def _by_setting(records: Sequence[Record]) -> list[tuple[dict[str, Any], list[Record]]]:
    groups: dict[str, tuple[dict[str, Any], list[Record]]] = {}
    for record in records:
        groups.setdefault(str(setting(record)), (setting(record), []))[1].append(record)
    return list(groups.values())


def _pairs(records: Sequence[Record], arm: str, baseline: str, measure: str) -> tuple[float, ...]:
    """List the paired differences of one setting, in the grid's order of seeds."""
    found: dict[str, dict[str, float]] = {}
    for record in records:
        found.setdefault(order(record), {})[record["arm"]] = value(record, measure)
    return tuple(own[arm] - own[baseline] for own in found.values())


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
