"""Fixtures for tests that train through the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for the kernels' tests; Triton reads it at its import

from tests.launcher.toy import TRAIN, recipe, run, write


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The English sample corpus, prepared."""
    from datapipe.prepare import prepare
    from datapipe.tokenizer import load_tokenizer

    output = tmp_path_factory.mktemp("shards") / "en"
    prepare(["package://corpus/tico19_en.jsonl.gz"], load_tokenizer("package://tokenizer/modernbert"), output)
    return output


@pytest.fixture(scope="session")
def undisturbed(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a toy run that nothing happened to; its recipe and its output lie beside it."""
    home = tmp_path_factory.mktemp("undisturbed")
    result = run(*TRAIN, write(home / "toy.yaml", recipe(toy_shards)), "--output", "run", cwd=home)
    assert result.returncode == 0, result.stdout + result.stderr
    (home / "stdout.txt").write_text(result.stdout)
    (home / "stderr.txt").write_text(result.stderr)
    return home / "run"


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[dict[str, str]]:
    """The environment of a process that belongs to a Ray cluster of one node with two CPUs."""
    from tests.chaos.loopback import LoopbackCluster

    with LoopbackCluster(1, cpus=2) as cluster:
        yield cluster.environment
