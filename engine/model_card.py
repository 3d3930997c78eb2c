"""The model card of an export: what was trained up to its step, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from configs.files import write_atomically
from configs.schema import SCRATCH, RunConfig
from datapipe.tokenizer import Tokenizer
from engine.checkpoint_meta import CheckpointMeta
from monitoring.audit import memorisation

ExportKind = Literal["encoder", "decoder"]


CARD = "README.md"
_MEMORISATION = re.compile(r"<!-- memorisation -->.*?<!-- /memorisation -->\n", re.DOTALL)


def model_card(meta: CheckpointMeta, tokenizer: Tokenizer, kind: ExportKind, run: Path) -> str:
    """Write the card of an exported checkpoint, as Markdown with the hub's header.

    Args:
        meta: Record of the checkpoint.
        tokenizer: Tokenizer of the model.
        kind: Kind of the export.
        run: Directory of the run, which knows of canaries; another folder if there is no run.
    """
    config = RunConfig.model_validate(meta.config) if meta.config else None
    name = config.name if config else "ModernBERT"
    start = config.model.init if config else meta.source or "unknown"
    if config and config.origin:
        start += f" (this run branched off {config.origin.run} at step {config.origin.step:,})"
    sources = ", ".join(source.name for source in config.data.sources) if config else ""
    trained = [f"- {line}" for line in _trained_phases(config, meta.step)] if config else []
    knows_masks = kind == "encoder" and has_trained_masks(meta)
    use = _DECODER_USE if kind == "decoder" else _EMBEDDING_USE + (_MASK_USE if knows_masks else "")
    task = "text-generation" if kind == "decoder" else "fill-mask" if knows_masks else "feature-extraction"
    return _CARD.format(
        task=task,
        name=name,
        kind=kind,
        step=meta.step,
        start=start,
        tokenizer=(config.tokenizer if config else meta.source) or tokenizer.name,
        sources=sources or "none",
        phases="\n".join(trained) or "- nothing yet: these are the weights it started from",
        software=_software(meta.software),
        memorisation=_memorisation(run),
        use=use.replace("MASK_TOKEN", tokenizer.mask_token),
    )


def refresh_card(export: Path, run: Path) -> None:
    """Renew the section about memorisation in the card of an export; a card without one stays as it is."""
    path = export / CARD
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        write_atomically(path, _MEMORISATION.sub(lambda _: _memorisation(run).lstrip("\n"), text))


def _memorisation(run: Path) -> str:
    """The section about the canaries of a run; empty without canaries."""
    known = memorisation(run)
    if known is None:
        return ""
    table = [known.columns, ("---",) * len(known.columns), *known.rows] if known.columns else []
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return f"\n<!-- memorisation -->\n## Memorisation\n\n{known.note}\n\n{lines}\n<!-- /memorisation -->\n"


def merge_card(origins: Sequence[tuple[str, float]], tokenizer: Tokenizer, knows_masks: bool) -> str:
    """Write the card of a merged model.

    Args:
        origins: Name and coefficient of each model.
        tokenizer: The tokenizer of all of them.
        knows_masks: Whether each of them can fill masks.
    """
    rows = "\n".join(f"| {name} | {coefficient:.6f} |" for name, coefficient in origins)
    use = (_EMBEDDING_USE + (_MASK_USE if knows_masks else "")).replace("MASK_TOKEN", tokenizer.mask_token)
    task = "fill-mask" if knows_masks else "feature-extraction"
    return _MERGE_CARD.format(task=task, count=len(origins), tokenizer=tokenizer.name, rows=rows, use=use)


def has_trained_masks(meta: CheckpointMeta) -> bool:
    """Return whether the model of a checkpoint can fill masks; a model that was only imported is believed to."""
    return meta.config is None or _has_trained_masks(RunConfig.model_validate(meta.config), meta.step)


def _trained_phases(config: RunConfig, step: int) -> list[str]:
    lines = []
    for span in config.spans:
        done = min(step, span.last) - span.first
        if done > 0:
            tokens = done * span.tokens_per_step
            whole = "" if done == span.steps else f" of the {span.steps:,} planned"
            lines.append(f"{span.phase.objective_name.upper()}, {done:,} steps{whole}, {tokens:,} tokens")
    return lines


def _software(versions: dict[str, str] | None) -> str:
    if not versions:  # an import, or a checkpoint of an older version
        return ""
    return (
        f"\nTrained with Detour {versions['version']} (commit {versions['commit']}), torch {versions['torch']}, "
        f"Megatron-Core {versions['megatron']} and Ray {versions['ray']}.\n"
    )


def _has_trained_masks(config: RunConfig, step: int) -> bool:
    """Return whether the head can fill masks: the run has trained MLM, or started from a model."""
    return config.model.init != SCRATCH or any(
        "mlm" in span.phase.objectives and span.first < step for span in config.spans
    )


_CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [modernbert, clm-detour]
---
# {name}

A ModernBERT {kind} trained with Detour (the CLM detour, arXiv 2605.12438), taken after step {step:,}.

Started from: {start}. Tokenizer: {tokenizer}. Training text: {sources}.

{phases}
{software}{memorisation}
```python
{use}```
"""
_MERGE_CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [modernbert, merge]
---
# Merge of {count} ModernBERT models

The weights are the sum of the weights of these models, each times its coefficient (WSM, arXiv 2507.17634).

| model | coefficient |
|---|---|
{rows}

Tokenizer: {tokenizer}.

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
