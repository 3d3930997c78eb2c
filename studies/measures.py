"""The tasks that a study measures its trials by, each addressed by its settings."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from studies.evaluate import Parallel, evaluate
from studies.examples import Splits, load_examples
from studies.retention import retention
from studies.tasks import EvaluatedTask, Protocol, Task, load_task

SEED = 0
"""Stands for the seeds of a measure that draws nothing."""


@dataclass(frozen=True)
class Measure:
    """A task with its settings."""

    label: str
    """Name of the task; with its settings, if the study has the task twice."""
    evaluated: EvaluatedTask
    task: Task
    protocol: Protocol
    folder_of_data: Path
    splits: Splits | None
    """None for a `masked` task, which has no splits."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the scores."""
        return self.evaluated.seeds if self.splits is not None else (SEED,)

    @property
    def address(self) -> str:
        """Digest of the settings without the seeds."""
        settings = self.evaluated.model_dump(mode="json", exclude={"seeds"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        """Name of the folder of its results."""
        return f"{self.task.name}-{self.address}"

    @property
    def description(self) -> str:
        """One line on what is scored, for the report."""
        if self.splits is None:
            return f"{self.label}: masked accuracy on general text, without fine-tuning"
        split = "test" if self.task.files.test else "validation"
        metric = f"{self.task.score}{' (strict IOB2)' if self.task.kind == 'tokens' else ''}"
        return (
            f"{self.label}: {metric} on {len(self.splits.test):,} {split} examples, mean of {len(self.seeds)} "
            f"fine-tuning seeds, {len(self.splits.train[: self.protocol.examples]):,} training examples"
        )

    def is_in(self, record: dict[str, Any]) -> bool:
        """Return whether a record has the scores of all seeds."""
        scores = record["scores"].get(self.address, {})
        return all(str(seed) in scores for seed in self.seeds)

    def take(self, model: str, folder: Path, parallel: Parallel) -> dict[str, float]:
        """Score a model: seed -> score."""
        if self.splits is None:
            summary = retention([model], self.task, self.protocol, self.folder_of_data, folder)
            return {str(SEED): summary["models"][0]["accuracy"]}
        summary = evaluate(
            [model], self.evaluated, folder, parallel=parallel, say=lambda line: None, look_for_leakage=False
        )
        return {str(run["seed"]): run["score"] for run in summary["runs"]}


def measures_of(evaluated: Sequence[EvaluatedTask]) -> list[Measure]:
    """Load the tasks of a study.

    Raises:
        InputError: A task or a file is wrong, or a task has the same settings twice.
    """
    loaded = [(entry, *load_task(entry.task, entry.protocol)) for entry in evaluated]
    names = Counter(task.name for _, task, _, _ in loaded)
    measures = []
    for entry, task, protocol, folder in loaded:
        settings = {**({"data": entry.data} if entry.data else {}), **entry.protocol}
        told = ", ".join(f"{key} {value}" for key, value in settings.items()) or "as described"
        label = task.name if names[task.name] == 1 else f"{task.name} ({told})"
        splits = None if task.kind == "masked" else load_examples(entry)[2]
        data = Path(entry.data) if entry.data else folder
        measures.append(Measure(label, entry, task, protocol, data, splits))
    labels = Counter(measure.label for measure in measures)
    repeated = [label for label, count in labels.items() if count > 1]
    if repeated:
        raise InputError(f"evaluate: the same task twice: {', '.join(repeated)}; give it once", key="evaluate")
    return measures
