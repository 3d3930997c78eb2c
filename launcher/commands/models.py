"""Commands that turn one form of a model into another: export, import, merge, transplant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from launcher.commands.options import Output

EXPORTS = {"encoder": "ModernBertForMaskedLM", "decoder": "ModernBertDecoderForCausalLM"}
"""Class of each kind of export."""


def export(
    source: Annotated[Path, typer.Argument(help="A run directory (its newest checkpoint) or a checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    kind: Annotated[
        Literal["encoder", "decoder"], typer.Option("--as", help="A masked model, or one that predicts the next token.")
    ] = "encoder",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="bf16 rounds the fp32 main weights.")] = "fp32",
) -> None:
    """Write a Hugging Face model: safetensors, tokenizer, model card."""
    from launcher.export import export_model

    exported = export_model(source, output, kind, dtype)
    print(f"{output}: {EXPORTS[kind]} after step {exported.step:,}, from {exported.checkpoint}")


def import_(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub id of a ModernBERT.")],
    checkpoint: Annotated[Path, typer.Argument(help="Directory to write.")],
) -> None:
    """Turn a Hugging Face ModernBERT into a step-0 checkpoint; `model.init` does the same at the start of a run."""
    from engine.export import import_hf

    import_hf(model, checkpoint)
    print(f"{checkpoint}: step 0 of {model}; train from it with model.init={checkpoint}")


def merge(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="One run with --steps; else runs, checkpoints or Hugging Face models."),
    ],
    output: Output,
    steps: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Merge the run's N newest checkpoints that are kept: N saved steps, not N steps back.",
        ),
    ] = None,
    weights: Annotated[
        Literal["mean", "1-sqrt"],
        typer.Option(
            help="Decay of the learning rate that the merge stands for, over the N checkpoints: mean (equal weights, a "
            "linear decay) or 1-sqrt. Several models have equal weights."
        ),
    ] = "mean",
) -> None:
    """Average the weights of a run's checkpoints, or of several models.

    Writes a Hugging Face model, OUTPUT/hf, and a checkpoint of step 0 for model.init, OUTPUT/checkpoint.
    """
    from rich.console import Console

    from engine.merge import merge as run
    from launcher.status_line import status_line

    with status_line(Console(), "reading") as show:
        merged = run(models, output, show, steps=steps, weights=weights)
    for name, coefficient in merged.shares:
        print(f"{coefficient:.6f}  {name}")
    for note in merged.notes:
        print(f"note: {note}")
    print(
        f"{output / 'hf'}: merge of {len(merged.shares)} models; train from it with model.init={output / 'checkpoint'}"
    )


def transplant(
    a: Annotated[str, typer.Argument(help="A run, a checkpoint or a Hugging Face model: all other weights.")],
    b: Annotated[str, typer.Argument(help="The model that gives the layers.")],
    layers: Annotated[str, typer.Option(help="Layers from 0, such as 0-7 or 0-3,9.")],
    output: Output,
) -> None:
    """Write model A with some layers of model B, as a Hugging Face model to probe."""
    from studies.transplant import parse_layers
    from studies.transplant import transplant as run

    moved = run(a, b, parse_layers(layers), output)
    print(f"{output}: {a} with layers {layers} of {b} ({moved} weights)")
