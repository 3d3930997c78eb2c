"""The tasks that a study measures its trials by, each addressed by its settings."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from configs.errors import InputError
from configs.files import file_sha256
from datapipe.inputs import find_files
from studies.evaluate import Parallel, digest_of, evaluate
from studies.examples import Splits, load_examples
from studies.finetune import Job
from studies.probe import mean_probe
from studies.retention import retention
from studies.rule import FINE_TUNED, PROBE
from studies.tasks import EvaluatedTask, Protocol, Task, load_task

SEED = 0
"""Stands for the seeds of a measure that draws nothing."""


@dataclass(frozen=True)
class Measure:
    """A task with its settings."""

    label: str
    """Name of the task, with its settings if the study has the task twice, and `, probe` if it is probed."""
    by: str
    """`fine-tuned`, `probe` or `masked`."""
    evaluated: EvaluatedTask
    task: Task
    protocol: Protocol
    folder_of_data: Path
    splits: Splits | None
    """None for a `masked` task, which has no splits."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the scores."""
        return self.evaluated.seeds if self.by == FINE_TUNED else (SEED,)

    @cached_property
    def address(self) -> str:
        """Digest of the task, its examples and its protocol, wherever they lie, without the seeds."""
        settings = {
            "by": self.by,
            "task": self.task.model_dump(mode="json", exclude={"about", "source", "licence", "files", "protocol"}),
            "protocol": self.protocol.model_dump(mode="json"),
            "data": digest_of(self.splits) if self.splits else self._text(),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]

    def _text(self) -> list[str]:
        """Return the digests of the text of a `masked` task, or the names of files that are not here."""
        assert self.task.files.test is not None
        files = find_files(str(self.folder_of_data / self.task.files.test))
        return [file_sha256(file.path) if file.path is not None else file.name for file in files]

    @property
    def folder(self) -> str:
        """Name of the folder of its results."""
        return f"{self.task.name}-{self.address}"

    @property
    def row(self) -> dict[str, Any]:
        """Metric, split, numbers of examples and seeds, as a row of the report."""
        strict = " (strict IOB2)" if self.task.kind == "tokens" else ""
        if self.splits is None:
            on, test, train = "general text", "-", "-"
        else:
            on = "test" if self.task.files.test else "validation"
            test, train = (f"{len(part):,}" for part in (self.splits.test, self.splits.train))
        ways = {PROBE: "linear probe, mean over layers", FINE_TUNED: "fine-tuned", "masked": "no training"}
        seeds = ", ".join(map(str, self.seeds)) if self.by == FINE_TUNED else "none drawn"
        return {
            "measure": self.label,
            "metric": f"{self.task.score}{strict}",
            "how": ways[self.by],
            "split": on,
            "examples": test,
            "training examples": train,
            "seeds": seeds,
        }

    @property
    def sentence(self) -> str:
        """The row as a sentence of the plan."""
        row = self.row
        return (
            f"Measure {self.label}: {row['metric']}, {row['how']}, on {row['examples']} examples of {row['split']}; "
            f"training examples: {row['training examples']}; fine-tuning seeds: {row['seeds']}"
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
        if self.by == PROBE:
            job = Job(str(Path(model).absolute()), self.task, self.protocol, self.splits, SEED, folder.absolute(), {})
            [probed] = parallel(mean_probe, [job])
            return {str(SEED): probed["score"]}
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
        if splits is None:
            _require_text(task, data)
        for by in entry.by if splits is not None else ("masked",):
            own = f"{label}, probe" if by == PROBE else label
            measures.append(Measure(own, by, entry, task, protocol, data, splits))
    labels = Counter(measure.label for measure in measures)
    repeated = [label for label, count in labels.items() if count > 1]
    if repeated:
        raise InputError(f"evaluate: the same task twice: {', '.join(repeated)}; give it once", key="evaluate")
    return measures


def outcomes_of(measures: Sequence[Measure], scores: dict[str, list[float]], wanted: Sequence[str]) -> dict[str, float]:
    """Compute the outcomes of a decision rule from a trial's scores: means over the tasks that are measured so.

    A task's name is its fine-tuned measure, or its probe if it is probed only.
    """
    found = {}
    for outcome in wanted:
        named = [m for m in measures if Path(m.evaluated.task).stem == outcome]
        own = [m for m in measures if m.by == outcome] or [m for m in named if m.by != PROBE] or named
        found[outcome] = fmean(fmean(scores[measure.label]) for measure in own)
    return found


def _require_text(task: Task, data: Path) -> None:
    """Require the text of a masked task, which is read after the training only."""
    assert task.files.test is not None
    find_files(str(data / task.files.test))
