from __future__ import annotations

import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import ortho_group

from configs.errors import InputError
from configs.load import dump_config, load_config
from studies.drift import cka_interval, drift, linear_cka, pooled_states, read_documents
from studies.models import config_of_run, huggingface_directory
from studies.trajectory import trajectory
from tests.studies.conftest import save_model

shapes = st.tuples(st.integers(4, 40), st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**32 - 1))


def reference(x: np.ndarray, y: np.ndarray) -> float:
    """Debiased CKA by the estimator HSIC_1 of Song et al. 2012, equation 4, because `linear_cka` centres kernels."""

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        n = len(a)
        k, other = ((v @ v.T) * (1 - np.eye(n)) for v in (a, b))
        trace = math.fsum((k * other).ravel())
        sums = math.fsum(k.ravel()) * math.fsum(other.ravel()) / ((n - 1) * (n - 2))
        return (trace + sums - 2 / (n - 2) * math.fsum(k.sum(0) * other.sum(0))) / (n * (n - 3))

    x, y = x - x.mean(axis=0), y - y.mean(axis=0)  # the estimator is the same, and large offsets cost no digits
    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_equals_the_definition_in_float64(shape: tuple[int, int, int, int]) -> None:
    texts, left, right, seed = shape
    random = np.random.default_rng(seed)
    x = random.normal(size=(texts, left)) + 5
    y = random.normal(size=(texts, right)) + x[:, :1]
    assert linear_cka(x, y) == pytest.approx(reference(x, y), abs=1e-10)
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 60), st.integers(2, 24), st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_rotation_and_scale_change_nothing(texts: int, width: int, seed: int, scale: float) -> None:
    x = np.random.default_rng(seed).normal(size=(texts, width))
    assert linear_cka(x, scale * x @ ortho_group.rvs(width, random_state=seed)) == pytest.approx(1, abs=1e-10)


def test_unrelated_states_are_far_apart() -> None:
    """Also where there are more dimensions than texts, which the plain estimator calls alike."""
    random = np.random.default_rng(0)
    found = [linear_cka(random.normal(size=(60, 128)), random.normal(size=(60, 128))) for _ in range(20)]
    assert abs(np.mean(found)) < 0.02


def test_intervals_hold_the_truth() -> None:
    """The alignment of many texts lies in the interval of few, in 17 or more of 20 draws."""
    random = np.random.default_rng(0)

    def states(texts: int) -> tuple[np.ndarray, np.ndarray]:
        x = random.normal(size=(texts, 10))
        return x, x + 0.7 * random.normal(size=(texts, 10))

    truth = linear_cka(*states(3000))
    intervals = [cka_interval(*states(100)) for _ in range(20)]
    assert sum(low <= truth <= high for low, high in intervals) >= 17


def single_precision(x: np.ndarray, y: np.ndarray) -> float:
    def hsic(a: np.ndarray, b: np.ndarray) -> np.float32:
        n = np.float32(len(a))
        k, other = ((v @ v.T) * (1 - np.eye(len(v), dtype=np.float32)) for v in (a, b))
        sums = k.sum() * other.sum() / ((n - 1) * (n - 2))
        return np.float32((k * other).sum() + sums - 2 / (n - 2) * (k.sum(0) * other.sum(0)).sum())

    x, y = (states.astype(np.float32) for states in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    with np.errstate(all="ignore"):
        return float(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)))


def test_single_precision_fails_where_double_does_not() -> None:
    """Small states underflow, and a large common offset leaves no digits for the differences."""
    random = np.random.default_rng(1)
    x, noise = random.normal(size=(500, 64)), random.normal(size=(500, 64))
    y = x + 0.3 * noise
    truth = reference(x, y)
    assert single_precision(x, y) == pytest.approx(truth, abs=1e-4), "it agrees within its range"
    assert single_precision(1e-8 * x, 1e-8 * y) != pytest.approx(truth, abs=1e-2)
    assert linear_cka(1e-8 * x, 1e-8 * y) == pytest.approx(truth, abs=1e-10)
    offset = 1e7
    assert single_precision(x + offset, y + offset) != pytest.approx(truth, abs=1e-3)
    assert linear_cka(x + offset, y + offset) == pytest.approx(truth, abs=1e-8)


def test_states_that_do_not_vary_have_no_alignment() -> None:
    assert math.isnan(linear_cka(np.ones((5, 3)), np.random.default_rng(0).normal(size=(5, 3))))


