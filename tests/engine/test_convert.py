"""Hugging Face -> checkpoint -> Hugging Face gives every bit back."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM

from configs.errors import InputError
from configs.schema import RunConfig
from datapipe.tokenizer import load_tokenizer
from engine.checkpoint import CheckpointMeta, step_directory
from engine.export import export_hf, import_hf
from tests.engine.world import run_world, stored, toy_config, train
from tests.toy_recipe import TOKENIZER

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model whose vocabulary needs padding here, in fp32, old configuration style."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(3)
    model = ModernBertForMaskedLM(ModernBertConfig(vocab_size=2051, pad_token_id=0, **SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"global_rope_theta": 80000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3}
    for key in ("rope_parameters", "layer_types"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_untrained(config: RunConfig, directory: Path) -> None:
    """On a rank: load `model.init` in the configured layout and save it as it is."""
    from engine.build import build
    from engine.checkpoint.writer import save_now

    with closing(build(config, directory)) as run:
        architecture = run.architecture.to_dict()
        meta = CheckpointMeta(step=0, architecture=architecture, optimizer=True, files={})
        save_now(step_directory(run.checkpoints.folder, 0), run.runner.model, run.runner.optimizer, meta)


def untrained(init: Path, shards: Path, directory: Path, workers: int = 1, **settings: Any) -> Path:
    """The checkpoint of a run that starts from `init`, before its first step."""
    tree = toy_config(shards, **settings).model_dump(mode="json", exclude_none=True) | {"model": {"init": str(init)}}
    directory.mkdir()
    run_world(workers, save_untrained, RunConfig.model_validate(tree), directory)
    return step_directory(directory / "checkpoints", 0)


@pytest.mark.parametrize(
    ("workers", "parallel", "precision"),
    [
        (1, {}, "fp32"),
        (2, {"tensor": 2}, "bf16"),
        (2, {"pipeline": 2}, "fp32"),
        (4, {"tensor": 2, "pipeline": 2}, "fp32"),
        (2, {}, "bf16"),
    ],
    ids=["tp1-pp1", "tp2-bf16", "pp2", "tp2-pp2", "dp2-bf16"],
)
def test_round_trip(
    workers: int, parallel: dict[str, Any], precision: str, hf_model: Path, shards: Path, tmp_path: Path
) -> None:
    """A BF16 run rounds the weights of its products alone; the optimizer has those of the files to the bit."""
    checkpoint = untrained(hf_model, shards, tmp_path / "run", workers, parallel=parallel, precision=precision)
    if precision == "bf16":
        rounded = stored(tmp_path / "run", 0)["decoder.layers.1.mlp.linear_fc2.weight"]
        assert rounded.dtype == torch.bfloat16
        checkpoint = untrained(checkpoint, shards, tmp_path / "next")  # the main weights of the one before
    out = tmp_path / "hf"
    export_hf(checkpoint, out, load_tokenizer(toy_config(shards).tokenizer))
    before = ModernBertForMaskedLM.from_pretrained(hf_model)
    after = AutoModelForMaskedLM.from_pretrained(out)
    assert after.config.rope_parameters["full_attention"]["rope_theta"] == 80000.0
    expected = before.state_dict()
    assert after.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.state_dict().items())


def test_the_export_is_the_trained_model(shards: Path, alone_run: Path, tmp_path: Path) -> None:
    """It loads with transformers alone, and its loss on the next batch is the one the trainer reports for it."""
    from datapipe.batch import IGNORE
    from datapipe.loader import Loader
    from engine.checkpoint import describe
    from engine.objectives import objective_of
    from monitoring.log import read_metrics

    config = toy_config(shards)
    newest = step_directory(alone_run / "checkpoints", 3)
    tokenizer = load_tokenizer(config.tokenizer)
    export_hf(newest, tmp_path, tokenizer)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    targets = objective_of(config.spans[1], tokenizer, config.data.seed).targets()
    loader = Loader(config.data, config.batch.sequences, tokenizer, 0, 1)
    (batch,) = loader.steps(targets, config.batch.sequences, 3, 4, describe(newest).data)
    total, paying = 0.0, 0
    (micro,) = batch.micro_batches
    bounds = list(micro.cu_seqlens)
    with torch.no_grad():
        for start, end in pairwise(bounds):
            logits = model(torch.from_numpy(micro.inputs[None, start:end])).logits[0]
            labels = torch.from_numpy(micro.labels[start:end])
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
            paying += int((labels != IGNORE).sum())
    assert total / paying == pytest.approx(read_metrics(alone_run)[3]["loss"], rel=1e-5)
    tokenizer_files = AutoTokenizer.from_pretrained(tmp_path)
    filled = tokenizer_files("The patient has a [MASK].", return_tensors="pt")
    assert tokenizer_files.mask_token_id in filled["input_ids"]
    assert model(**filled).logits.shape[-1] == model.config.vocab_size


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"model_type": "bert"}, "model-type"),
        (None, "config-missing"),
        ([1, 2], "config-invalid"),
        ({"model_type": "modernbert", **SHAPE, "vocab_size": 2048}, "weights-missing"),
        ({"model_type": "modernbert", **SHAPE, "num_hidden_layers": "64"}, "config-invalid"),
        ({"model_type": "modernbert", **SHAPE, "hidden_size": None}, "config-invalid"),
        ({"model_type": "modernbert", **SHAPE, "rope_parameters": {"rope_theta": 1e4}}, "config-invalid"),
        ({"model_type": "modernbert", **SHAPE, "vocab_size": 2048, "norm_bias": True}, "architecture-unsupported"),
        (
            {"model_type": "modernbert", **SHAPE, "vocab_size": 2048, "global_rope_theta": -1},
            "architecture-unsupported",
        ),
        (
            {"model_type": "modernbert", **SHAPE, "layer_types": [*["full_attention"] * 3, "chunked_attention"]},
            "architecture-unsupported",
        ),
        ({"model_type": "modernbert", **SHAPE, "local_attention": -1}, "architecture-unsupported"),
        (
            {"model_type": "modernbert", **SHAPE, "quantization_config": {"quant_method": "gptq"}},
            "architecture-unsupported",
        ),
    ],
)
def test_a_directory_that_cannot_be_imported(content: Any, code: str, tmp_path: Path) -> None:
    from configs.schema import Model
    from engine.modernbert.config import resolve_architecture
    from engine.modernbert.convert import huggingface_weights

    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as refusal:
        architecture = resolve_architecture(Model(init=str(tmp_path)), load_tokenizer(TOKENIZER))
        huggingface_weights(str(tmp_path), architecture, 0)
    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("num_hidden_layers", 2),
        ("hidden_activation", "silu"),
        ("norm_bias", True),
        ("tie_word_embeddings", False),
        ("layer_types", ("full_attention",) * SHAPE["num_hidden_layers"]),
        ("global_attn_every_n_layers", 2),
    ],
)
def test_an_override_that_contradicts_the_weights_is_refused(override: str, value: Any, hf_model: Path) -> None:
    from configs.schema import Model
    from engine.modernbert.config import resolve_architecture

    tokenizer = load_tokenizer(TOKENIZER)
    with pytest.raises(InputError) as refusal:
        resolve_architecture(Model(init=str(hf_model), **{override: value}), tokenizer)
    assert (refusal.value.key, refusal.value.code) == (f"model.{override}", "override-contradicts")


def test_an_override_that_contradicts_a_checkpoint_is_refused(hf_model: Path, tmp_path: Path) -> None:
    from configs.schema import Model
    from engine.modernbert.config import resolve_architecture

    import_hf(str(hf_model), tmp_path / "checkpoint")
    tokenizer = load_tokenizer(TOKENIZER)
    resolve_architecture(Model(init=str(tmp_path / "checkpoint"), norm_eps=SHAPE.get("norm_eps", 1e-5)), tokenizer)
    with pytest.raises(InputError) as refusal:
        resolve_architecture(Model(init=str(tmp_path / "checkpoint"), norm_eps=0.01), tokenizer)
    assert refusal.value.code == "override-contradicts"


@pytest.mark.parametrize(
    ("override", "code"),
    [({"classifier_bias": True}, "architecture-unsupported"), ({"pad_token_id": 7}, "other-special-token")],
)
def test_a_key_that_would_have_no_effect_is_refused(override: dict[str, Any], code: str) -> None:
    from configs.schema import Model
    from engine.modernbert.config import resolve_architecture

    with pytest.raises(InputError) as refusal:
        resolve_architecture(Model(size="base", **override), load_tokenizer(TOKENIZER))
    assert (refusal.value.key, refusal.value.code) == (f"model.{next(iter(override))}", code)


def test_a_layer_pattern_is_compared_by_the_layers_it_means(hf_model: Path, tmp_path: Path) -> None:
    """A new-style file says the pattern layer by layer; the override says it as a period."""
    from configs.schema import Model
    from engine.modernbert.config import resolve_architecture

    content = json.loads((hf_model / "config.json").read_text())
    content.pop("global_attn_every_n_layers", None)
    content["layer_types"] = ["full_attention", "sliding_attention"] * (SHAPE["num_hidden_layers"] // 2)
    (tmp_path / "config.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(TOKENIZER)
    model = Model(init=str(tmp_path), global_attn_every_n_layers=2)
    assert resolve_architecture(model, tokenizer).layer_types == content["layer_types"]
    with pytest.raises(InputError) as refusal:
        resolve_architecture(Model(init=str(tmp_path), global_attn_every_n_layers=3), tokenizer)
    assert refusal.value.code == "override-contradicts"


def test_the_layer_types_of_a_recipe_are_taken(hf_model: Path) -> None:
    from configs.schema import Model
    from engine.modernbert.config import resolve_architecture

    tokenizer = load_tokenizer("package://tokenizer/modernbert")
    types = ("full_attention", "sliding_attention", "sliding_attention", "full_attention")
    assert resolve_architecture(Model(size="tiny", layer_types=types), tokenizer).layer_types == list(types)
    trained = resolve_architecture(Model(init=str(hf_model)), tokenizer).layer_types
    assert resolve_architecture(Model(init=str(hf_model), layer_types=trained), tokenizer).layer_types == trained


def test_a_checkpoint_below_the_home_directory_is_one(
    alone_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.initial_weights import check_initial_weights

    monkeypatch.setenv("HOME", str(step_directory(alone_run / "checkpoints", 5).parent))
    (note,) = check_initial_weights("~/step-00000005", ModernBertConfig(), load_tokenizer(TOKENIZER))
    assert "optimizer" in note


def test_an_override_that_says_what_the_file_says_is_taken(hf_model: Path) -> None:
    from configs.schema import Model
    from engine.modernbert.config import resolve_architecture

    tokenizer = load_tokenizer(TOKENIZER)
    model = Model(init=str(hf_model), hidden_size=SHAPE["hidden_size"], global_rope_theta=640_000.0)
    assert resolve_architecture(model, tokenizer).rope_parameters["full_attention"]["rope_theta"] == 640_000.0


@pytest.mark.parametrize(
    ("init", "code"),
    [
        ("models/my model", "hub-unavailable"),
        ("org/model@revision", "hub-unavailable"),
        ("no/such/directory", "model-missing"),
        ("~/nothing-here", "model-missing"),
        ("run", "run-directory"),
    ],
)
def test_an_init_that_is_not_there(init: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.modernbert.config import locate

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(InputError) as refusal:
        locate(init)
    assert (refusal.value.key, refusal.value.code) == ("model.init", code)


def test_import_writes_a_step_0_checkpoint(hf_model: Path, shards: Path, tmp_path: Path) -> None:
    """`detour import`, then a run that starts from it, trains as one that starts from the Hugging Face directory."""
    imported = tmp_path / "imported"
    code = "import sys, pathlib, engine.export as e; e.import_hf(sys.argv[1], pathlib.Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(hf_model), str(imported)], check=True, timeout=120)
    results = []
    for init, directory in ((hf_model, tmp_path / "a"), (imported, tmp_path / "b")):
        directory.mkdir()
        tree = toy_config(shards).model_dump(mode="json", exclude_none=True) | {"model": {"init": str(init)}}
        run_world(1, train, RunConfig.model_validate(tree), directory, 1)
        results.append(stored(directory, 1))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_an_fp32_export_has_the_main_weights_and_bf16_rounds_them(shards: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = toy_config(shards, precision="bf16")
    (tmp_path / "run").mkdir()
    run_world(1, train, config, tmp_path / "run", 2)
    checkpoint = step_directory(tmp_path / "run" / "checkpoints", 2)
    tokenizer = load_tokenizer(config.tokenizer)
    for dtype in ("fp32", "bf16"):
        export_hf(checkpoint, tmp_path / dtype, tokenizer, dtype=dtype)
    exact, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("fp32", "bf16"))
    assert "CLM, 2 steps of the 3 planned" in (tmp_path / "fp32" / "README.md").read_text()
    name = "model.layers.1.mlp.Wo.weight"
    assert exact[name].dtype == torch.float32
    assert not torch.equal(exact[name], exact[name].bfloat16().float()), "the weights of the forward pass were exported"
    for key, tensor in rounded.items():
        torch.testing.assert_close(tensor, exact[key].bfloat16(), rtol=0, atol=0)


def test_the_card_of_a_causal_checkpoint_says_what_was_trained(shards: Path, alone_run: Path, tmp_path: Path) -> None:
    config = toy_config(shards)
    tokenizer = load_tokenizer(config.tokenizer)
    for step, kind in ((3, "encoder"), (3, "decoder"), (5, "encoder")):
        checkpoint = step_directory(alone_run / "checkpoints", step)
        export_hf(checkpoint, tmp_path / f"{kind}-{step}", tokenizer, kind=kind)
    causal, decoder, final = (
        (tmp_path / name / "README.md").read_text() for name in ("encoder-3", "decoder-3", "encoder-5")
    )
    assert "CLM, 3 steps, " in causal
    assert "MLM" not in causal
    assert "fill-mask" not in causal
    assert 'pipeline("text-generation"' in decoder
    assert "MLM, 2 steps, " in final
    assert f"treated with {tokenizer.mask_token}." in final


def _tokenizer_folder(folder: Path, changes: dict[str, str], config: dict[str, str] | None = None) -> Path:
    """A copy of the toy tokenizer in which pieces of tokenizer.json are replaced."""
    load_tokenizer(TOKENIZER).save(folder)
    content = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in content
        content = content.replace(old, new)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    for key, value in (config or {}).items():
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    return folder


def test_another_tokenizer_than_the_models_is_refused(hf_model: Path, tmp_path: Path) -> None:
    from datapipe.vocabulary import first_difference

    trained = load_tokenizer(TOKENIZER)
    swapped = {'"Ġpatients"': '"<held>"', '"Ġdisease"': '"Ġpatients"', '"<held>"': '"Ġdisease"'}
    other_ids = load_tokenizer(str(_tokenizer_folder(tmp_path / "ids", swapped)))
    other_roles = load_tokenizer(str(_tokenizer_folder(tmp_path / "roles", {}, {"sep_token": "[CLS]"})))
    same = load_tokenizer(str(_tokenizer_folder(tmp_path / "same", {})))
    assert first_difference(trained, same) is None
    assert "id" in str(first_difference(trained, other_ids))
    assert "sep" in str(first_difference(trained, other_roles))


def test_a_start_checks_tokenizer_and_weights_together(hf_model: Path, tmp_path: Path) -> None:
    import shutil

    from engine.initial_weights import check_initial_weights

    tokenizer = load_tokenizer(TOKENIZER)
    architecture = ModernBertConfig(vocab_size=2051, pad_token_id=0, **SHAPE)
    (note,) = check_initial_weights(str(hf_model), architecture, tokenizer)
    assert "tokenizer.json" in note
    model = tmp_path / "model"
    shutil.copytree(hf_model, model)
    tokenizer.save(model)
    assert check_initial_weights(str(model), architecture, tokenizer) == []
    other = load_tokenizer(str(_tokenizer_folder(tmp_path / "roles", {}, {"sep_token": "[CLS]"})))
    with pytest.raises(InputError) as refusal:
        check_initial_weights(str(model), architecture, other)
    assert (refusal.value.key, refusal.value.code) == ("tokenizer", "tokenizer-not-the-models")


def test_a_vocabulary_override_below_the_tokenizer_is_refused(hf_model: Path) -> None:
    from configs.schema import Model
    from engine.modernbert.config import resolve_architecture

    tokenizer = load_tokenizer(TOKENIZER)
    with pytest.raises(InputError) as refusal:
        resolve_architecture(Model(init=str(hf_model), vocab_size=100), tokenizer)
    assert (refusal.value.key, refusal.value.code) == ("model.vocab_size", "tokenizer-too-large")


def test_a_checkpoint_takes_its_own_tokenizer_alone(shards: Path, alone_run: Path, tmp_path: Path) -> None:
    from engine.initial_weights import check_initial_weights
    from tests.toy_tokenizers import extended

    checkpoint = step_directory(alone_run / "checkpoints", 5)
    own = load_tokenizer(str(checkpoint))
    assert own.sha256 == load_tokenizer(toy_config(shards).tokenizer).sha256
    swapped = {'"Ġpatients"': '"<held>"', '"Ġdisease"': '"Ġpatients"', '"<held>"': '"Ġdisease"'}
    others = {
        "tokenizer-not-the-models": _tokenizer_folder(tmp_path / "ids", swapped),
        "tokenizer-extends-checkpoint": extended(tmp_path / "more", own.directory),
    }
    for code, folder in others.items():
        with pytest.raises(InputError) as refusal:
            check_initial_weights(str(checkpoint), ModernBertConfig(), load_tokenizer(str(folder)))
        assert (refusal.value.key, refusal.value.code) == ("tokenizer", code)


def test_a_run_under_way_takes_its_architecture_from_its_checkpoint(alone_run: Path, shards: Path) -> None:
    from engine.micro_batch import identity
    from engine.modernbert.config import resolve_architecture
    from engine.parallel import Layout
    from engine.run_inputs import run_architecture, run_tokenizer

    config = toy_config(shards)
    tokenizer = run_tokenizer(config, alone_run)
    kept, resolved = run_architecture(config, alone_run, tokenizer), resolve_architecture(config.model, tokenizer)
    assert kept.to_dict() == resolved.to_dict()
    keys = [identity(config, config.spans[0], one, Layout(1, 1, 1, False, ()), None) for one in (kept, resolved)]
    assert keys[0] == keys[1], "the micro-batch would be measured again"
    gone = config.model_copy(update={"model": config.model.model_copy(update={"init": "gone/away"})})
    assert run_architecture(gone, alone_run, tokenizer).to_dict() == resolved.to_dict()
    other = config.model_copy(update={"model": config.model.model_copy(update={"hidden_size": 64})})
    assert run_architecture(other, alone_run, tokenizer).hidden_size == 64
