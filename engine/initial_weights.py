"""The weights a new run starts from, `model.init`, and those that a phase makes anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import ModernBertConfig

from configs.errors import InputError
from configs.schema import SCRATCH, RunConfig
from datapipe.tokenizer import Tokenizer, load_tokenizer
from datapipe.vocabulary import first_difference, pieces_of_new_tokens
from engine import checkpoint as checkpoints
from engine.checkpoint.manager import require_same_shape
from engine.export import checkpoint_weights
from engine.megatron.optimizer import PARTS, replace_weights
from engine.modernbert.config import build_config, is_checkpoint, locate, read_config
from engine.modernbert.convert import (
    NewTokens,
    huggingface_weights,
    open_weights,
    random_weights,
    rank_slices,
)
from engine.modernbert.model import ModernBert
from engine.modernbert.pretrained import PretrainedWeights


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
    trained, notes = _trained_tokenizer(path)
    new_tokens = _new_tokens(init, trained, tokenizer)
    if trained is None:
        notes = [f"{init}: {notes[0]}, so nothing says whether {tokenizer.name} is its tokenizer"]
    if new_tokens:
        first = ", ".join(repr(tokenizer.backend.id_to_token(token_id)) for token_id in list(new_tokens)[:3])
        more = f" and {len(new_tokens) - 3:,} more" if len(new_tokens) > 3 else ""
        notes.append(
            f"{tokenizer.name} extends the model's vocabulary by {first}{more}; each new row of embedding and decoder "
            "bias starts as the mean of the rows of its pieces"
        )
    if is_checkpoint(path):
        if checkpoints.describe(path).optimizer:
            left = (
                "its optimizer state and its position in the data are left behind; detour-train --from RUN@STEP keeps "
                "them"
            )
            notes.append(f"the weights of {init} are taken; {left}")
        return notes
    return [*open_weights(init, architecture, new_tokens)[1], *notes]


def load_initial_weights(
    config: RunConfig, architecture: ModernBertConfig, tokenizer: Tokenizer, model: ModernBert, optimizer: Any
) -> None:
    """Fill the model from `model.init`: a checkpoint, a Hugging Face model, or random weights.

    Raises:
        InputError: The weights do not fit the model, cannot be read, or are not finite.
    """
    init = config.model.init
    if init == SCRATCH:
        source = random_weights(architecture, config.seed)
    elif is_checkpoint(path := locate(init)):
        require_same_shape(path, checkpoints.verify(path), architecture)
        source = checkpoint_weights(path, architecture)
    else:
        new_tokens = _new_tokens(init, _trained_tokenizer(path)[0], tokenizer)
        source = huggingface_weights(init, architecture, config.seed, new_tokens)
    for parameter, tensor in rank_slices(model, source):
        # Megatron's `reload_model_params` would fill the main weights from the model's, which may be rounded to BF16.
        replace_weights(optimizer, {parameter: tensor})


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


def initial_sha256(init: str) -> str:
    """Identify the weights of `model.init` by content, from headers and the smallest tensors.

    Raises:
        InputError: Nothing lies there, or it cannot be read.
    """
    path = locate(init)
    if is_checkpoint(path):
        files = json.dumps(checkpoints.describe(path).files, sort_keys=True)
        return hashlib.sha256(files.encode()).hexdigest()
    return PretrainedWeights(path).sha256()


def _trained_tokenizer(path: Path) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer that the weights were trained with; None, and the reason, where it is not there."""
    if is_checkpoint(path):
        try:
            return load_tokenizer(str(path)), []
        except InputError as error:
            return None, [f"the checkpoint's own tokenizer cannot be had ({error})"]
    folder = path.parent if path.is_file() else path
    if not (folder / "tokenizer.json").is_file():
        return None, ["it holds no tokenizer.json"]
    return load_tokenizer(str(folder)), []


def _new_tokens(init: str, trained: Tokenizer | None, chosen: Tokenizer) -> NewTokens:
    """The tokens that only the run's tokenizer has, by their pieces in the model's.

    Raises:
        InputError: An id means another token than the one that the model was trained on, or that cannot be known.
    """
    if trained is None:
        entries = build_config(read_config(init), init).vocab_size
        if entries < chosen.vocab_size:
            raise InputError(
                f"tokenizer: {chosen.name} has {chosen.vocab_size:,} tokens and {init} {entries:,} entries, and no "
                f"tokenizer.json in {init} shows that one extends the other; save the model's own tokenizer there",
                key="tokenizer",
                code="tokenizer-too-large",
            )
        return {}
    if difference := first_difference(trained, chosen):
        raise InputError(
            f"tokenizer: {chosen.name} is not the tokenizer of {init} ({difference}); set tokenizer={init}, or add "
            "tokens to that one",
            key="tokenizer",
            code="tokenizer-not-the-models",
        )
    new_tokens = pieces_of_new_tokens(trained, chosen)
    if new_tokens and is_checkpoint(locate(init)):
        raise InputError(
            f"tokenizer: {chosen.name} has {len(new_tokens):,} tokens more than the tokenizer of {init}, and a "
            f"checkpoint takes no new ones; write its model with `detour export {init} MODEL` and set model.init=MODEL",
            key="tokenizer",
            code="tokenizer-extends-checkpoint",
        )
    return new_tokens
