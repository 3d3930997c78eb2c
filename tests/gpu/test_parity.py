"""The Transformer Engine layers on a GPU against Hugging Face on the CPU, and FP8 training."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InputError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with Transformer Engine"),
    pytest.mark.usefixtures("alone"),
]
LENGTHS = (300, 40, 5, 5, 34)


@pytest.mark.parametrize(
    ("dtype", "bar", "attention", "causal"),
    [
        (torch.float32, 1e-4, "torch", False),
        (torch.float32, 1e-4, "torch", True),
        (torch.bfloat16, 2e-2, "torch", False),
        (torch.bfloat16, 2e-2, "torch", True),
        (torch.bfloat16, 2e-2, "transformer_engine", False),
        (torch.bfloat16, 2e-2, "transformer_engine", True),
        (torch.bfloat16, 2e-2, "flash_attn_4", False),
        (torch.bfloat16, 2e-2, "flash_attn_4", True),
    ],
)
def test_logits_equal_hugging_face(dtype: torch.dtype, bar: float, attention: Any, causal: bool) -> None:
    """Relative to the largest logit; in bf16 the format itself has 8 bits of mantissa."""
    from engine.modernbert.attention import PackedDocuments
    from engine.modernbert.convert import load_weights
    from engine.modernbert.model import ModernBert, transformer_config
    from tests.engine.test_parity import build, their_logits

    if attention == "flash_attn_4":
        pytest.importorskip("flash_attn.cute")
    torch.backends.cuda.matmul.allow_tf32 = False
    theirs, _, architecture = build(hidden_size=128)  # heads of 32, as the kernel of local layers takes them
    state = theirs.state_dict()
    config = transformer_config(architecture, dtype=dtype)
    model = ModernBert(config, architecture, transformer_engine=True, attention=attention)
    load_weights(model, lambda name: state[name])
    model = model.cuda().eval()
    ids = torch.randint(0, architecture.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat([their_logits(theirs, document, causal) for document in ids.split(LENGTHS)])
        packed = PackedDocuments.from_lengths(LENGTHS, causal, torch.device("cuda"))
        found = model(ids[None].cuda(), packed)[:, : architecture.vocab_size].float().cpu()
    assert (found - expected).abs().max() <= bar * expected.abs().max()


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_follows_bf16_and_resumes_exactly(recipe: str, tmp_path: Path) -> None:
    """The same steps in FP8 and BF16 end within 1 % of one loss, and a checkpoint on the way goes on as the run did."""
    from datapipe.prepare import ensure_prepared
    from datapipe.tokenizer import load_tokenizer
    from engine.precision import resolve_precision
    from monitoring.log import read_metrics
    from tests.engine.world import run_world, toy_config, train

    model = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    bf16, fp8 = (
        toy_config(
            tmp_path,
            model=model,
            precision=precision,
            fp8_recipe=recipe,
            checkpoint={"every": "2 steps", "keep": 9},
        )
        for precision in ("bf16", "fp8")
    )
    try:
        resolve_precision(fp8, 0)
    except InputError as error:
        pytest.skip(str(error))
    ensure_prepared(fp8.data, load_tokenizer(fp8.tokenizer))

    def losses(config: Any, name: str) -> list[float]:
        (tmp_path / name).mkdir(exist_ok=True)
        run_world(1, train, config, tmp_path / name)
        return [line["loss"] for line in read_metrics(tmp_path / name)]

    whole = losses(fp8, "whole")
    assert whole == pytest.approx(losses(bf16, "bf16"), rel=0.01)
    # From its own checkpoint: gradients of attention are added up in no fixed order, so two whole runs may differ.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in (tmp_path / "again" / "checkpoints").glob("step-0000000[345]"):
        shutil.rmtree(path)
    assert losses(fp8, "again")[2] == whole[2], "the first step after the restart"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_deterministic_run_is_equal_to_the_bit(precision: str, tmp_path: Path) -> None:
    """Twice from the start, and from a checkpoint on the way: losses, gradient norms, weights and moments."""
    from datapipe.prepare import ensure_prepared
    from datapipe.tokenizer import load_tokenizer
    from monitoring.log import read_metrics
    from tests.engine.world import run_world, stored, toy_config, train

    model = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    saves = {"every": "2 steps", "keep": 9}
    config = toy_config(tmp_path, model=model, precision=precision, deterministic=True, checkpoint=saves)
    ensure_prepared(config.data, load_tokenizer(config.tokenizer))
    whole, twice, resumed = (tmp_path / name for name in ("whole", "twice", "resumed"))
    whole.mkdir(), twice.mkdir()
    run_world(1, train, config, whole)
    run_world(1, train, config, twice)
    shutil.copytree(whole, resumed)
    for path in (resumed / "checkpoints").glob("step-0000000[345]"):
        shutil.rmtree(path)
    run_world(1, train, config, resumed)
    expected = stored(whole, 5)
    for other in (twice, resumed):
        lines = zip(read_metrics(other), read_metrics(whole), strict=True)
        assert all(line[key] == one[key] for line, one in lines for key in ("loss", "grad_norm"))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in stored(other, 5).items())


def _train_in_a_process(config: Any, directory: Path, stop_after: int | None, *, gpu: bool) -> None:
    """In a process of its own, since one that has seen a GPU cannot be made to forget it."""
    code = (
        "import pickle, sys; from tests.engine.conftest import cpu; from tests.engine.world import run_world, train\n"
        "if __name__ == '__main__': run_world(1, train, *pickle.load(sys.stdin.buffer))"
    )
    script = directory.parent / "train.py"
    script.write_text(code)
    places = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run(
        [sys.executable, script], input=pickle.dumps((config, directory, stop_after)), env=environment, check=True
    )


def test_a_cpu_checkpoint_goes_on_on_a_gpu_and_back(tmp_path: Path) -> None:
    from datapipe.prepare import ensure_prepared
    from datapipe.tokenizer import load_tokenizer
    from monitoring.log import read_metrics
    from tests.engine.world import toy_config

    config = toy_config(tmp_path)
    ensure_prepared(config.data, load_tokenizer(config.tokenizer))
    travelled, stayed = tmp_path / "travelled", tmp_path / "stayed"
    travelled.mkdir(), stayed.mkdir()
    _train_in_a_process(config, stayed, None, gpu=False)
    _train_in_a_process(config, travelled, 2, gpu=False)
    _train_in_a_process(config, travelled, 2, gpu=True)
    _train_in_a_process(config, travelled, None, gpu=False)
    losses, expected = ([line["loss"] for line in read_metrics(place)] for place in (travelled, stayed))
    assert losses == pytest.approx(expected, rel=1e-3)
