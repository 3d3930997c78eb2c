"""The weights a new run starts from: `model.init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import ModernBertConfig

from configs.schema import RunConfig
from engine import checkpoint as checkpoints
from engine.checkpoint.manager import require_same_shape
from engine.modernbert.config import CONFIG_FILE
from engine.modernbert.convert import huggingface_weights, load_weights, open_weights, random_weights
from engine.modernbert.model import ModernBert

SCRATCH = "scratch"


def check_initial_weights(init: str, architecture: ModernBertConfig) -> list[str]:
    """Check by file headers alone that `model.init` can fill the model.

    Returns:
        Lines that tell a user what the start leaves behind or makes anew.

    Raises:
        InputError: The files are missing or damaged, or do not hold exactly this model.
    """
    if init == SCRATCH:
        return []
    if (Path(init) / CONFIG_FILE).is_file():
        if not checkpoints.describe(Path(init)).optimizer:
            return []
        return [f"the weights of {init} are taken; its optimizer state and its position in the data are left behind"]
    return open_weights(init, architecture)[1]


def load_initial_weights(config: RunConfig, architecture: ModernBertConfig, model: ModernBert, optimizer: Any) -> None:
    """Fill the model from `model.init`: a checkpoint, a Hugging Face model, or random weights.

    Raises:
        InputError: The weights do not fit the model, cannot be read, or are not finite.
    """
    init = config.model.init
    if init != SCRATCH and (Path(init) / CONFIG_FILE).is_file():
        require_same_shape(Path(init), checkpoints.verify(Path(init)), architecture)
        checkpoints.load(Path(init), model, None)
    elif init != SCRATCH:
        load_weights(model, huggingface_weights(init, architecture, config.seed))
    else:
        load_weights(model, random_weights(architecture, config.seed))
    optimizer.reload_model_params()