def test_padding_takes_no_part_in_the_mean(model: Path) -> None:
    short, long = "Fever.", "The patient was admitted with fever, cough and shortness of breath for five days."
    alone, together = pooled_states(model, [short]), pooled_states(model, [short, long])
    for one, both in zip(alone, together, strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one[0], both[0], rtol=0, atol=1e-5)


def test_a_model_and_itself(model: Path, tmp_path: Path) -> None:
    rows = drift(str(model), str(model), tmp_path, count=40)
    assert json.loads((tmp_path / "drift.json").read_text()) == rows
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert all(row["cka"] == pytest.approx(1, abs=1e-12) and row["weight_change"] == 0 for row in rows)


def test_a_changed_layer_shows_where_it_is(model: Path, tmp_path: Path) -> None:
    """The weights of layer 1 are doubled: its relative change is 1, and states differ from this layer on."""
    changed = save_model(tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    for name in weights:
        if ".layers.1." in name:
            weights[name] = 2 * weights[name]
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    seeds = [str(save_model(tmp_path / f"seed{seed}", seed)) for seed in (1, 2)]
    rows = drift(str(model), str(changed), tmp_path / "out", count=60, noise=seeds)
    assert [row["weight_change"] for row in rows] == pytest.approx([0, 1, 0])
    assert rows[0]["cka"] == pytest.approx(1, abs=1e-9)
    assert all(row["cka"] < 1 - 1e-6 for row in rows[1:])
    assert all(0 < row["noise"] < 1 and row["ratio"] == (1 - row["cka"]) / row["noise"] for row in rows)
    modules = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert {entry["layer"] for entry in modules if entry["weight_change"]} == {1}
    figure = (tmp_path / "out" / "drift.svg").read_text()
    ElementTree.fromstring(figure)
    assert figure.count("<polyline") >= 4
    assert "seed noise" in figure


def test_a_checkpoint_is_exported_on_the_way(model: Path, tmp_path: Path) -> None:
    from engine.export import import_hf

    import_hf(str(model), tmp_path / "checkpoint")
    rows = drift(str(model), str(tmp_path / "checkpoint"), tmp_path, count=20)
    assert all(row["cka"] == pytest.approx(1, abs=1e-6) and row["weight_change"] == 0 for row in rows)


def test_a_run_is_followed_over_its_checkpoints(model: Path, tmp_path: Path) -> None:
    from engine.export import import_hf

    run = tmp_path / "run"
    import_hf(str(model), run / "checkpoints" / "step-00000000")
    [row] = trajectory(str(model), run, tmp_path / "out", count=20)
    assert row["cka"] == pytest.approx([1, 1, 1], abs=1e-6)
    assert (tmp_path / "out" / "trajectory.svg").is_file()
    with pytest.raises(InputError) as error:
        trajectory(str(model), tmp_path, tmp_path / "out")
    assert error.value.code == "no-checkpoint"


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    """A tokenizer that frames nothing gives them no token, and no layer a mean."""
    texts = ["", "a", "b", " \n", "c", "d", "e"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert read_documents(str(tmp_path / "texts.jsonl"), 4) == ["a", "b", "c", "d"]


def test_what_cannot_be_compared_is_refused(model: Path, tmp_path: Path) -> None:
    deeper = save_model(tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(InputError) as error:
        drift(str(model), str(deeper), tmp_path, count=4)
    assert error.value.code == "different-depths"
    with pytest.raises(InputError, match="nowhere") as error:
        drift(str(tmp_path / "nowhere"), str(model), tmp_path)
    assert error.value.code == "not-a-model"
    with pytest.raises(InputError) as error:
        drift(str(model), str(model), tmp_path, count=1)
    assert error.value.key == "--texts"
    for noise in (model, deeper):
        with pytest.raises(InputError) as error:
            drift(str(model), str(deeper), tmp_path, noise=[str(noise)])
        assert error.value.code == "noise-is-the-model"


def test_a_run_is_read_by_its_export_and_not_before_a_checkpoint(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config("demo")))
    with pytest.raises(InputError, match=str(run)) as error, huggingface_directory(str(run)):
        pass
    assert error.value.code == "no-checkpoint"
    shutil.copytree(model, run / "hf")
    with huggingface_directory(str(run)) as folder:
        assert folder == run / "hf"
    config = config_of_run(str(run / "hf"))
    assert config is not None and config.name == "demo"
    assert config_of_run(str(model)) is None
