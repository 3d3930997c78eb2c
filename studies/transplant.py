"""`detour transplant`: a model with some layers of another."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from configs.files import write_atomically
from studies.models import huggingface_directory

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
WEIGHTS = "model.safetensors"
COPIED = ("*.json", "*.txt")
COMPUTED = (
    "layer_types",
    "num_attention_heads",
    "local_attention",
    "rope_parameters",
    "norm_eps",
    "hidden_activation",
)
"""Fields of a configuration that decide what the weights of a layer compute."""


def parse_layers(text: str) -> tuple[int, ...]:
    """Read layers such as `0-7` or `0-3,9`.

    Raises:
        InputError: The text names no layers.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise InputError(f"--layers {text}: {part!r} names no layers; write 0-7 or 0-3,9", key="--layers")
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))


def transplant(a: str, b: str, layers: tuple[int, ...], output: Path) -> int:
    """Write model A with the given layers of model B, as a Hugging Face directory.

    Args:
        a: Run, checkpoint or Hugging Face model; it gives all other weights and the tokenizer.
        b: Model of the same shape, whose layers compute the same.
        layers: Layers that B gives, from 0.
        output: Directory to write; it may not exist.

    Returns:
        The number of weights that B gave.

    Raises:
        InputError: A reference names no model, the models differ, a layer is missing, or the output exists.
    """
    from transformers import AutoConfig

    if output.exists():
        raise InputError(f"--output {output} exists; choose another directory", key="--output", code="output-exists")
    with ExitStack() as stack:
        folders = [stack.enter_context(huggingface_directory(model)) for model in (a, b)]
        kept, given = (_weights(folder) for folder in folders)
        names = {name: int(match[1]) for name in kept if (match := _LAYER.search(name))}
        absent = sorted(set(layers) - set(names.values()))
        if absent:
            raise InputError(
                f"--layers: {a} has no layer {absent[0]}; its layers are 0 to {max(names.values(), default=-1)}",
                key="--layers",
            )
        moved = [name for name, layer in names.items() if layer in layers]
        for name in moved:
            if name not in given or given[name].shape != kept[name].shape:
                raise InputError(
                    f"{b} has no {name} of the shape {tuple(kept[name].shape)}; the models must have one shape",
                    code="different-shapes",
                )
            kept[name] = given[name].to(kept[name].dtype)
        _require_same_computation((a, b), [AutoConfig.from_pretrained(folder) for folder in folders], layers)
        output.mkdir(parents=True)
        for pattern in COPIED:
            for path in folders[0].glob(pattern):
                if not path.name.endswith(".index.json"):
                    shutil.copyfile(path, output / path.name)
        save_file(kept, output / WEIGHTS, metadata={"format": "pt"})
    write_atomically(
        output / "README.md",
        f"# Transplant\n\nLayers {', '.join(map(str, layers))} are of `{b}`, all other weights of `{a}`.\n",
    )
    return len(moved)


def _require_same_computation(models: Sequence[str], configs: Sequence[Any], layers: Sequence[int]) -> None:
    """Require that the layers compute the same in both configurations, because they get A's.

    Raises:
        InputError: They differ, for instance in the window.
    """
    for key in COMPUTED:
        ours, theirs = (getattr(config, key, None) for config in configs)
        if key == "layer_types" and ours and theirs:
            ours, theirs = ([kinds[layer] for layer in layers] for kinds in (ours, theirs))
        if ours != theirs:
            raise InputError(
                f"{models[0]} and {models[1]} differ in {key} ({ours} and {theirs}), so the layers would compute "
                "something else; take models that were trained from the same start",
                code="models-differ",
            )


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights
