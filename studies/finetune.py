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
from studies.models import quiet
from studies.scores import score
from studies.tasks import Example, Protocol, Splits, Task

IGNORE = -100
EVALUATIONS = 20
"""Of a protocol given in steps; one in epochs is validated after each."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    model: str
    """Hugging Face directory."""
    task: Task
    protocol: Protocol
    splits: Splits
    seed: int
    output: Path
    """Directory for predictions.jsonl and, written last, result.json."""
    settings: dict[str, Any]
    """Kept in result.json: what this result is of."""


RESULT, PREDICTIONS = "result.json", "predictions.jsonl"


def finetune(job: Job) -> dict[str, Any]:
    """Fine-tune, keep the weights of the best validation score, score the test examples; the content of result.json."""
    import transformers
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    quiet()
    transformers.set_seed(job.seed)
    protocol = job.protocol
    splits = replace(
        job.splits,
        train=job.splits.train[: protocol.examples],
        validation=job.splits.validation[: protocol.examples],
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = _model(job)
    limit = min(protocol.length, model.config.max_position_embeddings)
    encoded = {
        name: [_encode(example, job, tokenizer, limit) for example in examples]
        for name, examples in (
            ("train", splits.train),
            ("validation", splits.validation),
            ("test", splits.test),
        )
    }
    cuda = torch.cuda.is_available()
    interval = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": protocol.epochs}
    if protocol.steps is not None:
        every = max(1, protocol.steps // EVALUATIONS)
        interval = {"eval_strategy": "steps", "save_strategy": "steps", "max_steps": protocol.steps}
        interval |= {"eval_steps": every, "save_steps": every}
    with TemporaryDirectory(prefix="detour-") as folder:
        arguments = TrainingArguments(
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
            seed=job.seed,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            log_level="error",
            use_cpu=not cuda,
            bf16=cuda,
            dataloader_pin_memory=cuda,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_without_words(encoded["train"]),
            eval_dataset=_without_words(encoded["validation"]),
            data_collator=lambda rows: _collate(rows, tokenizer.pad_token_id, job.task.kind == "tokens"),
            compute_metrics=lambda output: {
                "score": _score(job, splits.validation, _decode(job, encoded["validation"], output.predictions))
            },
            optimizers=(_optimizer(model, protocol), None),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        trainer.compute_metrics = None  # it scores validation examples
        predicted = _decode(job, encoded["test"], trainer.predict(_without_words(encoded["test"])).predictions)
        best, best_step = trainer.state.best_metric, trainer.state.best_global_step
    job.output.mkdir(parents=True, exist_ok=True)
    with (job.output / PREDICTIONS).open("w", encoding="utf-8") as file:
        for example, labels in zip(splits.test, predicted, strict=True):
            line = {"where": example.where, "gold": list(example.labels), "predicted": labels}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    result = {
        "score": _score(job, splits.test, predicted),
        "validation_score": best,
        "best_step": best_step,
        "seed": job.seed,
        **job.settings,
    }
    partial = job.output / f".{RESULT}.partial"
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(job.output / RESULT)
    return result


def _model(job: Job) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    labels = job.splits.labels
    kind = AutoModelForTokenClassification if job.task.kind == "tokens" else AutoModelForSequenceClassification
    problem = {"single": "single_label_classification", "multi": "multi_label_classification"}.get(job.task.kind)
    return kind.from_pretrained(
        job.model,
        dtype=torch.float32,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **({"problem_type": problem} if problem else {}),
    )


def _encode(example: Example, job: Job, tokenizer: Any, limit: int) -> dict[str, Any]:
    """Ids, labels and, for token classification, `words`: the place of the first token of each word, -1 if cut off."""
    index = {label: number for number, label in enumerate(job.splits.labels)}
    if job.task.kind != "tokens":
        encoding = tokenizer(example.text, example.pair, truncation=True, max_length=limit)
        if job.task.kind == "single":
            return {"input_ids": encoding["input_ids"], "labels": index[example.labels[0]]}
        return {"input_ids": encoding["input_ids"], "labels": [float(label in example.labels) for label in index]}
    # The words are tokenized in their sentence, with the spaces the model knows from pretraining.
    encoding = tokenizer(example.text, truncation=True, max_length=limit, return_offsets_mapping=True)
    spans = [(first, last, place) for place, (first, last) in enumerate(encoding["offset_mapping"]) if last > first]
    labels, places, start, at = [IGNORE] * len(encoding["input_ids"]), [], 0, 0
    for word, tag in zip(example.words, example.labels, strict=True):
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        found = at < len(spans) and spans[at][0] < start + len(word)
        places.append(spans[at][2] if found else -1)
        if found:
            labels[spans[at][2]] = index[tag]
        start += len(word) + 1
    return {"input_ids": encoding["input_ids"], "labels": labels, "words": places}


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
    """The predicted labels of each example; words that were cut off are O."""
    labels = job.splits.labels
    if job.task.kind == "single":
        return [[labels[best]] for best in logits.argmax(-1)]
    if job.task.kind == "multi":
        return [[labels[place] for place in np.flatnonzero(row > 0)] for row in logits]
    best = logits.argmax(-1)
    return [
        [labels[best[row][place]] if place >= 0 else "O" for place in words["words"]] for row, words in enumerate(rows)
    ]


def _score(job: Job, examples: Sequence[Example], predicted: list[list[str]]) -> float:
    gold = [example.labels for example in examples]
    return score(job.task.score, gold, predicted, job.splits.labels, job.task.positive)


def _optimizer(model: Any, protocol: Protocol) -> torch.optim.Optimizer:
    """AdamW; no decay on biases and norms, and the protocol's own learning rate for the new head where it has one."""
    head = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("classifier")}
    groups = []
    for is_head in (False, True):
        for decays in (True, False):
            members = [p for p in model.parameters() if (id(p) in head) == is_head and (p.ndim > 1) == decays]
            rate = protocol.head_lr if is_head and protocol.head_lr else protocol.lr
            groups.append({"params": members, "lr": rate, "weight_decay": protocol.weight_decay if decays else 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def read_result(output: Path, settings: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """A finished result of these settings; None where there is none. InputError where it is of something else."""
    path = output / RESULT
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if any(result.get(key) != value for key, value in settings.items()) or result["seed"] != seed:
        changed = [key for key, value in settings.items() if result.get(key) != value]
        raise InputError(f"{path} is the result of another {', '.join(changed)}; choose another --output")
    return result
