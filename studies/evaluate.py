"""`detour evaluate`: models fine-tuned and scored on a task with several seeds, compared in pairs."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.errors import InputError
from studies.finetune import PREDICTIONS, Job, finetune, read_result
from studies.leakage import leakage
from studies.models import EXPORT, huggingface_directory, run_of
from studies.scores import counts, mean_interval, paired_bootstrap
from studies.tasks import Splits, Task, load_task, read_splits

Parallel = Callable[[Callable[[Job], dict[str, Any]], Sequence[Job]], Iterable[dict[str, Any]]]
"""Calls a function for each job, as many at once as there is room for; results in whatever order they come."""


def evaluate(
    models: Sequence[str],
    task: str,
    output: Path,
    *,
    data: Path | None = None,
    seeds: Sequence[int] = (17, 18, 19, 20, 21),
    overrides: Sequence[str] = (),
    training_text: Sequence[str] = (),
    parallel: Parallel = map,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score each model with each seed; write results.json and results.csv, the settings of every run among them.

    A fine-tuning that `output` already holds is not repeated.

    Args:
        models: Runs, checkpoints, Hugging Face directories or hub ids; the first is what the others are compared with.
        task: A task YAML or the name of a described task.
        data: Folder the task's files lie in; that of the YAML if not given.
        overrides: `key=value` of the protocol.
        training_text: Text the models were trained on, looked for in the test examples. That of runs is known.

    Raises InputError for whatever the models, the task or its files have wrong, before anything is trained.
    """
    _require_libraries()
    described, protocol, folder = load_task(task, overrides)
    splits = read_splits(described, data or folder)
    if len(set(models)) < len(models):
        raise InputError(f"the same model is given twice among {', '.join(models)}")
    with ExitStack() as stack:
        folders = [stack.enter_context(huggingface_directory(model)) for model in models]
        digests = [_digest(folder) for folder in folders]
        names = [_name(model, digest) for model, digest in zip(models, digests, strict=True)]
        common = {
            "task": described.name,
            "metric": described.score,
            "scored_on": "test" if described.files.test else "validation",
            "data": _digest_of(splits),
            "protocol": protocol.model_dump(exclude_none=True),
        }
        jobs, results = [], []
        for name, model, place, digest in zip(names, models, folders, digests, strict=True):
            settings = {"model": model, "weights": digest, **common}
            for seed in seeds:
                where = output.absolute() / name / f"seed-{seed}"
                done = read_result(where, settings, seed)
                if done is None:
                    jobs.append(Job(str(place.absolute()), described, protocol, splits, seed, where, settings))
                else:
                    results.append(done)
        if results:
            say(f"{len(results)} of {len(results) + len(jobs)} fine-tunings were finished before")
        for number, result in enumerate(parallel(finetune, jobs), len(results) + 1):
            results.append(result)
            say(
                f"[{number}/{len(models) * len(seeds)}] {described.name}, {result['model']}, seed {result['seed']}: "
                f"{described.score} {100 * result['score']:.2f} %"
            )
    order = {model: place for place, model in enumerate(models)}
    results.sort(key=lambda result: (order[result["model"]], result["seed"]))
    summary = {
        "task": described.name,
        "metric": described.score,
        "scored_on": common["scored_on"],
        "models": [_summary(model, results) for model in models],
        "pairs": _pairs(models, names, described, splits, seeds, output),
        "leakage": _leakage(splits, models, training_text),
        "runs": results,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _write_csv(output / "results.csv", results)
    return summary


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The table a person reads: each model's mean and interval, differences, leakage."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f} %"

    table = Table("model", "seeds", f"{summary['metric']} on {summary['scored_on']}", "95 % interval")
    for entry in summary["models"]:
        interval = f"{percent(entry['low'])} to {percent(entry['high'])}"
        table.add_row(entry["model"], str(entry["seeds"]), percent(entry["mean"]), interval)
    console.print(table)
    for pair in summary["pairs"]:
        console.print(
            f"{pair['model']} - {pair['against']}: {100 * pair['difference']:+.2f} points, 95 % interval "
            f"{100 * pair['low']:+.2f} to {100 * pair['high']:+.2f}, p = {pair['p']:.3g} (paired bootstrap)"
        )
    found = summary["leakage"]
    console.print(
        f"leakage: {found['found']:,} of {found['examples']:,} examples ({percent(found['share'])}) share 13 words in "
        f"a row with the training text ({found['training_documents']:,} documents)"
        if found
        else "leakage: not checked, the training text is not known; name it with --training-text"
    )


def _require_libraries() -> None:
    missing = [name for name in ("accelerate", "scipy", "seqeval", "sklearn") if find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} not installed; pip install 'detour-train[studies]'")


def _name(model: str, digest: str) -> str:
    """A folder for the results of a model, the same one wherever it is among the models."""
    parts = [part for part in Path(model).parts if part not in ("/", EXPORT)]
    return f"{parts[-1] if parts else 'model'}-{digest[:8]}"


def _summary(model: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = [result["score"] for result in results if result["model"] == model]
    return {"model": model, "seeds": len(scores), **mean_interval(scores).as_row()}


def _pairs(
    models: Sequence[str], names: Sequence[str], task: Task, splits: Splits, seeds: Sequence[int], output: Path
) -> list[dict[str, Any]]:
    def table(name: str) -> np.ndarray:
        tables = []
        for seed in seeds:
            lines = (output / name / f"seed-{seed}" / PREDICTIONS).read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            gold, predicted = ([row[key] for row in rows] for key in ("gold", "predicted"))
            tables.append(counts(task.score, gold, predicted, splits.labels, task.positive))
        return np.stack(tables)

    first = table(names[0]) if len(models) > 1 else None
    return [
        {"model": model, "against": models[0], **paired_bootstrap(task.score, first, table(name))}
        for model, name in zip(models[1:], names[1:], strict=True)
        if first is not None
    ]


def _leakage(splits: Splits, models: Sequence[str], training_text: Sequence[str]) -> dict[str, Any] | None:
    """None where no training text is known."""
    text = list(training_text)
    for run in filter(None, map(run_of, models)):
        for source in run.data.sources:
            text += [reference for reference in source.text if reference not in text]
    return {**leakage(splits.test, text), "training_text": text} if text else None


def _write_csv(path: Path, results: Sequence[dict[str, Any]]) -> None:
    rows = [{**{k: v for k, v in result.items() if k != "protocol"}, **result["protocol"]} for result in results]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _digest_of(splits: Splits) -> str:
    parts = [(e.text, e.pair, e.labels) for part in (splits.train, splits.validation, splits.test) for e in part]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
