"""A continued run needs no more than its directory, and goes by what `model.init` and `tokenizer` hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import ModernBertConfig, ModernBertForMaskedLM

from configs.errors import InputError
from configs.load import load_config, validate
from configs.schema import RunConfig
from datapipe.tokenizer import load_tokenizer
from engine.modernbert.config import special_ids
from engine.run_inputs import keep_tokenizer, run_architecture, run_tokenizer
from launcher.claim import claim
from launcher.preflight import check_initial_model
from tests.toy_recipe import toy_recipe
from tests.toy_tokenizers import byte_level, extended


def model_directory(folder: Path, seed: int) -> Path:
    byte_level(folder)
    tokenizer = load_tokenizer(str(folder))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = ModernBertConfig(vocab_size=tokenizer.vocab_size, **shape, **special_ids(tokenizer))
    ModernBertForMaskedLM(config).save_pretrained(folder)
    return folder


def config_of(init: object, **more: str) -> RunConfig:
    tree = toy_recipe([{"name": "en", "shards": "en"}], more) | {"model": {"init": str(init)}}
    if not more:
        del tree["tokenizer"]
    return validate(RunConfig, tree, "toy")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory that was started from `tmp_path/model`, which is the working directory's `model`."""
    monkeypatch.chdir(tmp_path)
    config, directory = config_of(model_directory(tmp_path / "model", 1)), tmp_path / "run"
    with claim(directory, config):
        tokenizer = run_tokenizer(config, directory)
        check_initial_model(config, tokenizer, directory, Console(quiet=True))
        keep_tokenizer(tokenizer, directory)
    return directory


def test_the_tokenizer_is_that_of_the_model(run: Path) -> None:
    config = load_config(str(run / "config.yaml"))
    assert config.tokenizer == config.model.init == str(run.parent / "model")


def test_another_spelling_continues_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = run.parent
    monkeypatch.setenv("HOME", str(home))
    (home / "link").symlink_to(home / "model")
    for spelling in ("model", "model/", "./model", "~/model", "link", f"{home}/run/../model"):
        with claim(run, config_of(spelling)):
            pass


def test_a_directory_that_has_moved_or_gone_stops_nothing(run: Path) -> None:
    config = load_config(str(run / "config.yaml"))
    shutil.move(run.parent / "model", run.parent / "moved")
    with claim(run, config_of("moved")):
        pass
    shutil.rmtree(run.parent / "moved")
    with claim(run, config_of("moved")):
        assert run_tokenizer(config, run).content_sha256


@pytest.mark.parametrize("other", ["weights", "tokenizer", "gone"])
def test_another_model_or_tokenizer_is_refused(other: str, run: Path) -> None:
    if other == "weights":
        config = config_of(model_directory(run.parent / "other", 2))
    elif other == "tokenizer":
        config = config_of("model", tokenizer=str(extended(run.parent / "other", run.parent / "model")))
    else:
        config = config_of(other, tokenizer="model")
    with pytest.raises(InputError) as refusal, claim(run, config):
        pass
    assert refusal.value.code == "output-of-another-run"


def test_a_new_run_without_its_directory_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / "gone")
    with pytest.raises(InputError) as refusal:
        run_tokenizer(config, tmp_path)
    assert refusal.value.key == "tokenizer"
    with pytest.raises(InputError) as refusal:
        run_architecture(config, tmp_path, load_tokenizer(str(byte_level(tmp_path / "t"))))
    assert refusal.value.key == "model.init"
