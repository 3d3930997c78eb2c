"""`detour probe`: linear probes on the frozen states of every layer, which have no noise of fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from configs.errors import InputError
from configs.files import write_json
from datapipe.tokenizer_content import content_sha256
from monitoring.charts import WIDE, Line, line_chart
from studies.examples import Splits, load_examples
from studies.figures import write_figure
from studies.finetune import Encoded, Job, encode
from studies.intervals import examples_bootstrap
from studies.models import huggingface_directory, huggingface_tokenizer, load_model, silence_transformers
from studies.scores import baselines, counts, score
from studies.tables import write_csv
from studies.tasks import EvaluatedTask, Protocol, Task

PENALTIES = (0.01, 1.0, 100.0)
"""Inverse strengths of the L2 penalty; the best on validation is taken."""
ITERATIONS = 1000
"""Most steps of a probe's solver."""
ALONE = 20_000
"""Training items below which one process fits the probes of all layers faster than it starts others."""
BATCH_SIZE = 16
"""Rows per forward pass."""
Array = NDArray[Any]


@dataclass(frozen=True)
class _Part:
    """A split as the probes see it."""

    states: Array
    """`[layers, items, hidden]` float32. An item is a text, or a word of a token task."""
    gold: list[tuple[str, ...]]
    """Labels per example."""
    lengths: list[list[bool]]
    """Whether each word has a state, per example; a text has one."""

    def answers(self) -> list[str]:
        """Return the label of each item of a `single` or `tokens` task."""
        kept = zip(self.gold, self.lengths, strict=True)
        return [label for labels, known in kept for label, is_known in zip(labels, known, strict=True) if is_known]


