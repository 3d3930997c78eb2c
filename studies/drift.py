"""Layer drift: how far two models are apart, layer by layer, in what they compute and in their weights."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import InputError
from datapipe.text import find_files, read_texts
from monitoring.charts import WIDE, Line, line_chart
from studies.figures import write_figure
from studies.models import huggingface_directory, quiet

TEXTS = "package://corpus/tico19_en.jsonl.gz"
LONGEST = 512
"""Tokens of a text that are read."""
BATCH = 16
Array = NDArray[np.float64]


def linear_cka(x: Array, y: Array) -> float:
    """Linear centred kernel alignment of two sets of states [texts, any width], in float64 (Kornblith et al. 2019).

    1 for states equal up to rotation and scale. NaN where one side does not vary at all. The products of four states
    that it needs leave the range of single precision, where it then returns NaN or a wrong number.
    """
    x, y = (np.asarray(states, np.float64) for states in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    left, right = x @ x.T, y @ y.T
    scale = np.linalg.norm(left) * np.linalg.norm(right)
    return float((left * right).sum() / scale) if scale > 0 else math.nan


def drift(
    a: str, b: str, output: Path, *, texts: str = TEXTS, count: int = 500, noise: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Compare two models layer by layer; write drift.json, weights.json and drift.svg into `output`.

    Args:
        a, b: Runs, checkpoints or Hugging Face models with equally many layers.
        texts: Held-out text files; the first `count` documents are read, up to 512 tokens of each.
        noise: Models like `a` but for their seed. How far they are from `a` and each other is the yardstick.

    Returns the rows of drift.json: layer, cka (of the mean-pooled outputs of the layer; those of the last one are
    taken after the final norm), weight_change (||B - A|| / ||A||; None where shapes differ), and with `noise` also
    noise (mean 1 - CKA of two seeds) and ratio ((1 - cka) / noise). Raises InputError.
    """
    quiet()
    documents = _documents(texts, count)
    with ExitStack() as stack:
        folders = [stack.enter_context(huggingface_directory(model)) for model in (a, b, *noise)]
        states = [pooled_states(folder, documents) for folder in folders]
        weights = [_weights(folder) for folder in folders[:2]]
    depths = {model: len(layers) for model, layers in zip((a, b, *noise), states, strict=True)}
    if len(set(depths.values())) > 1:
        raise InputError(f"models of different depth cannot be compared by layer: {depths} layers")
    modules = _weight_changes(*weights)
    rows: list[dict[str, Any]] = []
    for layer, (left, right) in enumerate(zip(*states[:2], strict=True)):
        cka = linear_cka(left, right)
        inside = [entry for entry in modules if entry["layer"] == layer]
        row: dict[str, Any] = {"layer": layer, "cka": _finite(cka), "weight_change": _together(inside)}
        if noise:
            seeds = [states[0][layer], *(other[layer] for other in states[2:])]
            row["noise"] = _finite(float(np.mean([1 - linear_cka(x, y) for x, y in combinations(seeds, 2)])))
            row["ratio"] = (1 - cka) / row["noise"] if row["noise"] else None
        rows.append(row)
    output.mkdir(parents=True, exist_ok=True)
    (output / "drift.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    table = [{key: entry[key] for key in ("module", "layer", "weight_change")} for entry in modules]
    (output / "weights.json").write_text(json.dumps(table, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _figure(output / "drift.svg", rows, modules, f"{a} and {b}, {len(documents)} texts")
    return rows


def pooled_states(folder: Path, texts: Sequence[str]) -> list[Array]:
    """The output of each layer, averaged over the tokens of each text in float64: a [texts, hidden] array a layer."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    batches: list[list[Array]] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(device)
        mask = batch["attention_mask"]
        with torch.inference_mode():
            outputs = model(batch["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        weight = (mask.double() / mask.sum(1, keepdim=True))[:, :, None]
        batches.append([(layer.double() * weight).sum(1).cpu().numpy() for layer in outputs])
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def _documents(reference: str, count: int) -> list[str]:
    found = islice((text for path in find_files(reference) for text in read_texts(path)), count)
    texts = [text.text.decode("utf-8", "replace") for text in found]
    if len(texts) < 2:
        raise InputError(f"--texts {reference}: {len(texts)} documents; CKA needs two or more, the paper takes 500")
    return texts


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModel

    return dict(AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict())


def _weight_changes(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """For each weight its module, layer (None outside the layers), squared norms of change and original, and ratio."""
    entries = []
    for name, weight in old.items():
        number = re.search(r"layers?\.(\d+)\.", name)
        other = new.get(name)
        fits = other is not None and other.shape == weight.shape
        change = float((other.double() - weight.double()).square().sum()) if fits and other is not None else math.nan
        entry = {
            "module": name,
            "layer": int(number[1]) if number else None,
            "change": change,
            "size": float(weight.double().square().sum()),
        }
        entries.append({**entry, "weight_change": _together([entry])})
    return entries


def _together(entries: Sequence[dict[str, Any]]) -> float | None:
    """||B - A|| / ||A|| over several weights."""
    change, size = (sum(entry[key] for entry in entries) for key in ("change", "size"))
    return _finite(math.sqrt(change / size)) if size else None


def _figure(path: Path, rows: Sequence[dict[str, Any]], modules: Sequence[dict[str, Any]], note: str) -> None:
    def curve(key: str, of: Sequence[dict[str, Any]] = rows) -> list[tuple[float, float]]:
        return [(row["layer"], math.nan if row[key] is None else row[key]) for row in of]

    states = [Line("1 - CKA", [(x, 1 - y) for x, y in curve("cka")], "c0")]
    if "noise" in rows[0]:
        states.append(Line("seed noise", curve("noise"), "c7"))
    by_kind = defaultdict(list)
    for entry in modules:
        if entry["layer"] is not None and "norm" not in entry["module"]:
            by_kind[re.split(r"layers?\.\d+\.", entry["module"])[-1].removesuffix(".weight")].append(entry)
    weights = [Line("whole layer", curve("weight_change"), "ink")]
    weights += [
        Line(kind, curve("weight_change", of), f"c{i % 8}", True) for i, (kind, of) in enumerate(by_kind.items())
    ]
    write_figure(
        path,
        [
            (f"Drift of states (1 - linear CKA): {note}", states, _chart("drift of states", states)),
            ("Relative change of weights ||B - A|| / ||A||", weights, _chart("change of weights", weights)),
        ],
    )


def _chart(title: str, lines: Sequence[Line]) -> str:
    def whole(layer: float) -> str:
        return f"{layer:.0f}" if layer == int(layer) else ""

    return line_chart(
        title, lines, number=lambda y: f"{y:.3g}", x_name="layer", x_number=whole, from_zero=True, size=WIDE
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
