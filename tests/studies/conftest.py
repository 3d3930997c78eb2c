from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM

from datapipe.tokenizer import load_tokenizer
from tests.toy_recipe import TOKENIZER

torch.set_num_threads(1)  # on a busy machine toy models are then ten times as fast


def save_model(directory: Path, seed: int = 0, **shape: int) -> Path:
    """Write a tiny untrained ModernBERT in the form of an export."""
    tokenizer = load_tokenizer(TOKENIZER)
    defaults = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = ModernBertConfig(vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id, **{**defaults, **shape})
    ModernBertForMaskedLM(config).save_pretrained(directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a file in the test's directory."""

    def to(name: str, content: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path

    return to
