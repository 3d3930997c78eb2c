"""`detour evaluate`: models fine-tuned and scored on a task with several seeds, and compared in pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.errors import InputError
from configs.files import write_json
from monitoring.run_directory import RunDirectory
from studies.examples import Splits, load_examples
from studies.finetune import PREDICTIONS, Job, finetune, read_result
from studies.intervals import FEWEST_SEEDS, holm, paired_bootstrap, score_interval
from studies.leakage import FEWEST_WORDS, Corpora, leakage
from studies.models import config_of_run, huggingface_directory, model_digest
from studies.scores import baselines, classes_of, counts
from studies.tables import write_csv
from studies.tasks import EvaluatedTask, Protocol, Task

Parallel = Callable[[Callable[[Job], dict[str, Any]], Sequence[Job]], Iterable[dict[str, Any]]]
"""Calls a function for each job, as many at once as there is room for, and yields the results in any order."""


@dataclass(frozen=True)
class _Model:
    reference: str
    """The word that the user named it by."""
    folder: Path
    """Hugging Face directory."""
    digest: str
    """sha256 of weights, configuration and tokenizer."""

    @property
    def name(self) -> str:
        """Folder name of its results, which does not depend on the other models."""
        skipped = ("/", RunDirectory(Path()).export.name)
        parts = [part for part in Path(self.reference).parts if part not in skipped]
        return f"{parts[-1] if parts else 'model'}-{self.digest[:8]}"


def evaluate(
    models: Sequence[str],
    evaluated: EvaluatedTask,
    output: Path,
    *,
    training_text: Sequence[str] = (),
    parallel: Parallel = map,
    say: Callable[[str], None] = print,
    look_for_leakage: bool = True,
) -> dict[str, Any]:
    """Score each model with each seed, and write results.json and results.csv.

    A fine-tuning whose result is in `output` already is not repeated.

    Args:
        models: Runs, checkpoints, Hugging Face directories or hub ids. The others are compared with the first.
        evaluated: The task, its data, the seeds and the protocol.
        output: Folder of the results.
        training_text: Text that the models were trained on, which is searched for the test examples. The text of runs
            is known.
        parallel: Runs the fine-tunings.
        say: Receives a line of progress per fine-tuning.
        look_for_leakage: Search the training text; a study does so once for all its models.

    Returns:
        The content of results.json.

    Raises:
        InputError: A model, the task or one of its files is wrong. Nothing has been trained then.
    """
    require_libraries()
    task, protocol, splits = load_examples(evaluated)
    if len(set(models)) < len(models):
        raise InputError(f"the same model is given twice among {', '.join(models)}", code="model-given-twice")
    corpora = _corpora(models, training_text) if look_for_leakage else None
    with ExitStack() as stack:
        opened = [_open(stack, model) for model in models]
        jobs = [job for model in opened for job in _jobs(model, task, protocol, splits, evaluated.seeds, output)]
        leaked = leakage(splits.test, corpora) if corpora else None
        results = _run(jobs, parallel, say)
    order = {model: index for index, model in enumerate(models)}
    results.sort(key=lambda result: (order[result["model"]], result["seed"]))
    summary = {
        "task": task.name,
        "metric": task.score,
        "scored_on": _scored_on(task),
        "examples": {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        "notes": list(splits.notes),
        "baselines": baselines(task, splits),
        "models": [_summary(model, task, results) for model in models],
        "pairs": _pairs(opened, task, splits, evaluated.seeds, output),
        "leakage": leaked,
        "runs": results,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", summary)
    write_csv(output / "results.csv", [_row(result) for result in results])
    return summary


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the mean and interval of each model, what needs no text to reach, the differences, and the leakage."""

    def said(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    lenient = any(entry["lenient"] is not None for entry in summary["models"])
    metric = f"{summary['metric']}{' (strict IOB2)' if lenient else ''} on {summary['scored_on']}"
    table = Table("model", "seeds", metric, "95 % interval", "precision", "recall", *(["lenient"] if lenient else []))
    for entry in summary["models"]:
        interval = f"{_percent(entry['low'])} to {_percent(entry['high'])}" if entry["low"] is not None else "-"
        cells = [_percent(entry[key]) for key in ("precision", "recall", *(["lenient"] if lenient else []))]
        table.add_row(entry["model"], str(entry["seeds"]), _percent(entry["mean"]), interval, *cells)
    console.print(table)
    known = summary["baselines"]
    best = f", always {known['best_answer']!r} {_percent(known['best_answer_score'])}" if "best_answer" in known else ""
    said(
        f"without reading: the majority ({known['majority_answer']!r}) {_percent(known['majority'])}{best}, "
        f"chance {_percent(known['chance'])}"
    )
    for entry in summary["models"]:
        for answer, seeds in entry["one_answer"].items():
            said(
                f"{entry['model']}: predicts only {answer!r} with seed {', '.join(map(str, seeds))}; it has not learned"
            )
        if entry["cut"]:
            said(f"{entry['model']}: `length` cuts {entry['cut']:,} pairs or words of {summary['scored_on']}")
        if entry["windowed"]:
            said(f"{entry['model']}: {entry['windowed']:,} {summary['scored_on']} examples are read in several windows")
    for pair in summary["pairs"]:
        said(_said_of(pair, len(summary["pairs"])))
    for note in summary["notes"]:
        said(note)
    for line in said_of_leakage(summary["leakage"]):
        said(line)


def said_of_leakage(leaked: dict[str, Any]) -> list[str]:
    """Describe the result of `leakage` in sentences."""
    lines = ["leakage: not checked, because no training text is known; name it with --training-text"]
    if leaked["found"] is not None:
        lines = [
            f"leakage: {leaked['found']:,} of {leaked['examples']:,} examples ({_percent(leaked['share'])}) share 13 "
            f"consecutive words with the training text ({leaked['training_documents']:,} documents)"
        ]
        if leaked.get("too_short"):  # older studies did not count them
            lines.append(f"leakage: {leaked['too_short']:,} examples below {FEWEST_WORDS} words were not looked for")
    return lines + [f"leakage: not looked at: {source}" for source in leaked["not_looked_at"]]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _said_of(pair: dict[str, Any], comparisons: int) -> str:
    difference = f"{pair['model']} - {pair['against']}: {100 * pair['difference']:+.2f} points"
    if pair["p"] is None:
        return f"{difference} between these weights; {FEWEST_SEEDS} seeds or more give an interval and a p-value"
    corrected = f", {pair['p_holm']:.2g} by Holm's correction of {comparisons} comparisons" if comparisons > 1 else ""
    return (
        f"{difference}, 95 % interval {100 * pair['low']:+.2f} to {100 * pair['high']:+.2f}, "
        f"p = {pair['p']:.2g}{corrected} (paired bootstrap over examples and seeds)"
    )


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """Flatten a result for a table, without its classes."""
    nested = ("protocol", "cut", "windowed", "versions")
    plain = {key: value for key, value in result.items() if key not in (*nested, "classes", "scored")}
    return plain | {f"{key}.{name}": value for key in nested for name, value in result.get(key, {}).items()}


def require_libraries() -> None:
    """Require the packages of the extra `studies`.

    Raises:
        InputError: One is not installed.
    """
    missing = [name for name in ("accelerate", "joblib", "scipy", "seqeval", "sklearn") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} not installed; pip install 'detour-train[studies]'", code="packages-missing"
        )