def probe(
    models: Sequence[str],
    evaluated: EvaluatedTask,
    output: Path,
    *,
    processes: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fit a linear classifier on the states of each layer, and write probe.json, probe.csv and probe.svg.

    Texts are represented by the mean of their tokens, words by their first token. All training examples are used,
    unless the protocol's `examples` says fewer.

    Args:
        models: Runs, checkpoints, Hugging Face directories or hub ids. The others are compared with the first.
        evaluated: The task, its data and the protocol, of which `length`, `stride` and `examples` matter.
        output: Folder of the results.
        processes: Probes that are fitted at once; default: one for a small task, else one per core.
        say: Receives a line of progress per model.

    Returns:
        The content of probe.json: `layers` with one row per model and layer. A row of a model beside the first has the
        `difference` to the first model's same layer, with a 95 % interval over the test examples.

    Raises:
        InputError: A model, the task or one of its files is wrong.
    """
    silence_transformers()
    task, protocol, splits = load_examples(evaluated)
    rows: list[dict[str, Any]] = []
    tables: dict[str, list[Array]] = {}
    with ExitStack() as stack:
        for model in models:
            folder = stack.enter_context(huggingface_directory(model))
            own = _probe_model(folder, task, protocol, splits, output, processes)
            tables[model] = [table for _, table in own]
            for layer, (row, table) in enumerate(own):
                first = tables[models[0]]
                compared = model != models[0] and len(first) == len(own)
                against = examples_bootstrap(task.score, first[layer], table) if compared else {}
                rows.append({"model": model, "layer": layer, **row, **against})
            best = max(own, key=lambda entry: entry[0]["validation_score"])[0]["score"]
            say(f"{task.name}, {model}: {len(own)} layers probed, {task.score} {100 * best:.2f} % at the best")
    summary = {
        "task": task.name,
        "metric": task.score,
        "scored_on": "test" if task.files.test else "validation",
        "examples": {"train": len(splits.train), "test": len(splits.test)},
        "notes": list(splits.notes),
        "baselines": baselines(task, splits),
        "layers": rows,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "probe.json", summary)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(output / "probe.csv", [{key: row.get(key) for key in columns} for row in rows])
    lines = [
        Line(model, [(row["layer"], 100 * row["score"]) for row in rows if row["model"] == model], f"c{index % 8}")
        for index, model in enumerate(models)
    ]
    title = f"{task.name}: {task.score} of linear probes by layer"
    chart = line_chart(title, lines, number=lambda y: f"{y:.3g} %", x_name="layer", size=WIDE)
    write_figure(output / "probe.svg", [(title, lines, chart)])
    return summary


def mean_probe(job: Job) -> dict[str, Any]:
    """Probe every layer of a model, and write probe.json; a study calls it with one model.

    Returns:
        `score`, the mean over the layers, and the rows of `layers`.
    """
    silence_transformers()
    own = _probe_model(Path(job.model), job.task, job.protocol, job.splits, job.output, None)
    layers = [{"layer": layer, **row} for layer, (row, _) in enumerate(own)]
    result = {"score": float(np.mean([row["score"] for row in layers])), "layers": layers}
    job.output.mkdir(parents=True, exist_ok=True)
    write_json(job.output / "probe.json", result)
    return result


def print_probes(summary: dict[str, Any], console: Console) -> None:
    """Print a row per layer and a column per model."""
    models = list(dict.fromkeys(row["model"] for row in summary["layers"]))
    table = Table("layer", *models, title=f"{summary['task']}: {summary['metric']} on {summary['scored_on']}")
    for layer in range(1 + max(row["layer"] for row in summary["layers"])):
        cells = []
        for model in models:
            row = next((r for r in summary["layers"] if (r["model"], r["layer"]) == (model, layer)), None)
            cells.append("-" if row is None else _cell(row))
        table.add_row(str(layer), *cells)
    console.print(table)
    console.print(f"chance {100 * summary['baselines']['chance']:.2f} %; intervals are over the test examples only")
    for note in summary["notes"]:
        console.print(note, highlight=False, soft_wrap=True)


def _cell(row: dict[str, Any]) -> str:
    text = f"{100 * row['score']:.2f} %"
    if row.get("difference") is None:
        return text
    return f"{text} ({100 * row['difference']:+.2f}: {100 * row['low']:+.2f} to {100 * row['high']:+.2f})"


def _probe_model(
    folder: Path, task: Task, protocol: Protocol, splits: Splits, output: Path, processes: int | None
) -> list[tuple[dict[str, Any], Array]]:
    """Probe each layer: its row, and the counts of its test predictions, `[1, examples, classes, ...]`."""
    from joblib import Parallel, delayed
    from transformers import AutoModel

    tokenizer = huggingface_tokenizer(folder)
    model = load_model(AutoModel, folder)
    job = Job(str(folder), task, protocol, splits, 0, output, {})
    limit = min(protocol.length, model.config.max_position_embeddings)
    named = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    with TemporaryDirectory(prefix="detour-") as scratch:
        parts = {}
        for name, examples in named.items():
            encoded = encode(examples, job, tokenizer, limit)
            states = _states(model, encoded, tokenizer.pad_token_id, Path(scratch) / f"{name}.npy")
            known = [[place is not None for place in places] for places in encoded.words] or [[True]] * len(examples)
            parts[name] = _Part(states, [example.labels for example in examples], known)
        layers = range(len(parts["test"].states))
        if processes is None:
            processes = 1 if parts["train"].states.shape[1] < ALONE else min(len(layers), os.cpu_count() or 1)
        fitted: list[tuple[dict[str, Any], Array]] = Parallel(n_jobs=processes)(
            delayed(_probe_layer)(task, splits, parts, layer) for layer in layers
        )
    return fitted


def _states(model: Any, encoded: Encoded, pad: int, path: Path) -> Array:
    """Write the states of all layers to a memory map, because those of a large task exceed the memory."""
    places: list[list[tuple[int, int]]] = [[] for _ in encoded.rows]
    items = 0
    if encoded.words:
        for found in (place for words in encoded.words for place in words if place is not None):
            places[found[0]].append((items, found[1]))
            items += 1
    else:
        places, items = [[(owner, -1)] for owner in encoded.owners], 1 + encoded.owners[-1]
    totals = np.bincount(encoded.owners, [len(row["input_ids"]) for row in encoded.rows])
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    states = np.lib.format.open_memmap(path, "w+", np.float32, (depth, items, width))
    for start in range(0, len(encoded.rows), BATCH_SIZE):
        batch = [torch.tensor(row["input_ids"], dtype=torch.long) for row in encoded.rows[start : start + BATCH_SIZE]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad).to(model.device)
        lengths = torch.tensor([[len(row)] for row in batch], device=model.device)
        mask = (torch.arange(ids.shape[1], device=model.device)[None] < lengths).long()
        with torch.inference_mode():
            outputs = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        for layer, output in enumerate(outputs):
            sums = (output * mask[:, :, None]).sum(1).cpu().numpy()
            words = output.cpu().numpy()
            for row, wanted in enumerate(places[start : start + BATCH_SIZE]):
                for item, position in wanted:
                    if position < 0:  # a text is the mean over the tokens of its windows
                        states[layer, item] += sums[row] / totals[item]
                    else:
                        states[layer, item] = words[row, position]
    return states


def _probe_layer(task: Task, splits: Splits, parts: dict[str, _Part], layer: int) -> tuple[dict[str, Any], Array]:
    train, validation, test = (parts[name] for name in ("train", "validation", "test"))
    mean, spread = train.states[layer].mean(0), train.states[layer].std(0) + 1e-6
    scaled = {name: (part.states[layer] - mean) / spread for name, part in parts.items()}
    best: tuple[float, float, list[Sequence[str]]] | None = None
    for penalty in PENALTIES:
        predict = _fit(task, splits, train, scaled["train"], penalty)
        guess = _by_example(predict(scaled["validation"]), validation)
        reached = score(task.score, validation.gold, guess, splits.scored, task.positive)
        if best is None or reached > best[0]:
            best = (reached, penalty, _by_example(predict(scaled["test"]), test))
    assert best is not None
    table = counts(task.score, test.gold, best[2], splits.scored, task.positive)
    reached = score(task.score, test.gold, best[2], splits.scored, task.positive)
    return {"score": reached, "validation_score": best[0], "penalty": best[1]}, table[None]


def _fit(
    task: Task, splits: Splits, train: _Part, states: Array, penalty: float
) -> Callable[[Array], list[tuple[str, ...]]]:
    """Fit a probe; return the function from states to the labels of each item."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    logistic = LogisticRegression(C=penalty, max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)  # a label that all or no training texts have
        if task.kind == "regression":
            ridge = Ridge(alpha=1 / penalty).fit(states, [float(labels[0]) for labels in train.gold])
            return lambda x: [(repr(float(value)),) for value in ridge.predict(x)]
        if task.kind == "multi":
            table = np.array([[label in labels for label in splits.labels] for labels in train.gold], int)
            several = OneVsRestClassifier(logistic).fit(states, table)
            return lambda x: [
                tuple(label for label, is_there in zip(splits.labels, row, strict=True) if is_there)
                for row in np.asarray(several.predict(x)).reshape(len(x), -1)  # scikit-learn flattens a single label
            ]
        answers = train.answers()
        if len(set(answers)) == 1:
            return lambda x: [(answers[0],)] * len(x)
        one = logistic.fit(states, answers)
        return lambda x: [(str(label),) for label in one.predict(x)]


def _by_example(items: list[tuple[str, ...]], part: _Part) -> list[Sequence[str]]:
    """Collect the answers of a text, or of the words of a text, where a word without a state is O."""
    if all(known == [True] for known in part.lengths) and len(items) == len(part.lengths):
        return list(items)
    answers = iter(items)
    return [[next(answers)[0] if is_known else "O" for is_known in known] for known in part.lengths]


def require_one_tokenizer(folders: Sequence[Path]) -> None:
    """Require that models share a tokenizer, because masked tokens of different ones cannot be compared.

    Raises:
        InputError: Two tokenizers differ.
    """
    tokenizers = [huggingface_tokenizer(folder) for folder in folders]
    if len({(content_sha256(own.backend_tokenizer), *own("a")["input_ids"]) for own in tokenizers}) > 1:
        raise InputError(
            "the models have different tokenizers, so their masked tokens cannot be compared; probe them one by one",
            code="different-tokenizers",
        )
