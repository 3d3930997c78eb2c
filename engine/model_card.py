"""The model card of an export: what was trained up to its step, and how to use it."""

from __future__ import annotations

from typing import Literal

from configs.schema import SCRATCH, RunConfig
from datapipe.tokenizer import Tokenizer
from engine.checkpoint_meta import CheckpointMeta
from engine.schedule import PhaseSchedule

ExportKind = Literal["encoder", "decoder"]


def model_card(meta: CheckpointMeta, tokenizer: Tokenizer, kind: ExportKind) -> str:
    """Write the card of an exported checkpoint, as Markdown with the hub's header."""
    config = RunConfig.model_validate(meta.config) if meta.config else None
    name = config.name if config else "ModernBERT"
    start = config.model.init if config else meta.source or "unknown"
    sources = ", ".join(source.name for source in config.data.sources) if config else ""
    trained = [f"- {line}" for line in _trained_phases(config, meta.step)] if config else []
    knows_masks = kind == "encoder" and (config is None or _has_trained_masks(config, meta.step))
    use = _DECODER_USE if kind == "decoder" else _EMBEDDING_USE + (_MASK_USE if knows_masks else "")
    task = "text-generation" if kind == "decoder" else "fill-mask" if knows_masks else "feature-extraction"
    return _CARD.format(
        task=task,
        name=name,
        kind=kind,
        step=meta.step,
        start=start,
        tokenizer=tokenizer.name,
        sources=sources or "none",
        phases="\n".join(trained) or "- nothing yet: these are the weights it started from",
        software=_software(meta.software),
        use=use.replace("MASK_TOKEN", tokenizer.mask_token),
    )


def _trained_phases(config: RunConfig, step: int) -> list[str]:
    lines = []
    for span in PhaseSchedule(config).spans:
        done, length = min(step, span.last) - span.first, span.last - span.first
        if done > 0:
            tokens = done * config.tokens_per_step
            whole = "" if done == length else f" of the {length:,} planned"
            lines.append(f"{span.phase.objective.upper()}, {done:,} steps{whole}, {tokens:,} tokens")
    return lines


def _software(versions: dict[str, str] | None) -> str:
    if not versions:  # an import, or a checkpoint of an older version
        return ""
    return (
        f"\nTrained with Detour {versions['version']} (commit {versions['commit']}), torch {versions['torch']}, "
        f"Megatron-Core {versions['megatron']} and Ray {versions['ray']}.\n"
    )


def _has_trained_masks(config: RunConfig, step: int) -> bool:
    """Whether the head can fill masks: the run has trained MLM, or started from a model."""
    spans = PhaseSchedule(config).spans
    return config.model.init != SCRATCH or any(span.phase.objective == "mlm" and span.first < step for span in spans)


_CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [modernbert, clm-detour]
---
# {name}

A ModernBERT {kind} trained with Detour (the CLM detour, arXiv 2605.12438), taken after step {step:,}.

Started from: {start}. Tokenizer: {tokenizer}. Training text: {sources}.

{phases}
{software}
```python
{use}```
"""
_MASK_USE = """
from transformers import pipeline

pipeline("fill-mask", model="path/to/this/directory")("The patient was treated with MASK_TOKEN.")
"""
_EMBEDDING_USE = """import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
model = AutoModel.from_pretrained("path/to/this/directory")
batch = tokenizer(["The patient was treated."], return_tensors="pt")
with torch.no_grad():
    embedding = model(**batch).last_hidden_state.mean(dim=1)
"""
_DECODER_USE = """from transformers import pipeline

pipeline("text-generation", model="path/to/this/directory")("The patient was treated")
"""
