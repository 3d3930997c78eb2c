"""Layer drift: the distance between two models per layer, in their hidden states and in their weights."""

from __future__ import annotations

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
from configs.files import write_json
from datapipe.inputs import find_files
from datapipe.text import read_texts
from monitoring.charts import WIDE, Line, line_chart
from studies.figures import write_figure
from studies.models import (
    huggingface_directory,
    huggingface_tokenizer,
    load_model,
    silence_transformers,
    weights_digest,
)
from studies.tables import finite

TEXTS = "package://corpus/tico19_en.jsonl.gz"
FEWEST_TEXTS = 4
"""Texts that debiased CKA needs."""
GROUPS = 20
"""Groups of texts that an interval leaves out in turn."""
MAX_TOKENS = 512
"""Tokens that are read of each text."""
BATCH_SIZE = 16
"""Texts per forward pass."""
Array = NDArray[np.float64]
Entry = dict[str, Any]
"""One weight: module, layer (None outside the layers), whether it is a matrix, squared norms `change` and `size`, and
`weight_change`."""


def linear_cka(x: Array, y: Array) -> float:
    """Compute debiased linear centred kernel alignment in float64 (Kornblith et al. 2019; Song et al. 2012).

    Without the correction few texts of wide states look alike, whatever the models. Single precision is too narrow,
    because the formula multiplies four states: it returns NaN or a wrong number.

    Args:
        x: `[texts, any width]`, hidden states of the first model; four texts or more.
        y: `[texts, any width]`, hidden states of the second model.

    Returns:
        1 for states that are equal up to rotation and scale, about 0 for unrelated ones. NaN if the states of one side
        are all the same.
    """
    left, right = _centred_kernel(x), _centred_kernel(y)
    scale = np.linalg.norm(left) * np.linalg.norm(right)
    return float((left * right).sum() / scale) if scale > 0 else math.nan


def cka_interval(x: Array, y: Array) -> tuple[float, float]:
    """Compute the 95 % interval of `linear_cka` over texts, by a jackknife that leaves out one group of them at a time.

    Returns:
        Low and high ends; NaN below 40 texts.
    """
    from scipy.stats import t

    if len(x) < 2 * GROUPS:
        return math.nan, math.nan
    members = np.arange(len(x)) % GROUPS
    without = [linear_cka(x[members != group], y[members != group]) for group in range(GROUPS)]
    error = math.sqrt((GROUPS - 1) / GROUPS * float(np.square(np.array(without) - np.mean(without)).sum()))
    half_width = float(t.ppf(0.975, GROUPS - 1)) * error
    whole = linear_cka(x, y)
    return max(-1.0, whole - half_width), min(1.0, whole + half_width)


def _centred_kernel(x: Array) -> Array:
    """Compute the linear kernel of texts, U-centred: no diagonal, rows and columns that sum to zero."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(0)
    texts = len(x)
    kernel = x @ x.T
    np.fill_diagonal(kernel, 0)
    rows = kernel.sum(1)
    kernel -= (rows[:, None] + rows[None, :]) / (texts - 2)
    kernel += rows.sum() / ((texts - 1) * (texts - 2))
    np.fill_diagonal(kernel, 0)
    return kernel


def drift(
    a: str, b: str, output: Path, *, texts: str = TEXTS, count: int = 500, noise: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Compare two models layer by layer, and write drift.json, weights.json and drift.svg.

    Args:
        a: Run, checkpoint or Hugging Face model.
        b: Model with as many layers.
        output: Folder for the three files.
        texts: Held-out text files.
        count: Number of documents that are read, up to 512 tokens of each.
        noise: Models that differ from `a` in the seed only. The distance between these models is the yardstick.

    Returns:
        The rows of drift.json. Each has the keys `layer`, `cka`, `low` and `high` (its 95 % interval over texts), and
        `weight_change` (||B - A|| / ||A|| over the layer's matrices, None where shapes differ). `cka` is debiased, and
        taken of the mean-pooled outputs of the layer; the last layer's after the final norm. With `noise` each also has
        `noise` (mean of 1 - CKA over pairs of seeds) and `ratio` ((1 - cka) / noise).

    Raises:
        InputError: A reference names no model, the depths differ, there are too few texts, or a model of `noise` is A
            or B.
    """
    silence_transformers()
    models = (a, b, *noise)
    documents = read_documents(texts, count)
    with ExitStack() as stack:
        folders = [stack.enter_context(huggingface_directory(model)) for model in models]
        _require_other_weights(models, [weights_digest(folder) for folder in folders])
        states = [pooled_states(folder, documents) for folder in folders]
        weights = [_weights(folder) for folder in folders[:2]]
    depths = {model: len(layers) for model, layers in zip(models, states, strict=True)}
    if len(set(depths.values())) > 1:
        raise InputError(
            f"models of different depth cannot be compared by layer: {depths} layers", code="different-depths"
        )
    modules = _weight_changes(*weights)
    rows = [
        _row(layer, outputs, [entry for entry in modules if entry["layer"] == layer])
        for layer, outputs in enumerate(zip(*states, strict=True))
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "drift.json", rows)
    table = [{key: entry[key] for key in ("module", "layer", "weight_change")} for entry in modules]
    write_json(output / "weights.json", table)
    _figure(output / "drift.svg", rows, modules, f"{a} and {b}, {len(documents)} texts")
    return rows


