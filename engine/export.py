"""Detour checkpoint -> Hugging Face model, and back. One process, no accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import ModernBertConfig

from configs.errors import InputError
from datapipe.tokenizer import Tokenizer
from engine import checkpoint as checkpoints
from engine.modernbert.config import build_config, read_config


def export_hf(checkpoint: Path, out: Path, tokenizer: Tokenizer) -> None:
    """Write a ModernBertForMaskedLM: config.json, model.safetensors, the tokenizer's files and a model card.

    Loads with `AutoModelForMaskedLM.from_pretrained(out)`. Raises InputError for a damaged checkpoint.
    """
    from engine.modernbert.convert import parameters, to_hf

    meta = checkpoints.verify(checkpoint)
    architecture = ModernBertConfig(**meta["architecture"])
    table = parameters(architecture)
    stored = checkpoints.read_tensors(checkpoint, [ours for _, ours, _ in table])
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
    from engine import cpu

    cpu.install()
    from engine.modernbert.convert import huggingface_weights, load_weights
    from engine.modernbert.model import ModernBert, transformer_config
    from engine.saver import save_now

    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; name a new directory for the checkpoint")
    architecture = build_config(read_config(init), init)
    with single_process():
        model = ModernBert(transformer_config(architecture), architecture)
        load_weights(model, huggingface_weights(init, architecture, seed))
        meta = {"step": 0, "architecture": architecture.to_dict(), "source": init}
        save_now(out, model, None, meta)


@contextmanager
def single_process() -> Iterator[None]:
    """Process groups of this one process, for Megatron code outside a job."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from engine.parallel import Layout, initialise

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        initialise(Layout(1, 1, 1, False, 1, 1), seed=0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _card(meta: dict[str, Any], tokenizer: Tokenizer) -> str:
    config = meta.get("config", {})
    phases = "\n".join(
        f"- {phase['objective'].upper()}, "
        + (f"{phase['tokens']:,} tokens" if phase.get("tokens") else f"{phase['steps']:,} steps")
        for phase in config.get("phases", ())
    )
    sources = ", ".join(source["name"] for source in config.get("data", {}).get("sources", ()))
    start = config.get("model", {}).get("init", meta.get("source", "unknown"))
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [modernbert, clm-detour]
---
# {config.get("name", "ModernBERT")}

A ModernBERT encoder trained with Detour (the CLM detour, arXiv 2605.12438), taken after step {meta["step"]:,}.

Started from: {start}. Tokenizer: {tokenizer.name}. Training text: {sources or "none"}.

{phases}

```python
from transformers import pipeline
pipeline("fill-mask", model="path/to/this/directory")("The patient was treated with [MASK].")
```
"""
