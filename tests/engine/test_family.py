"""Dropout, frozen parts and a new head together: equal in every layout and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InputError
from configs.schema import RunConfig
from datapipe.tokenizer import load_tokenizer
from engine.checkpoint import step_directory
from engine.modernbert.config import resolve_architecture
from engine.modernbert.convert import random_weights
from engine.parallel import plan
from monitoring.log import read_metrics
from tests.engine.world import run_world, stored, toy_config, train

FROZEN = ("embedding.word_embeddings.", "embedding_norm.", "lm_head.", "output_layer.", "decoder.layers.1.")
HEAD = ("lm_head.dense.weight", "lm_head.norm.weight", "output_layer.bias")


def family_config(shards: Path, **changes: Any) -> RunConfig:
    """Configure a run whose second phase freezes parts, and whose third begins with a new head."""
    settings: dict[str, Any] = {
        "model": {"attention_output_dropout": 0.1, "mlp_dropout": 0.2, "embedding_dropout": 0.1},
        "data": {"sequence_length": 64},
        "phases": [
            {"objective": "clm", "steps": 1},
            {"objective": "clm", "steps": 2, "freeze": [1, "embeddings", "head"]},
            {"objective": "mlm", "steps": 2, "reset": ["head"]},
        ],
        "checkpoint": {"keep": 9},
        "precision": "fp32",
    }
    return toy_config(shards, **(settings | changes))


def frozen(name: str) -> bool:
    return name.removeprefix("optimizer.state.").split(".", 1)[-1].startswith(FROZEN) or name.startswith(FROZEN)


def require_frozen(directory: Path) -> None:
    """Check that steps 2 and 3 changed no bit of the frozen parts, and every other tensor."""
    before, after = stored(directory, 1), stored(directory, 3)
    assert {name for name in before if torch.equal(before[name], after[name])} == {*filter(frozen, before)}
    assert sum(frozen(name) for name in before) == (2 + 3 + 6) * 4, "each weight with Adam's three"


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("family")
    run_world(1, train, family_config(shards, checkpoint={"every": "1 steps", "keep": 9}), directory)
    return directory


def require_equal(directory: Path, undisturbed: Path) -> None:
    """Check losses and tensors to the rounding of another layout."""
    for found, expected in zip(read_metrics(directory), read_metrics(undisturbed), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    final, tensors = stored(directory, 5), stored(undisturbed, 5)
    assert all((tensor - tensors[name]).abs().max() <= 1e-5 for name, tensor in final.items())


def copy_until(undisturbed: Path, step: int, directory: Path) -> None:
    """Copy a run directory without the checkpoints after `step`."""
    shutil.copytree(undisturbed, directory, dirs_exist_ok=True)
    for later in range(step + 1, 6):
        shutil.rmtree(step_directory(directory / "checkpoints", later))


def test_tensor_pipeline_and_sequence_parallel_train_the_same(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    layout = {"tensor": 2, "pipeline": 2, "sequence": True}
    run_world(4, train, family_config(shards, parallel=layout, batch={"micro": 4}), tmp_path)
    require_equal(tmp_path, undisturbed)
    require_frozen(tmp_path)


def test_data_parallel_ranks_train_the_same_and_do_not_reset_again(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """They resume from the first step after the reset."""
    copy_until(undisturbed, 4, tmp_path)
    run_world(2, train, family_config(shards, batch={"micro": 1}), tmp_path)
    require_equal(tmp_path, undisturbed)


def test_a_run_resumed_at_the_reset_is_bit_identical(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    copy_until(undisturbed, 3, tmp_path)
    run_world(1, train, family_config(shards), tmp_path)
    final, expected = stored(tmp_path, 5), stored(undisturbed, 5)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final.items())
    found, lines = read_metrics(tmp_path), read_metrics(undisturbed)
    assert [line["clipped_share"] for line in found] == [line["clipped_share"] for line in lines]


def test_frozen_parts_stand_still_to_the_bit(undisturbed: Path) -> None:
    require_frozen(undisturbed)


def test_a_reset_begins_with_a_new_head(undisturbed: Path) -> None:
    """After the first step a weight is at most a step's length from its new value, and the moments are of one step."""
    before, after, later = (stored(undisturbed, step) for step in (3, 4, 5))
    assert (after["lm_head.norm.weight"] - 1).abs().max() < 1e-3
    assert after["output_layer.bias"].abs().max() < 1e-3
    change = (after["lm_head.dense.weight"] - before["lm_head.dense.weight"]).abs()
    assert change.median() > 1e-3, "at a learning rate of 2e-4"
    assert (later["lm_head.dense.weight"] - after["lm_head.dense.weight"]).abs().max() < 1e-3, "not again at a step"
    for name in HEAD:
        first, second = (after[f"optimizer.state.{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq"))
        gradient = first / 0.1
        torch.testing.assert_close(second, 0.02 * gradient**2, rtol=1e-3, atol=1e-12)


