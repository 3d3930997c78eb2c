"""`detour study NAME --toy`: the study at a size for two cores, with text and tasks made from the sample corpus.

It shows that every part of the study runs, in minutes and without a network. Its numbers say nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.files import write_atomically
from datapipe.inputs import find_files
from datapipe.new_tokenizer import train_tokenizer
from datapipe.text import read_texts
from studies.plan import Study, is_seed
from studies.rule import FINE_TUNED

ORDERS = 2
"""Orders of a toy; one where the grid has other keys beside the seeds, because minutes are few."""
TEXTS, TASK_TEXTS, HELD_OUT_TEXTS = 300, 250, 60
"""Documents to train on, to make tasks from, and to hold out. They are disjoint."""
VOCABULARY = 2048
VALUES: dict[str, list[Any]] = {
    "parameters": ["600k", "930k", "1.8M"],
    "tokens": ["16k", "24k", "32k"],
    "decay_ratio": [0.2, 0.5],
}
"""Values of grid keys that a toy can afford. Other keys keep their first two."""
COMMON: dict[str, Any] = {"decay_floor": 4, "lr_of_base": 5e-4}
"""Toy values of `common`."""
SENTENCES = {"train": 160, "dev": 40, "test": 80}
"""Most examples per split of a toy task."""
_QUESTION = re.compile(r"^(What (?:is|are)|How|Is|Who|Do|When|Where)\b(.*)\?")
_DISEASE = re.compile(r"\w+(itis|osis|emia|oma|pathy)|(syndrome|disease|disorder|cancer|anemia)s?", re.IGNORECASE)
_WORD = re.compile(r"\w+|[^\w\s]")


def toy_study(study: Study, output: Path) -> tuple[Study, Path]:
    """Scale a study down, and write its recipe, text, tokenizer and tasks into a folder.

    Args:
        study: The study, whose recipe, text and tasks are replaced.
        output: Folder of the study.

    Returns:
        The toy study, and the folder of its recipe.
    """
    folder = output.absolute() / "toy"
    _write_files(folder)
    grid, orders = {}, ORDERS if all(map(is_seed, study.grid)) else 1
    for key, values in study.grid.items():
        key = "parameters" if key == "model.init" else key
        grid[key] = values[:orders] if is_seed(key) else VALUES.get(key, values[:2])
    masked = [task for task in study.evaluate if Path(task.task).stem == "retention"]
    ways: list[str] = list(dict.fromkeys(way for task in study.evaluate if task not in masked for way in task.by))
    tasks: list[dict[str, Any]] = [
        {"task": str(folder / "retention.yaml"), "protocol": {"length": 128, "batch": 16}} for _ in masked
    ]
    for name in ("entities", "questions") if len(masked) < len(study.evaluate) else ():
        tasks.append({"task": str(folder / f"{name}.yaml"), "seeds": [17], "by": ways or [FINE_TUNED]})
    changed = {
        "name": f"{study.name}-toy",
        "recipe": "toy.yaml",
        "grid": grid,
        "common": {key: COMMON.get(key, value) for key, value in study.common.items()},
        "evaluate": tasks,
        "held_out": None,
        "rule": {**study.rule.model_dump(exclude_none=True, exclude={"look_after"})} if study.rule else None,
        "toy": True,
    }
    return Study.model_validate({**study.model_dump(), **changed}), folder


def _write_files(folder: Path) -> None:
    """Write everything that a toy reads; the recipe comes last and tells that the rest is there."""
    if (folder / "toy.yaml").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = sorted(_texts("medquad"), key=lambda text: hashlib.sha256(text.encode()).digest())
    ends = (TEXTS, TEXTS + TASK_TEXTS, TEXTS + TASK_TEXTS + HELD_OUT_TEXTS)
    train, of_tasks, held_out = texts[: ends[0]], texts[ends[0] : ends[1]], texts[ends[1] : ends[2]]
    general = list(_texts("tico19_en"))[:400]
    for name, part in (("train", train), ("held-out", held_out), ("general", general)):
        _write_lines(folder / f"{name}.jsonl", [{"text": text} for text in part])
    # The shipped vocabulary would be most of a toy model.
    train_tokenizer(folder / "tokenizer", train, VOCABULARY, show_progress=False)
    protocol = {"preset": "english", "epochs": 3, "lr": 1e-3, "length": 96}
    entities = [sentence for text in of_tasks for sentence in _entities(text)]
    for split, sentences in _split(entities):
        lines = ("".join(f"{word}\t{tag}\n" for word, tag in sentence) for sentence in sentences)
        write_atomically(folder / f"entities-{split}.tsv", "\n".join(lines))
    _write_task(folder, "entities", "tsv", kind="tokens", score="entity_f1", protocol=protocol)
    questions = [row for text in of_tasks if (row := _question(text))]
    for split, rows in _split(questions):
        _write_lines(folder / f"questions-{split}.jsonl", rows)
    columns = {"text": "answer", "label": "question"}
    _write_task(folder, "questions", "jsonl", kind="single", score="micro_f1", columns=columns, protocol=protocol)
    retention = {"name": "retention", "kind": "masked", "score": "masked_accuracy", "files": {"test": "general.jsonl"}}
    write_atomically(folder / "retention.yaml", yaml.safe_dump({**retention, "protocol": protocol}))
    write_atomically(folder / "toy.yaml", yaml.safe_dump(_recipe(folder), sort_keys=False))


def _recipe(folder: Path) -> dict[str, Any]:
    model = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 1}
    return {
        "name": "toy",
        "model": model,
        "tokenizer": str(folder / "tokenizer"),
        "data": {
            "sequence_length": 128,
            "streams": 2,
            "sources": [{"name": "train", "text": str(folder / "train.jsonl"), "shards": str(folder / "shards")}],
            "evaluation": {
                "text": str(folder / "held-out.jsonl"),
                "shards": str(folder / "held-out"),
                "every": "1000000 steps",
                "sequences": 32,
            },
        },
        "batch": {"sequences": 8, "micro": 8},
        "phases": [
            {"objective": "clm", "steps": 24, "lr": {"warmup": "2 steps"}},
            {"objective": "mlm", "steps": 8, "mask_rate": 0.15, "lr": {"shape": "1-sqrt", "final": 0.1}},
        ],
        "optimizer": {"lr": 3e-3},
        "precision": "fp32",
        "checkpoint": {"every": "1000000 steps", "keep": 1},
        "cluster": {"workers_per_node": 1},
        "monitoring": {"every": "1 steps"},
    }


def _texts(corpus: str) -> Iterator[str]:
    for file in find_files(f"package://corpus/{corpus}.jsonl.gz"):
        for text in read_texts(file):
            yield text.text.decode()


def _entities(text: str) -> Iterator[list[tuple[str, str]]]:
    """Yield sentences of an answer with words such as `arthritis` and `syndrome` as entities, which toys can learn."""
    for sentence in re.split(r"(?<=\.) ", text.partition("\n")[2])[:4]:
        words = _WORD.findall(sentence)[:60]
        if len(words) > 3:
            yield [(word, "B-Disease" if _DISEASE.fullmatch(word) else "O") for word in words]


def _question(text: str) -> dict[str, str] | None:
    """Return an answer with the kind of its question."""
    asked, _, answer = text.partition("\n")
    found = _QUESTION.match(asked)
    if found is None:
        return None
    kinds = ("symptoms", "treatments", "genetic changes", "inherit", "causes", "many people")
    kind = next((kind for kind in kinds if kind in found[2]), "definition" if "is (are)" in asked else "other")
    return {"answer": " ".join(answer.split()[:60]), "question": kind}


def _split(rows: Sequence[Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Divide examples 4 : 1 : 2 in their order."""
    first, second = len(rows) * 4 // 7, len(rows) * 5 // 7
    for split, part in zip(SENTENCES, (rows[:first], rows[first:second], rows[second:]), strict=True):
        yield split, part[: SENTENCES[split]]


def _write_task(folder: Path, name: str, suffix: str, **settings: Any) -> None:
    splits = zip(("train", "validation", "test"), SENTENCES, strict=True)
    files = {key: f"{name}-{split}.{suffix}" for key, split in splits}
    write_atomically(folder / f"{name}.yaml", yaml.safe_dump({"name": name, "files": files, **settings}))


def _write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
