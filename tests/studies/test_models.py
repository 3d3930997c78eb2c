from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from configs.errors import InputError
from studies.models import huggingface_tokenizer, load_model, model_digest
from tests.studies.conftest import save_model
from tests.toy_tokenizers import extended


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Threads take turns so often that they meet inside any function."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_trials_that_are_measured_together_load_whole_models(model: Path) -> None:
    """Loads fail without a lock: tied weights stay without values when two threads meet."""
    ids = torch.arange(40).reshape(2, 20)
    expected = load_model(AutoModelForMaskedLM, model)(ids).logits
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda _: load_model(AutoModelForMaskedLM, model), range(24)))
    assert all(torch.equal(one(ids).logits, expected) for one in loaded)


def test_a_model_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """The scores would be those of the first label."""
    folder = save_model(tmp_path / "model")
    damaged = load_model(AutoModelForMaskedLM, folder)
    damaged.model.layers[1].mlp.Wo.weight.data[0, 0] = torch.nan
    damaged.save_pretrained(folder)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.Wo\.weight") as refusal:
        load_model(AutoModelForMaskedLM, folder)
    assert refusal.value.code == "not-finite"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_model_is_known_by_all_its_files(name: str, tmp_path: Path) -> None:
    """Else a result would be taken for that of another window or tokenizer with the same weights."""
    folder = save_model(tmp_path / "model")
    before = model_digest(folder)
    assert model_digest(folder) == before
    with (folder / name).open("a") as file:
        file.write(" ")
    assert model_digest(folder) != before


def test_tokens_that_no_file_names_are_found(model: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{}")
    named, found = (huggingface_tokenizer(path, ("pad_token", "mask_token")) for path in (model, folder))
    assert (found.pad_token_id, found.mask_token_id) == (named.pad_token_id, named.mask_token_id)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    extended(folder, folder)
    with pytest.raises(InputError) as refusal:
        huggingface_tokenizer(folder)
    assert refusal.value.code == "tokenizer-too-large"
