"""Converts a Detour checkpoint to a Hugging Face model, and back. One process, no accelerator."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import ModernBertConfig

from configs.errors import InputError
from datapipe.tokenizer import Tokenizer
from engine import checkpoint as checkpoints
from engine.checkpoint_meta import CheckpointMeta
from engine.modernbert.config import build_config, read_config
from engine.parallel import single_process


def export_hf(checkpoint: Path, out: Path, tokenizer: Tokenizer) -> None:
    """Write a ModernBertForMaskedLM: config.json, model.safetensors, the tokenizer's files and a model card.

    `AutoModelForMaskedLM.from_pretrained(out)` loads it.

    Raises:
        InputError: The checkpoint is damaged.
    """
    from engine.megatron.torch_index import read_tensors
    from engine.modernbert.convert import parameters, to_hf

    meta = checkpoints.verify(checkpoint)
    architecture = ModernBertConfig(**meta.architecture)
    table = parameters(architecture)
    stored = read_tensors(checkpoint, [ours for _, ours, _ in table])
    weights = {hf: to_hf(stored[ours], row, architecture).float().contiguous() for hf, ours, row in table}
    out.mkdir(parents=True, exist_ok=True)
    architecture.architectures = ["ModernBertForMaskedLM"]
    architecture.dtype = torch.float32
    architecture.save_pretrained(out)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(out)
    (out / "README.md").write_text(_card(meta, tokenizer), encoding="utf-8")


def import_hf(init: str, out: Path, seed: int = 17) -> None:
    """Write a Hugging Face ModernBERT (directory or hub id) as a step-0 checkpoint without optimizer state."""
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
        meta = CheckpointMeta(step=0, architecture=architecture.to_dict(), optimizer=False, files={}, source=init)
        save_now(out, model, None, meta)


def _card(meta: CheckpointMeta, tokenizer: Tokenizer) -> str:
    config = meta.config or {}
    phases = "\n".join(
        f"- {phase['objective'].upper()}, "
        + (f"{phase['tokens']:,} tokens" if phase.get("tokens") else f"{phase['steps']:,} steps")
        for phase in config.get("phases", ())
    )
    sources = ", ".join(source["name"] for source in config.get("data", {}).get("sources", ()))
    start = config.get("model", {}).get("init", meta.source or "unknown")
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [modernbert, clm-detour]
---
# {config.get("name", "ModernBERT")}

A ModernBERT encoder trained with Detour (the CLM detour, arXiv 2605.12438), taken after step {meta.step:,}.

Started from: {start}. Tokenizer: {tokenizer.name}. Training text: {sources or "none"}.

{phases}

```python
from transformers import pipeline
pipeline("fill-mask", model="path/to/this/directory")("The patient was treated with [MASK].")
```
"""
