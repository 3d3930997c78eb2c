"""One fine-tuning of one model on one task with one seed, by the transformers Trainer, and its score."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from configs.errors import InputError
from configs.files import write_atomically, write_json
from studies.examples import Example, Splits
from studies.models import huggingface_tokenizer, load_model, silence_transformers
from studies.scores import details, score
from studies.tasks import Protocol, Task

RESULT, PREDICTIONS = "result.json", "predictions.jsonl"
IGNORE = -100
"""Label of a position without loss."""
EVALUATIONS = 20
"""Validations of a fine-tuning given in steps. One given in epochs is validated after each epoch."""
THRESHOLDS = tuple(number / 20 for number in range(1, 20))
"""Probabilities that the threshold of a `multi` task is chosen from."""
Rows = list[dict[str, Any]]
"""Inputs of the model: `input_ids` and `labels`. A long example of token classification has several."""


@dataclass(frozen=True)
class Encoded:
    """Examples as inputs of the model."""

    rows: Rows
    words: list[list[tuple[int, int] | None]]
    """Row and position of each word's first token, per example; None for a word that was cut off. Token tasks only."""
    owners: list[int]
    """Example of each row. A long example has several rows."""
    cut: int = 0
    """Pairs of texts, or words of token tasks, that `length` cut."""

    @property
    def windowed(self) -> int:
        """Examples that were read in several windows."""
        return sum(count > 1 for count in Counter(self.owners).values())


@dataclass(frozen=True)
class Job:
    """One fine-tuning to do."""

    model: str
    """Hugging Face directory."""
    task: Task
    protocol: Protocol
    splits: Splits
    seed: int
    output: Path
    """Directory of predictions.jsonl and of result.json, which is written last."""
    settings: dict[str, Any]
    """Identity of the result: weights, task, data and protocol, and the word for the model. Kept in result.json."""


def finetune(job: Job) -> dict[str, Any]:
    """Fine-tune a model, keep the weights of the best validation score, and score the test examples.

    Returns:
        The content of result.json.
    """
    import transformers

    silence_transformers()
    transformers.set_seed(job.seed)
    splits = job.splits
    tokenizer = huggingface_tokenizer(job.model)
    model = _model(job)
    limit = min(job.protocol.length, model.config.max_position_embeddings)
    train, validation, test = (
        encode(examples, job, tokenizer, limit) for examples in (splits.train, splits.validation, splits.test)
    )
    gold = [example.labels for example in splits.validation]

    def validation_score(output: Any) -> dict[str, float]:
        return {"score": _best_threshold(job, validation, gold, output.predictions)[1]}

    with TemporaryDirectory(prefix="detour-") as folder:
        trainer: Any = transformers.Trainer(
            model=model,
            args=_training_arguments(job.protocol, job.seed, folder),
            train_dataset=train.rows,
            eval_dataset=validation.rows,
            data_collator=lambda rows: _collate(rows, tokenizer.pad_token_id, job.task.kind == "tokens"),
            compute_metrics=validation_score,
            optimizers=(_optimizer(model, job.protocol), None),
            compute_loss_func=_balanced_loss(job) if job.protocol.balance else None,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        trainer.compute_metrics = None  # it scores validation examples
        threshold, _ = _best_threshold(job, validation, gold, trainer.predict(validation.rows).predictions)
        predicted = _decode(job, test, trainer.predict(test.rows).predictions, threshold)
    truth = [example.labels for example in splits.test]
    result = {
        "score": score(job.task.score, truth, predicted, splits.scored, job.task.positive),
        "validation_score": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "seed": job.seed,
        **job.settings,
        **details(job.task, splits, truth, predicted),
        "threshold": threshold,
        "length": limit,
        "cut": {"train": train.cut, "validation": validation.cut, "test": test.cut},
        "windowed": {"train": train.windowed, "validation": validation.windowed, "test": test.windowed},
        "precision_of_training": "bf16" if torch.cuda.is_available() else "fp32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    _write(job.output, splits.test, predicted, result)
    return result


def read_result(job: Job) -> dict[str, Any] | None:
    """Read the result of a finished job; None if there is no result yet.

    Raises:
        InputError: The directory holds the result of other settings.
    """
    path = job.output / RESULT
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    result.setdefault("scored", list(result.get("classes", ())))  # which older results do not state
    wanted = {"seed": job.seed, **job.settings}
    changed = [key for key, value in wanted.items() if key != "model" and result.get(key) != value]
    if changed:
        raise InputError(
            f"{path} is the result of another {', '.join(changed)}; choose another --output, or "
            f"delete {path.parent} to measure anew",
            key="--output",
            code="result-of-other-settings",
        )
    return {**result, "model": wanted["model"]}


def _training_arguments(protocol: Protocol, seed: int, folder: str) -> Any:
    from transformers import TrainingArguments

    interval: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": protocol.epochs}
    if protocol.steps is not None:
        every = max(1, protocol.steps // EVALUATIONS)
        interval = {"eval_strategy": "steps", "save_strategy": "steps", "max_steps": protocol.steps}
        interval |= {"eval_steps": every, "save_steps": every}
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=folder,
        **interval,
        learning_rate=protocol.lr,
        warmup_steps=protocol.warmup,
        max_grad_norm=protocol.clip,
        per_device_train_batch_size=protocol.batch,
        per_device_eval_batch_size=4 * protocol.batch,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        save_total_limit=1,
        save_only_model=True,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        log_level="error",
        use_cpu=not cuda,
        bf16=cuda,
        dataloader_pin_memory=cuda,
    )


def _write(output: Path, test: Sequence[Example], predicted: Sequence[Sequence[str]], result: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    lines = (
        {
            "where": example.location,
            **({"words": list(example.words)} if example.words else {"text": example.text, "pair": example.pair}),
            "gold": list(example.labels),
            "predicted": labels,
        }
        for example, labels in zip(test, predicted, strict=True)
    )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(output / PREDICTIONS, text)
    write_json(output / RESULT, result)


def _model(job: Job) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    labels = job.splits.labels
    is_tokens = job.task.kind == "tokens"
    model_class: Any = AutoModelForTokenClassification if is_tokens else AutoModelForSequenceClassification
    problems = {"single": "single_label_classification", "multi": "multi_label_classification"}
    problem = {**problems, "regression": "regression"}.get(job.task.kind)
    names = labels or ("value",)
    return load_model(
        model_class,
        job.model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={label: index for index, label in enumerate(names)},
        **({"problem_type": problem} if problem else {}),
    )


def encode(examples: Sequence[Example], job: Job, tokenizer: Any, limit: int) -> Encoded:
    """Encode examples. A label that training lacks has no loss, and counts as a miss when it is scored."""
    index = {label: number for number, label in enumerate(job.splits.labels)}
    encoded = Encoded([], [], [])
    if job.task.kind == "tokens":
        for number, example in enumerate(examples):
            encoded.words.append(_encode_words(example, index, tokenizer, limit, job.protocol.stride, encoded.rows))
            encoded.owners.extend([number] * (len(encoded.rows) - len(encoded.owners)))
        return replace(encoded, cut=sum(place is None for places in encoded.words for place in places))
    mean, spread = _scale(job) if job.task.kind == "regression" else (0.0, 1.0)
    cut = 0
    for number, example in enumerate(examples):
        rows = [tokenizer(example.text, example.pair)["input_ids"] or [tokenizer.pad_token_id]]
        if len(rows[0]) > limit:
            rows = _windows(example, tokenizer, limit, job.protocol.stride)
            cut += example.pair is not None
        labels: Any = [float(label in example.labels) for label in index]
        if job.task.kind == "single":
            labels = index.get(example.labels[0], IGNORE)
        elif job.task.kind == "regression":
            labels = (float(example.labels[0]) - mean) / spread
        encoded.rows.extend({"input_ids": row, "labels": labels} for row in rows)
        encoded.owners.extend([number] * len(rows))
    return replace(encoded, cut=cut)


def _windows(example: Example, tokenizer: Any, limit: int, stride: int) -> list[list[int]]:
    """Return the windows of a long text, each with the label of the whole. A pair is cut, because it has no windows."""
    if example.pair is not None:
        return [tokenizer(example.text, example.pair, truncation=True, max_length=limit)["input_ids"]]
    windows: list[list[int]] = tokenizer(
        example.text,
        truncation=True,
        max_length=limit,
        stride=min(stride, limit // 4),
        return_overflowing_tokens=True,
    )["input_ids"]
    return windows


def _encode_words(
    example: Example, index: dict[str, int], tokenizer: Any, limit: int, stride: int, rows: Rows
) -> list[tuple[int, int] | None]:
    """Encode the sentence as a whole, because the model knows words with the spaces before them from pretraining.

    A sentence beyond the limit becomes several rows that overlap. A word is read in the row where it has most context.

    Returns:
        Row and position of each word's first token.
    """
    windows = tokenizer(
        example.text,
        truncation=True,
        max_length=limit,
        stride=min(stride, limit // 4),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    best: list[tuple[int, int, int] | None] = [None] * len(example.words)
    for window, offsets in enumerate(windows["offset_mapping"]):
        tokens = [(start, end, position) for position, (start, end) in enumerate(offsets) if end > start]
        labels = [IGNORE] * len(offsets)
        word_start, at = 0, 0
        for number, (word, tag) in enumerate(zip(example.words, example.labels, strict=True)):
            while at < len(tokens) and tokens[at][1] <= word_start:
                at += 1
            is_inside = at < len(tokens) and tokens[at][0] < word_start + len(word)
            if is_inside and (at or not window or tokens[at][0] <= word_start):  # a row may begin within a word
                position = tokens[at][2]
                labels[position] = index.get(tag, IGNORE)
                context = min(at, len(tokens) - at)
                found = best[number]
                if found is None or context > found[0]:
                    best[number] = (context, len(rows), position)
            word_start += len(word) + 1
        rows.append({"input_ids": windows["input_ids"][window], "labels": labels})
    return [found and found[1:] for found in best]


def _scale(job: Job) -> tuple[float, float]:
    """Return mean and spread of the training numbers, because a head of unit scale learns them fastest."""
    values = [float(example.labels[0]) for example in job.splits.train]
    return float(np.mean(values)), float(np.std(values)) or 1.0


def _collate(rows: Rows, pad: int, label_each_token: bool) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = padded("labels", IGNORE) if label_each_token else torch.tensor([row["labels"] for row in rows])
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, "labels": labels}


def _best_threshold(job: Job, encoded: Encoded, gold: Sequence[Sequence[str]], logits: Any) -> tuple[float, float]:
    """Return the threshold with the best score on validation, and that score; only `multi` tasks have a choice."""
    given = job.protocol.threshold
    choices = [given] if given is not None else THRESHOLDS if job.task.kind == "multi" else [0.5]

    def scored(threshold: float) -> float:
        predicted = _decode(job, encoded, logits, threshold)
        return score(job.task.score, gold, predicted, job.splits.scored, job.task.positive)

    scores = {choice: scored(choice) for choice in choices}
    best = max(choices, key=lambda choice: (scores[choice], -abs(choice - 0.5)))
    return best, scores[best]


def _decode(job: Job, encoded: Encoded, logits: Any, threshold: float) -> list[list[str]]:
    """Return the predicted labels of each example; a word that was cut off gets O."""
    labels = job.splits.labels
    if job.task.kind != "tokens":
        logits = _whole(logits, encoded.owners, np.maximum if job.task.kind == "multi" else np.add)
    if job.task.kind == "regression":
        mean, spread = _scale(job)
        return [[repr(mean + spread * float(row[0]))] for row in logits]
    if job.task.kind == "multi":
        odds = np.log(threshold / (1 - threshold))
        return [[labels[index] for index in np.flatnonzero(row > odds)] for row in logits]
    best = logits.argmax(-1)
    if job.task.kind == "single":
        return [[labels[index]] for index in best]
    return [[labels[best[place]] if place else "O" for place in places] for places in encoded.words]


def _whole(logits: Any, owners: Sequence[int], join: np.ufunc) -> Any:
    """Join the logits of an example's windows: their mean, or their largest if any window may show a label."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    joined = join.reduceat(np.asarray(logits, np.float64), starts, axis=0)
    return joined / np.bincount(owners)[:, None] if join is np.add else joined


def _balanced_loss(job: Job) -> Any:
    """Build the binary cross-entropy of a `multi` task in which a label's examples weigh as much as the others."""
    labels = job.splits.labels
    held = np.array([sum(label in example.labels for example in job.splits.train) for label in labels], np.float64)
    ratios = (len(job.splits.train) - held) / held
    # A label that every example has cannot be balanced; a weight of 0 would leave its answer to chance.
    weights = torch.tensor(np.where(ratios == 0, 1, ratios), dtype=torch.float32)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), pos_weight=weights.to(logits.device)
        )

    return loss


def _optimizer(model: Any, protocol: Protocol) -> torch.optim.Optimizer:
    """Build AdamW: no decay on biases and norm weights, and the protocol's own learning rate for the new head."""
    head = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("classifier")}
    groups = []
    for is_head in (False, True):
        for decays in (True, False):
            members = [p for p in model.parameters() if (id(p) in head) == is_head and (p.ndim > 1) == decays]
            rate = protocol.head_lr if is_head and protocol.head_lr else protocol.lr
            groups.append({"params": members, "lr": rate, "weight_decay": protocol.weight_decay if decays else 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