def pooled_states(folder: Path, texts: Sequence[str]) -> list[Array]:
    """Compute the output of each layer, averaged over the tokens of each text.

    Args:
        folder: Hugging Face directory of the model and its tokenizer.
        texts: Documents.

    Returns:
        One `[texts, hidden]` float64 array per layer.
    """
    from transformers import AutoModel

    tokenizer = huggingface_tokenizer(folder)
    model = load_model(AutoModel, folder)
    batches: list[list[Array]] = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = tokenizer(
            list(texts[start : start + BATCH_SIZE]),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(model.device)
        mask = batch["attention_mask"]
        with torch.inference_mode():
            outputs = model(batch["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        weight = (mask.double() / mask.sum(1, keepdim=True))[:, :, None]
        batches.append([(layer.double() * weight).sum(1).cpu().numpy() for layer in outputs])
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def _row(layer: int, outputs: Sequence[Array], modules: Sequence[Entry]) -> dict[str, Any]:
    """Compare one layer's outputs of A, B and the models of other seeds."""
    a, b, *seeds = outputs
    cka = linear_cka(a, b)
    low, high = cka_interval(a, b)
    matrices = [entry for entry in modules if entry["is_matrix"]]
    row: dict[str, Any] = {"layer": layer, "cka": finite(cka), "low": finite(low), "high": finite(high)}
    row["weight_change"] = _relative_change(matrices)
    if seeds:
        noise = float(np.mean([1 - linear_cka(x, y) for x, y in combinations([a, *seeds], 2)]))
        row["noise"] = finite(noise)
        row["ratio"] = finite((1 - cka) / noise) if noise else None
    return row


def _require_other_weights(models: Sequence[str], digests: Sequence[str]) -> None:
    """Require that the models of the noise are neither A nor B nor each other, because noise would be zero then."""
    for index in range(2, len(models)):
        if digests[index] in digests[:index]:
            same = models[digests.index(digests[index])]
            raise InputError(
                f"--noise {models[index]} has the weights of {same}; give a model that was trained with another seed",
                key="--noise",
                code="noise-is-the-model",
            )


def read_documents(reference: str, count: int) -> list[str]:
    """Read the first documents of some text that are not blank.

    Raises:
        InputError: There are too few for CKA.
    """
    every = (text.text.decode("utf-8", "replace") for path in find_files(reference) for text in read_texts(path))
    texts = list(islice((text for text in every if text.strip()), count))
    if len(texts) < FEWEST_TEXTS:
        raise InputError(
            f"--texts {reference}: {len(texts)} documents; CKA needs {FEWEST_TEXTS} or more, the paper takes 500",
            key="--texts",
        )
    return texts


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModel

    return dict(load_model(AutoModel, folder).cpu().state_dict())


def _weight_changes(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> list[Entry]:
    entries = []
    for name, weight in old.items():
        layer = re.search(r"layers?\.(\d+)\.", name)
        other = new.get(name)
        change = math.nan
        if other is not None and other.shape == weight.shape:
            change = float((other.double() - weight.double()).square().sum())
        entry = {
            "module": name,
            "layer": int(layer[1]) if layer else None,
            "change": change,
            "size": float(weight.double().square().sum()),
            "is_matrix": weight.ndim > 1,
        }
        entries.append({**entry, "weight_change": _relative_change([entry])})
    return entries


def _relative_change(entries: Sequence[Entry]) -> float | None:
    """Compute ||B - A|| / ||A|| over several weights."""
    change, size = (sum(entry[key] for entry in entries) for key in ("change", "size"))
    relative: float | None = finite(math.sqrt(change / size)) if size else None
    return relative


def _figure(path: Path, rows: Sequence[dict[str, Any]], modules: Sequence[Entry], note: str) -> None:
    def points(key: str, entries: Sequence[dict[str, Any]] = rows) -> list[tuple[float, float]]:
        return [(entry["layer"], math.nan if entry[key] is None else entry[key]) for entry in entries]

    states = [Line("1 - CKA", [(layer, 1 - cka) for layer, cka in points("cka")], "c0")]
    if "noise" in rows[0]:
        states.append(Line("seed noise", points("noise"), "c7"))
    by_name = defaultdict(list)
    for entry in modules:
        if entry["layer"] is not None and "norm" not in entry["module"]:
            by_name[re.split(r"layers?\.\d+\.", entry["module"])[-1].removesuffix(".weight")].append(entry)
    weights = [Line("matrices of the layer", points("weight_change"), "ink")]
    for index, (name, entries) in enumerate(by_name.items()):
        weights.append(Line(name, points("weight_change", entries), f"c{index % 8}", faint=True))
    write_figure(
        path,
        [
            (f"Drift of states (1 - linear CKA): {note}", states, _chart("drift of states", states)),
            ("Relative change of weights ||B - A|| / ||A||", weights, _chart("change of weights", weights)),
        ],
    )


def _chart(title: str, lines: Sequence[Line]) -> str:
    def layer_number(layer: float) -> str:
        return f"{layer:.0f}" if layer == int(layer) else ""

    return line_chart(
        title, lines, number=lambda y: f"{y:.3g}", x_name="layer", x_number=layer_number, from_zero=True, size=WIDE
    )