def _open(stack: ExitStack, reference: str) -> _Model:
    folder = stack.enter_context(huggingface_directory(reference))
    return _Model(reference, folder.absolute(), model_digest(folder))


def _jobs(
    model: _Model, task: Task, protocol: Protocol, splits: Splits, seeds: Sequence[int], output: Path
) -> list[Job]:
    settings = {
        "model": model.reference,
        "weights": model.digest,
        "task": task.name,
        "metric": task.score,
        "positive": task.positive,
        "scored": classes_of(task, splits),
        "scored_on": _scored_on(task),
        "data": digest_of(splits),
        "protocol": protocol.model_dump(exclude_none=True),
    }
    return [
        Job(str(model.folder), task, protocol, splits, seed, _results_of(output.absolute(), model, seed), settings)
        for seed in seeds
    ]


def _run(jobs: Sequence[Job], parallel: Parallel, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the jobs that have no result yet; return the results of all."""
    results, waiting = [], []
    for job in jobs:
        result = read_result(job)
        if result is None:
            waiting.append(job)
        else:
            results.append(result)
    if results:
        say(f"{len(results)} of {len(jobs)} fine-tunings were finished before")
    for result in parallel(finetune, waiting):
        results.append(result)
        say(
            f"[{len(results)}/{len(jobs)}] {result['task']}, {result['model']}, seed {result['seed']}: "
            f"{result['metric']} {100 * result['score']:.2f} %"
        )
    return results


def _results_of(output: Path, model: _Model, seed: int) -> Path:
    return output / model.name / f"seed-{seed}"


def _scored_on(task: Task) -> str:
    return "test" if task.files.test else "validation"


def _summary(model: str, task: Task, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    own = [result for result in results if result["model"] == model]
    scores = [result["score"] for result in own]
    one_answer: dict[str, list[int]] = {}
    for result in own:
        if result["one_answer"] is not None:
            one_answer.setdefault(result["one_answer"], []).append(result["seed"])
    means = {
        key: float(np.mean([result[key] for result in own])) if key in own[0] else None
        for key in ("precision", "recall", "lenient")
    }
    return {
        "model": model,
        "seeds": len(scores),
        **score_interval(task.score, scores).as_row(),
        **means,
        "one_answer": one_answer,
        "cut": own[0]["cut"]["test"],
        "windowed": own[0].get("windowed", {}).get("test", 0),
    }


def _pairs(
    models: Sequence[_Model], task: Task, splits: Splits, seeds: Sequence[int], output: Path
) -> list[dict[str, Any]]:
    """Compare each model with the first."""

    def table(model: _Model) -> np.ndarray:
        tables = []
        for seed in seeds:
            lines = (_results_of(output, model, seed) / PREDICTIONS).read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
            gold, predicted = ([row[key] for row in rows] for key in ("gold", "predicted"))
            tables.append(counts(task.score, gold, predicted, splits.scored, task.positive))
        return np.stack(tables)

    first, *others = models
    if not others:
        return []
    baseline = table(first)
    pairs = [paired_bootstrap(task.score, baseline, table(model)) for model in others]
    corrected = holm([pair["p"] for pair in pairs])
    return [
        {"model": model.reference, "against": first.reference, **pair, "p_holm": p}
        for model, pair, p in zip(others, pairs, corrected, strict=True)
    ]


def _corpora(models: Sequence[str], training_text: Sequence[str]) -> Corpora:
    """Collect the training text of the models.

    Raises:
        InputError: `--training-text` names no text.
    """
    corpora = Corpora()
    for reference in training_text:
        corpora.add_text(reference)
    for model in models:
        config = config_of_run(model)
        if config is not None or not training_text:
            corpora.add_run(model, config)
    return corpora


def digest_of(splits: Splits) -> str:
    """Return the sha256 of the examples of a task."""
    parts = [(e.text, e.pair, e.labels) for part in (splits.train, splits.validation, splits.test) for e in part]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
