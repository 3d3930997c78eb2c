"""Error rates of the tests in `detour evaluate` and `detour study`: how often each finds a planted gain, and a null.

Each draw simulates the predictions of two models on a task, with every source of variation that a comparison has:
examples of different difficulty, models that differ on single examples, fine-tuning seeds of different luck, and
predictions that a seed changes at random.

    python -m benchmarks.statistics [--draws 1000] [--output benchmarks/results/statistics-DATE.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from studies.decision import decide
from studies.intervals import paired_bootstrap, paired_p
from studies.rule import Rule, power

LEVEL = 0.05
RESAMPLES = 500
Array = NDArray[np.float64]


class Case(NamedTuple):
    """Sizes of a simulated task."""

    name: str
    metric: str
    examples: int
    seed_spread: float
    """Standard deviation of a seed's share of right answers, beyond its examples."""
    model_spread: float
    """Standard deviation of the log odds by which two models differ on an example."""
    gain: float = 0.0
    seeds: int = 5


NULLS = [
    Case("accuracy, seeds vary little", "accuracy", 1000, 0.002, 0.5),
    Case("accuracy, seeds vary as examples do", "accuracy", 1000, 0.01, 0.5),
    Case("accuracy, seeds vary much", "accuracy", 1000, 0.03, 0.5),
    Case("accuracy, few examples", "accuracy", 200, 0.01, 0.5),
    Case("entity F1, seeds vary as examples do", "entity_f1", 500, 0.01, 0.5),
    Case("macro F1 of 5 classes", "macro_f1", 1000, 0.01, 0.5),
]
GAINS = [
    Case("accuracy, 1,000 examples", "accuracy", 1000, 0.005, 0.5, 0.01),
    Case("accuracy, 5,000 examples", "accuracy", 5000, 0.005, 0.25, 0.01),
    Case("entity F1, 1,000 sentences of 4 entities", "entity_f1", 1000, 0.005, 0.25, 0.01),
    Case("entity F1, 5,000 sentences of 4 entities", "entity_f1", 5000, 0.003, 0.25, 0.01),
]
STUDIES = [(5, 0.003), (5, 0.005), (5, 0.0075), (9, 0.0075), (3, 0.003)]
RULES = [(8, 1, 1, 0.007), (8, 1, 1, 0.005), (8, 1, 1, 0.01), (6, 1, 1, 0.007), (9, 2, 1, 0.007), (11, 1, 6, 0.007)]
"""Data seeds of a study, arms beside the baseline, sizes, and spread of the paired difference over seeds."""


def rejections(case: Case, draws: int) -> dict[str, Any]:
    """Count the draws in which the bootstrap reports p below 0.05."""
    random = np.random.default_rng(1)
    found, wrong_sign, covered = 0, 0, 0
    for draw in range(draws):
        first, second = _simulated(case, random)
        result = paired_bootstrap(case.metric, first, second, seed=draw, draws=RESAMPLES)
        found += result["p"] < LEVEL
        wrong_sign += result["p"] < LEVEL and result["difference"] < 0
        covered += result["low"] <= case.gain <= result["high"]
    return {**case._asdict(), "rejected": found / draws, "negative": wrong_sign / draws, "covered": covered / draws}


def studies(draws: int) -> list[dict[str, Any]]:
    """Count rejections of the paired t-test over the data seeds of a study."""
    random = np.random.default_rng(2)
    rows = []
    for pairs, spread in STUDIES:
        rates = {}
        for name, gain in (("null", 0.0), ("gain", 0.01)):
            p = [paired_p(list(random.normal(gain, spread, pairs))) for _ in range(draws)]
            rates[name] = float(np.mean([value is not None and value < LEVEL for value in p]))
        rows.append({"pairs": pairs, "spread": spread, **rates})
    return rows


def rules(draws: int) -> list[dict[str, Any]]:
    """Count what the decision rule says of studies whose arms, sizes and outcomes all have one true gain.

    Returns:
        Per study: the shares of the verdicts on one test, and of studies in which any test says that an arm helps.
    """
    random = np.random.default_rng(3)
    rows = []
    for orders, arms, sizes, spread in RULES:
        counted: dict[str, dict[str, float]] = {}
        for name, gain in (("null", 0.0), ("gain", 0.01)):
            shape = (sizes, arms, 2, orders)
            decided = [decide(_records(random.normal(gain, spread, shape)), Rule(), "mlm") for _ in range(draws)]
            first = [decisions[0].verdict for decisions in decided]
            any_helps = [any(decision.verdict == "helps here" for decision in decisions) for decisions in decided]
            counted[name] = {verdict: first.count(verdict) / draws for verdict in sorted(set(first))}
            counted[name]["any test says helps"] = sum(any_helps) / draws
        stated = power(orders, spread, 0.01, 2 * arms * sizes)
        rows.append({"orders": orders, "arms": arms, "sizes": sizes, "spread": spread, **counted, "stated": stated})
    return rows


def _records(gains: Array) -> list[dict[str, Any]]:
    """Make the records of arms that differ from the baseline by given amounts: `[sizes, arms, outcomes, orders]`."""
    sizes, arms, outcomes, orders = gains.shape
    return [
        {
            "arm": f"arm {arm}" if arm else "mlm",
            "point": {"data.seed": order, "parameters": size},
            "loss": 2.0,
            "scores": {
                name: [float(gains[size, arm - 1, number, order]) if arm else 0.0]
                for number, name in enumerate(Rule().outcomes[:outcomes])
            },
        }
        for order in range(orders)
        for size in range(sizes)
        for arm in range(arms + 1)
    ]


def _simulated(case: Case, random: np.random.Generator) -> tuple[Array, Array]:
    """Draw the counts of two models: `[seeds, examples, classes, 3]`."""
    items = 4 if case.metric == "entity_f1" else 1
    difficulty = random.normal(1.8, 1.5, (case.examples, items))
    models = []
    for gain in (0.0, case.gain):
        odds = difficulty + random.normal(0, case.model_spread / np.sqrt(2), difficulty.shape)
        chance = 1 / (1 + np.exp(-odds))
        luck = random.normal(0, case.seed_spread, (case.seeds, 1, 1))
        right = random.random((case.seeds, *chance.shape)) < np.clip(chance + gain + luck, 0, 1)
        models.append(_counts(case, right, difficulty))
    return models[0], models[1]


def _counts(case: Case, right: NDArray[np.bool_], difficulty: Array) -> Array:
    """Count per class. A wrong entity is one that is missed and one that is not there."""
    if case.metric != "macro_f1":
        correct = right.sum(-1).astype(np.float64)
        total = np.full_like(correct, right.shape[-1])
        return np.stack([correct, total, total], -1)[:, :, None, :]
    gold = (np.abs(difficulty[:, 0]) * 1000).astype(int) % 5
    predicted = np.where(right[..., 0], gold, (gold + 1) % 5)
    is_gold, is_predicted = (np.eye(5)[rows] for rows in (np.broadcast_to(gold, predicted.shape), predicted))
    return np.stack([is_gold * is_predicted, is_predicted, is_gold], -1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = {
        "draws": arguments.draws,
        "resamples": RESAMPLES,
        "nulls": [rejections(case, arguments.draws) for case in NULLS],
        "gains": [rejections(case, max(100, arguments.draws // 5)) for case in GAINS],
        "studies": studies(20 * arguments.draws),
        "rules": rules(arguments.draws),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
