"""Scores of predictions, from sums of counts over the examples, so that a resample is scored as fast as it is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studies.examples import Splits
from studies.tasks import Task

Labels = Sequence[Sequence[str]]
"""Labels per example: its tags, its one label, its several labels, or its number as text."""
Array = NDArray[np.float64]
CORRELATIONS = ("spearman", "pearson")
ROUNDING = 1e-12
"""Share of a number below which a difference is the rounding of fp64."""
DRAWS = 20
"""Draws of random predictions that the chance score is the mean of."""


def score(metric: str, gold: Labels, predicted: Labels, labels: Sequence[str], positive: str | None = None) -> float:
    """Score predictions.

    Args:
        metric: A value of `Task.score`, or `lenient_f1`: entity F1 that also counts entities without a beginning.
        gold: True labels.
        predicted: Predicted labels of the same examples.
        labels: Labels that are scored.
        positive: Label that `binary_f1` scores.

    Returns:
        The score: 0..1, or a correlation in -1..1.
    """
    return float(score_of_sums(metric, counts(metric, gold, predicted, labels, positive).sum(0)))


def counts(metric: str, gold: Labels, predicted: Labels, labels: Sequence[str], positive: str | None = None) -> Array:
    """Count what a score is computed from, per example and class.

    The arguments are those of `score`. For entities a class is a type. For a correlation there is one class.

    Returns:
        `[examples, classes, 3]`: correct, predicted and true labels. Or `[examples, 1, 6]`, the moments of a
        correlation: 1, x, y, x², y² and xy, where x is true, y is predicted, and `spearman` takes ranks.
    """
    if metric in CORRELATIONS:
        return _moments(metric, gold, predicted)
    if metric in ("entity_f1", "lenient_f1"):
        return _entity_counts(metric, gold, predicted, labels)
    classes = [positive] if metric == "binary_f1" else list(labels)
    index = {label: number for number, label in enumerate(classes)}
    table = np.zeros((len(gold), len(classes), 3))
    for column, answers in ((1, predicted), (2, gold)):
        places = [(number, index[label]) for number, row in enumerate(answers) for label in row if label in index]
        numbers, chosen = np.array(places, int).reshape(-1, 2).T
        table[numbers, chosen, column] = 1
    table[:, :, 0] = table[:, :, 1] * table[:, :, 2]
    return table


def score_of_sums(metric: str, sums: Array) -> Array:
    """Compute scores from summed `counts`. With one label per example, micro F1 is the accuracy.

    Args:
        metric: As of `score`.
        sums: `[..., classes, 3]`, or `[..., 1, 6]` of a correlation.

    Returns:
        `[...]` scores. Macro F1 is the mean over the classes that are true or predicted. What divides by zero is 0.
    """
    if metric in CORRELATIONS:
        n, x, y, xx, yy, xy = np.moveaxis(sums[..., 0, :], -1, 0)
        of_x, of_y = xx - x * x / n, yy - y * y / n
        varies = (of_x > ROUNDING * xx) & (of_y > ROUNDING * yy)
        return _ratio(xy - x * y / n, np.sqrt(np.where(varies, of_x * of_y, 0)))
    if metric in ("micro_f1", "accuracy", "entity_f1", "lenient_f1"):
        sums = sums.sum(-2, keepdims=True)
    correct, predicted, gold = np.moveaxis(sums, -1, 0)
    by_class = _ratio(2 * correct, predicted + gold)
    if metric == "weighted_f1":
        return _ratio((by_class * gold).sum(-1), gold.sum(-1))
    return _ratio(by_class.sum(-1), (predicted + gold > 0).sum(-1).astype(np.float64))


def details(task: Task, splits: Splits, gold: Labels, predicted: Labels) -> dict[str, Any]:
    """Describe predictions beyond their score.

    Returns:
        `precision` and `recall` of all scored labels together, or of the label `positive`; `classes`: precision,
        recall, F1 and support of each; `one_answer`: the answer that every example got, None if they differ; for
        entities `lenient`, the F1 that also counts entities without a beginning. For a regression both correlations.
    """
    answers = {tuple(sorted(set(row))) for row in predicted}
    if task.kind == "tokens":
        answers = {(tag,) for row in predicted for tag in row}
    one_answer = ", ".join(next(iter(answers))) or "none" if len(answers) == 1 else None
    if task.kind == "regression":
        return {"one_answer": one_answer, **{metric: score(metric, gold, predicted, ()) for metric in CORRELATIONS}}
    metric = "entity_f1" if task.kind == "tokens" else "micro_f1"
    sums = counts(metric, gold, predicted, splits.scored).sum(0)
    names = classes_of(task, splits)
    together = sums.sum(0) if task.positive is None else sums[names.index(task.positive)]
    lenient = {"lenient": score("lenient_f1", gold, predicted, splits.scored)} if task.kind == "tokens" else {}
    return {
        **lenient,
        **_precision_and_recall(together),
        "one_answer": one_answer,
        "classes": {
            name: {
                **_precision_and_recall(row),
                "f1": float(_ratio(2 * row[0], row[1] + row[2])),
                "support": int(row[2]),
            }
            for name, row in zip(names, sums, strict=True)
        },
    }


def classes_of(task: Task, splits: Splits) -> list[str]:
    """List the classes that are scored: labels, or the types of entities."""
    return entity_types(splits.scored) if task.kind == "tokens" else list(splits.scored)


def baselines(task: Task, splits: Splits) -> dict[str, Any]:
    """Score predictions that read no text.

    Returns:
        `majority` and `majority_answer`: the most frequent answer of training for each example (O for each word).
        `best_answer_score` and `best_answer`: the best that one label for each example reaches.
        `chance`: mean score of answers drawn from the training examples at random.
    """
    gold = [example.labels for example in splits.test]

    def scored(predicted: Labels) -> float:
        return score(task.score, gold, predicted, splits.scored, task.positive)

    if task.kind == "regression":
        return {"majority": 0.0, "majority_answer": "the mean", "chance": 0.0}
    random = np.random.default_rng(0)
    if task.kind == "tokens":
        tags = np.array([tag for example in splits.train for tag in example.labels])
        drawn = [[random.choice(tags, len(row)).tolist() for row in gold] for _ in range(DRAWS)]
        best = {"majority": scored([["O"] * len(row) for row in gold]), "majority_answer": "O"}
    else:
        answers = [example.labels for example in splits.train]
        drawn = [[answers[index] for index in random.integers(len(answers), size=len(gold))] for _ in range(DRAWS)]
        majority = Counter(answers).most_common(1)[0][0]
        by_label = _by_label(task, splits, gold)
        label = max(by_label, key=lambda name: by_label[name])
        best = {"majority": scored([majority] * len(gold)), "majority_answer": ", ".join(majority) or "none"}
        best |= {"best_answer_score": by_label[label], "best_answer": label}
    return {**best, "chance": float(np.mean([scored(rows) for rows in drawn]))}


def _by_label(task: Task, splits: Splits, gold: Labels) -> dict[str, float]:
    """Score the answer of one label for all examples, for each label of training.

    The sums are written down without counting, because a task may have thousands of labels.
    """
    classes = [task.positive] if task.score == "binary_f1" else list(splits.scored)
    true = counts(task.score, gold, gold, splits.scored, task.positive).sum(0)[:, 2]
    scores = {}
    for label in splits.labels:
        sums = np.stack([0 * true, 0 * true, true], axis=1)
        if label in classes:
            place = classes.index(label)
            sums[place] = true[place], len(gold), true[place]
        scores[label] = float(score_of_sums(task.score, sums))
    return scores


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """List the entities of a sentence by strict IOB2: each begins with B- and goes on with I- of the same type.

    Returns:
        Type, first word, and word after the last, of each entity.
    """
    found = set()
    start, type_ = None, ""
    for position, tag in enumerate([*tags, "O"]):
        if start is not None and tag != f"I{type_}":
            found.add((type_[1:], start, position))
            start = None
        if tag[0] == "B":
            start, type_ = position, tag[1:]
    return found


def entity_types(labels: Sequence[str]) -> list[str]:
    """List the types of tags, sorted; the type of a tag without one is empty."""
    return sorted({label[2:] for label in labels if label != "O"})


def _entity_counts(metric: str, gold: Labels, predicted: Labels, labels: Sequence[str]) -> Array:
    types = entity_types(labels)
    table = np.zeros((len(gold), len(types), 3))
    index = {type_: number for number, type_ in enumerate(types)}
    find = entities if metric == "entity_f1" else _lenient_entities
    for row, tags, guess in zip(table, gold, predicted, strict=True):
        true, said = find(tags), find(guess)
        for column, part in enumerate((true & said, said, true)):
            for type_, _, _ in part:
                row[index[type_], column] += 1
    return table


def _lenient_entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """List entities as conlleval does, where an I- without a beginning is one."""
    from seqeval.metrics.sequence_labeling import get_entities

    untyped = "\0"
    named = [tag if tag == "O" or len(tag) > 1 else f"{tag}-{untyped}" for tag in tags]
    return {(type_.replace(untyped, ""), start, end + 1) for type_, start, end in get_entities(named)}


def _moments(metric: str, gold: Labels, predicted: Labels) -> Array:
    from scipy.stats import rankdata

    x, y = (np.array([float(row[0]) for row in rows]) for rows in (gold, predicted))
    if metric == "spearman":
        x, y = rankdata(x), rankdata(y)
    x, y = _centred(x), _centred(y)
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)[:, None, :]


def _centred(values: Array) -> Array:
    """Subtract the mean, and scale to a largest size of 1; 0 if the values differ by rounding alone."""
    centred = values - values.mean()
    size = np.abs(centred).max(initial=0.0)
    return centred / size if size > ROUNDING * np.abs(values).max(initial=0.0) else np.zeros_like(values)


def _precision_and_recall(row: Array) -> dict[str, float]:
    return {"precision": float(_ratio(row[0], row[1])), "recall": float(_ratio(row[0], row[2]))}


def _ratio(above: Array, below: Array) -> Array:
    """Divide, with 0 for a division by zero."""
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=np.asarray(below) > 0)