def test_bf16_keeps_the_other_main_weights(shards: Path, tmp_path: Path) -> None:
    """A reset rounds no main weight; the new head's own are whole."""
    phases = [{"objective": "clm", "steps": 1}, {"objective": "mlm", "steps": 1, "lr": {"warmup": "1 steps"}}]
    phases[1] |= {"reset": ["head"], "freeze": [0, 1, 2, 3, "embeddings"]}
    config = family_config(shards, precision="bf16", phases=phases, batch={"sequences": 4}, model={})
    run_world(2, train, config, tmp_path)
    before, after = stored(tmp_path, 1), stored(tmp_path, 2)
    main = [name for name in before if name.startswith("optimizer.state.param.")]
    same = {name for name in main if torch.equal(before[name], after[name])}
    assert same == {name for name in main if "final_layernorm" not in name and not name.endswith(HEAD)}
    bits = before["optimizer.state.param.decoder.layers.0.mlp.linear_fc1.weight"]
    assert not torch.equal(bits, bits.bfloat16().float())


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ({"freeze": ["embedding"]}, ("phases.1.freeze", "embeddings")),
        ({"freeze": [-1]}, ("phases.1.freeze",)),
        ({"freeze": ["head", "head"]}, ("phases.1",)),
        ({"freeze": ["head"], "reset": ["head"]}, ("phases.1", "reset")),
        ({"reset": ["layers"]}, ("phases.1.reset", "head")),
        ({"freeze": [4]}, ("phases.1.freeze", "4")),
        ({"freeze": [3, "head", 2, 1, 0, "embeddings"]}, ("phases.1.freeze",)),
    ],
)
def test_a_part_that_cannot_be_frozen_or_reset_is_named(phase: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        config = family_config(
            Path("shards"), phases=[{"objective": "clm", "steps": 1}, {"objective": "mlm", "steps": 1, **phase}]
        )
        plan(config, resolve_architecture(config.model, load_tokenizer(config.tokenizer)), 1)
    assert str(error.value).count("phases.1") == 1
    assert all(word in str(error.value) for word in words)


def test_a_model_from_scratch_has_no_head_to_reset() -> None:
    with pytest.raises(InputError) as error:
        family_config(Path("shards"), phases=[{"objective": "clm", "steps": 1, "reset": ["head"]}])
    assert error.value.key == "phases.0.reset"


def test_the_seed_decides_the_new_weights() -> None:
    """torch's generator drops the high half of a seed, so a seed in it alone would change nothing."""
    config = family_config(Path("shards"))
    architecture = resolve_architecture(config.model, load_tokenizer(config.tokenizer))
    names = ("head.dense.weight", "model.layers.1.attn.Wo.weight")
    seeds = (17, 18, 2**40 + 17, "reset 17 1")
    weights = [random_weights(architecture, seed)(name) for seed in seeds for name in names]
    assert len({tensor.numpy().tobytes() for tensor in weights}) == len(weights)
    assert torch.equal(random_weights(architecture, 17)(names[0]), weights[0])
