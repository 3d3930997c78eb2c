"""The drift of every checkpoint of a run from one model: when layers move, and whether the decay undoes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_json
from monitoring.charts import WIDE, Line, line_chart
from monitoring.run_directory import RunDirectory
from studies.drift import TEXTS, linear_cka, pooled_states, read_documents
from studies.figures import write_figure
from studies.models import huggingface_directory, silence_transformers
from studies.tables import finite


def trajectory(a: str, run: Path, output: Path, *, texts: str = TEXTS, count: int = 500) -> list[dict[str, Any]]:
    """Compare the checkpoints of a run with a model, and write trajectory.json and trajectory.svg.

    Args:
        a: Run, checkpoint or Hugging Face model, such as the matched baseline.
        run: Run directory; `checkpoint.keep_every` decides which checkpoints it kept.
        output: Folder for the two files.
        texts: Held-out text files.
        count: Number of documents that are read.

    Returns:
        One row per checkpoint, in the order of steps: `step` and `cka`, the debiased CKA of each layer.

    Raises:
        InputError: The run has no checkpoint, or the depths differ.
    """
    from engine.checkpoint import describe, list_checkpoints

    silence_transformers()
    checkpoints = list_checkpoints(RunDirectory(run).checkpoints)
    if not checkpoints:
        raise InputError(f"{run} has no checkpoint; --trajectory needs a run directory", code="no-checkpoint")
    documents = read_documents(texts, count)
    with huggingface_directory(a) as folder:
        first = pooled_states(folder, documents)
    rows: list[dict[str, Any]] = []
    for checkpoint in reversed(checkpoints):
        with huggingface_directory(str(checkpoint)) as folder:
            states = pooled_states(folder, documents)
        if len(states) != len(first):
            raise InputError(f"{a} has {len(first)} layers, {checkpoint} has {len(states)}", code="different-depths")
        cka = [finite(linear_cka(x, y)) for x, y in zip(first, states, strict=True)]
        rows.append({"step": describe(checkpoint).step, "cka": cka})
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "trajectory.json", rows)
    lines = [
        Line(
            f"layer {layer}",
            [(row["step"], 1 - row["cka"][layer]) for row in rows if row["cka"][layer] is not None],
            f"c{layer % 8}",
        )
        for layer in range(len(first))
    ]
    title = f"Drift of states (1 - debiased CKA) from {a} over the steps of {run}"
    chart = line_chart(title, lines, number=lambda y: f"{y:.3g}", x_name="step", from_zero=True, size=WIDE)
    write_figure(output / "trajectory.svg", [(title, lines, chart)])
    return rows
