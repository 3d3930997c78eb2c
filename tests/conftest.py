"""Fixtures and hooks of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for the kernels' tests; Triton reads it when it is imported

from tests.launcher.toy import TRAIN, recipe, run, write
from tests.programs import pytest_terminal_summary  # noqa: F401
from tests.seeds import drawn_seed  # noqa: F401
from tests.toy_recipe import TOKENIZER

CONTRACTS = Path(__file__).parent / "engine" / "megatron" / "test_contracts.py"
LONGEST = [
    Path(__file__).parent / name for name in ("test_end_to_end.py", "chaos/test_short.py", "engine/test_resume.py")
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run first what tells that an upgraded Megatron, torch or Transformer Engine has changed, then the longest files.

    One process runs all tests of a file, so that a long file at the end would leave the other processes idle.
    """
    items.sort(key=lambda item: (item.path != CONTRACTS, item.path not in LONGEST))


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the English sample corpus."""
    from datapipe.prepare import prepare
    from datapipe.tokenizer import load_tokenizer

    output = tmp_path_factory.mktemp("shards") / "en"
    prepare(["package://corpus/tico19_en.jsonl.gz"], load_tokenizer(TOKENIZER), output)
    return output


@pytest.fixture(scope="session")
def undisturbed(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a toy run without faults, in a folder with its recipe and its output."""
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
