"""The weights a new run starts from, `model.init`, and those that a phase makes anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import ModernBertConfig

from configs.errors import InputError
from configs.schema import SCRATCH, RunConfig
from datapipe.tokenizer import Tokenizer, first_difference, load_tokenizer
from engine import checkpoint as checkpoints
from engine.checkpoint.manager import require_same_shape
from engine.megatron.optimizer import PARTS, replace_weights
from engine.modernbert.config import is_checkpoint, locate
from engine.modernbert.convert import (
    huggingface_weights,
    load_weights,
    open_weights,
    random_weights,
    rank_slices,
)
from engine.modernbert.model import ModernBert


def check_initial_weights(init: str, architecture: ModernBertConfig, tokenizer: Tokenizer) -> list[str]:
    """Check by file headers alone that `model.init` can fill the model, and that the tokenizer is the model's.

    Args:
        init: `model.init`, other than `scratch`.
        architecture: The model to fill.
        tokenizer: The run's tokenizer.

    Returns:
        Lines that tell a user what the start leaves behind or makes anew.

    Raises:
        InputError: The files are missing or damaged, do not hold exactly this model, or hold another tokenizer.
    """
    path = locate(init)
    if is_checkpoint(path):
        if not checkpoints.describe(path).optimizer:
            return []
        return [
            f"the weights of {init} are taken; its optimizer state and its position in the data are left "
            "behind; detour-train --from RUN@STEP keeps them"
        ]
    return [*open_weights(init, architecture)[1], *_check_tokenizer(init, path, tokenizer)]


def _check_tokenizer(init: str, folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Refuse a tokenizer whose ids mean other tokens than those that the model was trained on."""
    if not (folder / "tokenizer.json").is_file():
        return [f"{init} holds no tokenizer.json, so nothing says whether {tokenizer.name} is its tokenizer"]
    if difference := first_difference(load_tokenizer(str(folder)), tokenizer):
        raise InputError(
            f"tokenizer: {tokenizer.name} is not the tokenizer of {init} ({difference}); set tokenizer={init}",
            key="tokenizer",
            code="tokenizer-not-the-models",
        )
    return []


def load_initial_weights(config: RunConfig, architecture: ModernBertConfig, model: ModernBert, optimizer: Any) -> None:
    """Fill the model from `model.init`: a checkpoint, a Hugging Face model, or random weights.

    Raises:
        InputError: The weights do not fit the model, cannot be read, or are not finite.
    """
    init = config.model.init
    if init == SCRATCH:
        load_weights(model, random_weights(architecture, config.seed))
    elif is_checkpoint(path := locate(init)):
        require_same_shape(path, checkpoints.verify(path), architecture)
        checkpoints.load(path, model, None)
    else:
        load_weights(model, huggingface_weights(init, architecture, config.seed))
    optimizer.reload_model_params()


def reset_head(model: ModernBert, optimizer: Any, seed: int, phase: int) -> None:
    """Give the prediction head new weights, a pure function of seed and phase; all ranks call it together.

    Args:
        model: This rank's bare model.
        optimizer: The distributed optimizer.
        seed: Seed of the run.
        phase: Index of the phase that begins, so that two resets differ.
    """
    weights = random_weights(model.architecture, f"reset {seed} {phase}")
    replace_weights(optimizer, dict(rank_slices(model, weights, PARTS["head"])))
