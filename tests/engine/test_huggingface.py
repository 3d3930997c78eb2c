"""Exports are read alike by every transformers since 4.48, and by the decoder class."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import ModernBertConfig, ModernBertDecoderForCausalLM, ModernBertForMaskedLM

from engine.modernbert.huggingface import (
    decoder_config,
    decoder_weights,
    encoder_config,
    encoder_fields,
    every_n_layers,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
STYLES: dict[str, dict[str, Any]] = {
    "base": {},
    "changed thetas": {"global_rope_theta": 80_000.0, "local_rope_theta": 16_000.0},
    "Ettin": {"global_rope_theta": 160_000.0, "local_rope_theta": 160_000.0, "global_attn_every_n_layers": 2},
    "all global": {"global_attn_every_n_layers": 1},
}
OLD_VERSIONS = {"4.48.3": "tokenizers==0.21.4", "4.57.6": "tokenizers==0.22.2"}
OLD_READER = """
import sys, torch
from transformers import ModernBertForMaskedLM
for folder in sys.argv[1:]:
    ids = torch.load(folder + "/ids.pt", weights_only=True)
    model = ModernBertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    torch.save(model(ids).logits.detach(), folder + "/logits.pt")
"""


def _sharpened(style: str) -> ModernBertForMaskedLM:
    """A model whose logits depend strongly on positions: with flat attention a wrong theta would hardly show."""
    torch.manual_seed(5)
    model = ModernBertForMaskedLM(ModernBertConfig(**SHAPE, **STYLES[style])).eval()
    for name, parameter in model.named_parameters():
        if "Wqkv" in name:
            parameter.data *= 30
    return model


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "decoder.weight"}


def _ids() -> torch.Tensor:
    return torch.arange(40)[None] % 90 + 3


def _old_transformers(version: str) -> Path:
    """Install an old transformers beside everything else, once per machine; skip where no index can be reached."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "detour-train"
    folder = cache / f"transformers-{version}"
    if not (folder / ".installed").exists():
        packages = [f"transformers=={version}", OLD_VERSIONS[version], "huggingface_hub>=0.34,<1.0"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
        done = subprocess.run([*command, "--upgrade"], capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"transformers {version} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        (folder / ".installed").touch()
    return folder


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_old_transformers_compute_the_same_logits(version: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(_old_transformers(version))}
    expected = {}
    for style in STYLES:
        export = tmp_path / style
        export.mkdir()
        model = _sharpened(style)
        save_file(_weights(model), export / "model.safetensors", metadata={"format": "pt"})
        (export / "config.json").write_text(json.dumps(encoder_config(model.config, torch.float32)))
        torch.save(_ids(), export / "ids.pt")
        expected[style] = model(_ids()).logits.detach()
        again = ModernBertForMaskedLM.from_pretrained(export).eval()
        torch.testing.assert_close(again(_ids()).logits, expected[style], rtol=0, atol=0)
    command = [sys.executable, "-c", OLD_READER, *(str(tmp_path / style) for style in STYLES)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    for style, logits in expected.items():
        theirs = torch.load(tmp_path / style / "logits.pt", weights_only=True)
        torch.testing.assert_close(theirs, logits, rtol=0, atol=1e-5, msg=style)


@pytest.mark.parametrize("style", STYLES)
def test_the_decoder_class_sees_the_same_window(style: str, tmp_path: Path) -> None:
    """The causal encoder, computed densely from the encoder's own weights, against transformers' decoder class."""
    model = _sharpened(style)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _weights(model).items():
        tensors |= decoder_weights(name, tensor.clone())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(decoder_config(model.config, torch.float32)))
    decoder, report = ModernBertDecoderForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert decoder.config.sliding_window == SHAPE["local_attention"] // 2 + 1
    back = encoder_fields(json.loads((tmp_path / "config.json").read_text()))
    assert back["local_attention"] == SHAPE["local_attention"]
    assert ModernBertConfig(**back).layer_types == model.config.layer_types


def test_the_pattern_of_older_versions() -> None:
    assert every_n_layers(["full_attention", "sliding_attention", "sliding_attention", "full_attention"]) == 3
    assert every_n_layers(["full_attention"] * 3) == 1
    assert every_n_layers(["full_attention", "sliding_attention"]) == 2
    assert every_n_layers(["sliding_attention", "full_attention"]) is None
