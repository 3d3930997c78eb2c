"""One fine-tuning of one model on one task with one seed, by the transformers Trainer, and its score."""

from __future__ import annotations

import json
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
from studies.models import silence_transformers
from studies.scores import score
from studies.tasks import Protocol, Task

RESULT, PREDICTIONS = "result.json", "predictions.jsonl"
IGNORE = -100
"""Label of a position without loss."""
EVALUATIONS = 20
"""Validations of a fine-tuning given in steps. One given in epochs is validated after each epoch."""
Rows = list[dict[str, Any]]
"""Encoded examples: `input_ids`, `labels`, and for token classification `words`."""


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
    """Identity of the result: model, weights, task, data and protocol. Kept in result.json."""


def finetune(job: Job) -> dict[str, Any]:
    """Fine-tune a model, keep the weights of the best validation score, and score the test examples.

    Returns:
        The content of result.json.
    """
    import transformers

    silence_transformers()
    transformers.set_seed(job.seed)
    few = job.protocol.examples
    splits = replace(job.splits, train=job.splits.train[:few], validation=job.splits.validation[:few])
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    model = _model(job)
    limit = min(job.protocol.length, model.config.max_position_embeddings)
    train, validation, test = (
        [_encode(example, job, tokenizer, limit) for example in examples]
        for examples in (splits.train, splits.validation, splits.test)
    )

    def validation_score(output: Any) -> dict[str, float]:
        return {"score": _score(job, splits.validation, _decode(job, validation, output.predictions))}

    with TemporaryDirectory(prefix="detour-") as folder:
        trainer: Any = transformers.Trainer(
            model=model,
            args=_training_arguments(job.protocol, job.seed, folder),
            train_dataset=_without_words(train),
            eval_dataset=_without_words(validation),
            data_collator=lambda rows: _collate(rows, tokenizer.pad_token_id, job.task.kind == "tokens"),
            compute_metrics=validation_score,
            optimizers=(_optimizer(model, job.protocol), None),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        trainer.compute_metrics = None  # it scores validation examples
        predicted = _decode(job, test, trainer.predict(_without_words(test)).predictions)
    result = {
        "score": _score(job, splits.test, predicted),
        "validation_score": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "seed": job.seed,
        **job.settings,
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
    wanted = {"seed": job.seed, **job.settings}
    changed = [key for key, value in wanted.items() if result.get(key) != value]
    if changed:
        raise InputError(
            f"{path} is the result of another {', '.join(changed)}; choose another --output",
            key="--output",
            code="result-of-other-settings",
        )
    return result


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
        {"where": example.location, "gold": list(example.labels), "predicted": labels}
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
    problem = {"single": "single_label_classification", "multi": "multi_label_classification"}.get(job.task.kind)
    return model_class.from_pretrained(
        job.model,
        dtype=torch.float32,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **({"problem_type": problem} if problem else {}),
    )


def _encode(example: Example, job: Job, tokenizer: Any, limit: int) -> dict[str, Any]:
    """Encode one example. `words` holds the position of each word's first token, -1 for a word that was cut off."""
    index = {label: number for number, label in enumerate(job.splits.labels)}
    if job.task.kind == "tokens":
        return _encode_words(example, index, tokenizer, limit)
    encoding = tokenizer(example.text, example.pair, truncation=True, max_length=limit)
    labels = [float(label in example.labels) for label in index]
    return {
        "input_ids": encoding["input_ids"],
        "labels": index[example.labels[0]] if job.task.kind == "single" else labels,
    }


def _encode_words(example: Example, index: dict[str, int], tokenizer: Any, limit: int) -> dict[str, Any]:
    """Encode the sentence as a whole, because the model knows words with the spaces before them from pretraining."""
    encoding = tokenizer(example.text, truncation=True, max_length=limit, return_offsets_mapping=True)
    tokens = [(start, end, position) for position, (start, end) in enumerate(encoding["offset_mapping"]) if end > start]
    labels = [IGNORE] * len(encoding["input_ids"])
    positions = []
    word_start, at = 0, 0
    for word, tag in zip(example.words, example.labels, strict=True):
        while at < len(tokens) and tokens[at][1] <= word_start:
            at += 1
        position = -1
        if at < len(tokens) and tokens[at][0] < word_start + len(word):
            position = tokens[at][2]
            labels[position] = index[tag]
        positions.append(position)
        word_start += len(word) + 1
    return {"input_ids": encoding["input_ids"], "labels": labels, "words": positions}


def _without_words(rows: Rows) -> Rows:
    return [{key: value for key, value in row.items() if key != "words"} for row in rows]


def _collate(rows: Rows, pad: int, label_each_token: bool) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = padded("labels", IGNORE) if label_each_token else torch.tensor([row["labels"] for row in rows])
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, "labels": labels}


def _decode(job: Job, rows: Rows, logits: Any) -> list[list[str]]:
    """Return the predicted labels of each example; a word that was cut off gets O."""
    labels = job.splits.labels
    if job.task.kind == "multi":
        return [[labels[index] for index in np.flatnonzero(row > 0)] for row in logits]
    best = logits.argmax(-1)
    if job.task.kind == "single":
        return [[labels[index]] for index in best]
    return [
        [labels[best[number][position]] if position >= 0 else "O" for position in row["words"]]
        for number, row in enumerate(rows)
    ]


def _score(job: Job, examples: Sequence[Example], predicted: list[list[str]]) -> float:
    gold = [example.labels for example in examples]
    return score(job.task.score, gold, predicted, job.splits.labels, job.task.positive)


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
