"""Converts a Detour checkpoint to a Hugging Face model, and back. One process, no accelerator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import ModernBertConfig

from configs.errors import InputError
from configs.files import write_atomically, write_json
from datapipe.tokenizer import Tokenizer
from engine import checkpoint as checkpoints
from engine.checkpoint_meta import CheckpointMeta
from engine.model_card import CARD, ExportKind, model_card
from engine.modernbert.config import build_config, read_config, special_ids
from engine.modernbert.huggingface import DTYPES, ExportDtype, decoder_config, decoder_weights, encoder_config
from engine.parallel import single_process

if TYPE_CHECKING:
    from engine.modernbert.convert import WeightSource

MAIN_WEIGHTS = "optimizer.state.param."
"""Start of the names of the optimizer's fp32 weights in a checkpoint."""


def export_hf(
    checkpoint: Path,
    out: Path,
    tokenizer: Tokenizer,
    *,
    kind: ExportKind = "encoder",
    dtype: ExportDtype = "fp32",
) -> None:
    """Write a Hugging Face model: config.json, model.safetensors, the tokenizer's files and a model card.

    Args:
        checkpoint: Directory of the checkpoint.
        out: Directory of the model; created if missing.
        tokenizer: The tokenizer that the model was trained with.
        kind: `encoder` writes a ModernBertForMaskedLM, `decoder` a ModernBertDecoderForCausalLM with the causal logits.
        dtype: `fp32` writes the optimizer's main weights where the checkpoint has them, `bf16` rounds them.

    Raises:
        InputError: The checkpoint is damaged.
    """
    from engine.megatron.torch_index import read_tensors
    from engine.modernbert.convert import parameters, to_hf

    meta = checkpoints.verify(checkpoint)
    architecture = ModernBertConfig(**meta.architecture)
    table = parameters(architecture)
    names = stored_names(checkpoint, [ours for _, ours, _ in table])
    stored = read_tensors(checkpoint, list(names.values()))
    weights: dict[str, torch.Tensor] = {}
    for hf, ours, row in table:
        tensor = to_hf(stored[names[ours]], row, architecture).to(DTYPES[dtype]).contiguous()
        weights |= decoder_weights(hf, tensor) if kind == "decoder" else {hf: tensor}
    config = decoder_config if kind == "decoder" else encoder_config
    card = model_card(meta, tokenizer, kind, checkpoint.absolute().parent.parent)
    write_model(out, config(architecture, DTYPES[dtype]), weights, tokenizer, card)


def write_model(
    out: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], tokenizer: Tokenizer, card: str
) -> None:
    """Write the files of a Hugging Face model; the directory is created if missing."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config | special_ids(tokenizer))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(out)
    write_atomically(out / CARD, card)


def stored_names(checkpoint: Path, names: list[str]) -> dict[str, str]:
    """Map our names to those of the optimizer's fp32 main weights, or to themselves where it keeps none."""
    from engine.megatron.torch_index import tensor_names

    main = {name: f"{MAIN_WEIGHTS}{name}" for name in names}
    return main if tensor_names(checkpoint).issuperset(main.values()) else {name: name for name in names}


def checkpoint_weights(checkpoint: Path, architecture: ModernBertConfig) -> WeightSource:
    """Open a verified checkpoint's fp32 main weights, or its weights where it has no others; each is read on demand."""
    from engine.megatron.torch_index import read_tensors
    from engine.modernbert.convert import parameters, to_hf

    table = {hf: (ours, row) for hf, ours, row in parameters(architecture)}
    names = stored_names(checkpoint, [ours for ours, _ in table.values()])

    def source(hf: str) -> torch.Tensor:
        ours, row = table[hf]
        (tensor,) = read_tensors(checkpoint, [names[ours]]).values()
        return to_hf(tensor, row, architecture)

    return source


def import_hf(init: str, out: Path, seed: int = 17, source: str | None = None) -> None:
    """Write a Hugging Face ModernBERT as a step-0 checkpoint without optimizer state.

    Args:
        init: Directory or hub id of the model.
        out: Directory of the checkpoint; new or empty.
        seed: Seed of a head that the model lacks.
        source: Origin that the checkpoint names; default `init`.

    Raises:
        InputError: The model cannot be read, or `out` is not empty.
    """
    from engine.megatron import cpu

    cpu.install()
    from engine.checkpoint.writer import save_now
    from engine.modernbert.convert import huggingface_weights, load_weights
    from engine.modernbert.model import ModernBert, transformer_config

    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; name a new directory for the checkpoint", code="output-not-empty")
    architecture = build_config(read_config(init), init)
    with single_process():
        model = ModernBert(transformer_config(architecture), architecture)
        load_weights(model, huggingface_weights(init, architecture, seed))
        meta = CheckpointMeta(
            step=0,
            architecture=architecture.to_dict(),
            optimizer=False,
            files={},
            source=source or (str(Path(init).absolute()) if Path(init).exists() else init),
        )
        save_now(out, model, None, meta)
