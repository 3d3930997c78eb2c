"""`detour export`: from a run or a checkpoint to a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.errors import InputError
from datapipe.tokenizer import load_tokenizer
from monitoring.run_directory import RunDirectory

if TYPE_CHECKING:
    from engine.model_card import ExportKind
    from engine.modernbert.huggingface import ExportDtype


class Exported(NamedTuple):
    """Origin of an exported model."""

    checkpoint: Path
    step: int


def export_model(source: Path, output: Path, kind: ExportKind = "encoder", dtype: ExportDtype = "fp32") -> Exported:
    """Write a Hugging Face model.

    Args:
        source: A run directory, of which the newest valid checkpoint is taken, or a checkpoint.
        output: Directory of the model; new or empty.
        kind: A ModernBertForMaskedLM, or a ModernBertDecoderForCausalLM.
        dtype: dtype of the weights.

    Raises:
        InputError: There is no checkpoint, the checkpoint is damaged, or `output` is not empty.
    """
    from engine.checkpoint import describe, latest_of_run
    from engine.export import export_hf

    checkpoint = latest_of_run(source) if RunDirectory(source).config.is_file() else source
    meta = describe(checkpoint)
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; name a new directory for the model", code="output-not-empty")
    export_hf(checkpoint, output, load_tokenizer(str(checkpoint)), kind=kind, dtype=dtype)
    return Exported(checkpoint, meta.step)
