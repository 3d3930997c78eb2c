"""Retention: how well a model still predicts masked tokens of general text, before and after its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from configs.errors import InputError
from configs.files import write_json
from datapipe.inputs import find_files
from datapipe.text import read_texts
from studies.intervals import CHUNK, LEVEL
from studies.models import huggingface_directory, huggingface_tokenizer, load_model, silence_transformers
from studies.probe import require_one_tokenizer
from studies.tasks import Protocol, Task

MASK_RATE = 0.15
"""Share of the tokens of a text that are masked; always the same tokens."""
DRAWS = 2000
Array = NDArray[np.float64]


def retention(
    models: Sequence[str], task: Task, protocol: Protocol, data: Path, output: Path, count: int = 1000
) -> dict[str, Any]:
    """Measure masked accuracy and perplexity of each model on the same masked tokens, and write retention.json.

    Args:
        models: Runs, checkpoints, Hugging Face directories or hub ids: first the model as it was before.
        task: A task of kind `masked`.
        protocol: Its `length` and `batch`.
        data: Folder of the task's text.
        output: Folder of the result.
        count: Most documents that are read, and most windows of `length` tokens. Few long documents, such as books, are
            read in several windows each.

    Returns:
        The content of retention.json: per model `accuracy` and `perplexity`, and for the others the `difference` of the
        accuracy and the `ratio` of the perplexity to the first model's, with 95 % intervals over the documents.

    Raises:
        InputError: A model or the text is wrong, or the tokenizers differ.
    """
    from transformers import AutoConfig

    silence_transformers()
    assert task.files.test is not None
    references = islice((text for path in find_files(str(data / task.files.test)) for text in read_texts(path)), count)
    texts = [text.text.decode("utf-8", "replace") for text in references]
    if len(texts) < 2:
        raise InputError(f"{data / task.files.test}: {len(texts)} documents; give two or more", key="files.test")
    with ExitStack() as stack:
        folders = [stack.enter_context(huggingface_directory(model)) for model in models]
        require_one_tokenizer(folders)
        positions = [AutoConfig.from_pretrained(folder).max_position_embeddings for folder in folders]
        limit = min(protocol.length, *positions)  # other windows would have other masked tokens
        windows = max(1, count // len(texts))
        tables = [_counts(folder, texts, protocol.batch, limit, windows) for folder in folders]
    tables = [table[table[:, 1] > 0] for table in tables]  # short documents may have no masked token
    if len(tables[0]) < 2:
        raise InputError(
            f"{data / task.files.test}: {len(tables[0])} of {len(texts)} documents are long enough to have a masked "
            "token; give more text",
            key="files.test",
            code="too-little-text",
        )
    summary = {
        "task": task.name,
        "documents": len(tables[0]),
        "masked_tokens": int(tables[0][:, 1].sum()),
        "models": [
            {"model": model, **_measures(table.sum(0)), **(_against(tables[0], table) if index else {})}
            for index, (model, table) in enumerate(zip(models, tables, strict=True))
        ],
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "retention.json", summary)
    return summary


def print_retention(summary: dict[str, Any], console: Console) -> None:
    """Print accuracy and perplexity of each model."""
    table = Table("model", "masked accuracy", "perplexity", "change of accuracy", "ratio of perplexity")
    for row in summary["models"]:
        change, ratio = row.get("difference"), row.get("ratio")
        table.add_row(
            row["model"],
            f"{100 * row['accuracy']:.2f} %",
            f"{row['perplexity']:.4g}",
            f"{100 * change[0]:+.2f} points, {100 * change[1]:+.2f} to {100 * change[2]:+.2f}" if change else "-",
            f"{ratio[0]:.4g}, {ratio[1]:.4g} to {ratio[2]:.4g}" if ratio else "-",
        )
    console.print(table)
    console.print(f"{summary['masked_tokens']:,} masked tokens of {summary['documents']:,} documents")


def _counts(folder: Path, texts: Sequence[str], size: int, limit: int, windows: int) -> Array:
    """Count per document: correct tokens, masked tokens and the sum of their losses.

    Its first `windows` windows of `limit` tokens are read, `size` at once.
    """
    from transformers import AutoModelForMaskedLM

    tokenizer = huggingface_tokenizer(folder, ("pad_token", "mask_token"))
    model = load_model(AutoModelForMaskedLM, folder)
    random = np.random.default_rng(0)
    table = np.zeros((len(texts), 3))
    rows: list[dict[str, list[int]]] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        own = tokenizer(
            text,
            truncation=True,
            max_length=limit,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        read = list(zip(own["input_ids"], own["special_tokens_mask"], strict=True))[:windows]
        rows += [{"input_ids": ids, "special_tokens_mask": mask} for ids, mask in read]
        owners += [number] * len(read)
    for start in range(0, len(rows), size):
        batch = tokenizer.pad(rows[start : start + size], return_tensors="pt")
        is_special = batch.pop("special_tokens_mask").numpy().astype(bool)
        drawn = [random.random(int(length)) < MASK_RATE for length in batch["attention_mask"].sum(1)]
        chosen = np.zeros_like(is_special)
        for row, choice in enumerate(drawn):
            chosen[row, : len(choice)] = choice
        masked = torch.from_numpy(chosen & ~is_special)
        ids = batch["input_ids"].masked_fill(masked, tokenizer.mask_token_id).to(model.device)
        with torch.inference_mode():
            outputs = model(ids, attention_mask=batch["attention_mask"].to(model.device))
        logits = outputs.logits[masked.to(model.device)].float()
        wanted = batch["input_ids"][masked].to(model.device)
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double().cpu().numpy()
        correct = (logits.argmax(-1) == wanted).cpu().numpy()
        documents = np.array(owners)[start + np.nonzero(masked.numpy())[0]]
        for column, values in enumerate((correct, np.ones_like(losses), losses)):
            np.add.at(table[:, column], documents, values)
    return table


def _measures(sums: Array) -> dict[str, float]:
    return {"accuracy": float(sums[0] / sums[1]), "perplexity": math.exp(sums[2] / sums[1])}


def _against(first: Array, other: Array) -> dict[str, list[float]]:
    """Compare two models by a paired bootstrap over the documents: value, low and high."""
    random = np.random.default_rng(0)
    drawn: list[Array] = []
    for start in range(0, DRAWS, CHUNK):
        rows = min(CHUNK, DRAWS - start)
        weights = random.multinomial(len(first), np.full(len(first), 1 / len(first)), rows)
        sums = [weights @ table for table in (first, other)]
        drawn.append(np.stack(_changes(sums[0].T, sums[1].T)))
    spread = np.quantile(np.concatenate(drawn, 1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    observed = _changes(first.sum(0), other.sum(0))
    return {
        name: [float(observed[index]), float(spread[0, index]), float(spread[1, index])]
        for index, name in enumerate(("difference", "ratio"))
    }


def _changes(first: Array, other: Array) -> tuple[Any, Any]:
    """Return the difference of the accuracy and the ratio of the perplexity, of sums `[3, ...]`."""
    return other[0] / other[1] - first[0] / first[1], np.exp(other[2] / other[1] - first[2] / first[1])
