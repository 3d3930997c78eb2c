"""Shards, an undisturbed run, and a process group of one for tests of the model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from datapipe.prepare import ensure_prepared
from datapipe.tokenizer import load_tokenizer
from engine.megatron import cpu
from monitoring.log import read_metrics
from tests.engine.world import run_world, toy_config, train

cpu.install()


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """torch.distributed and Megatron's groups with this process alone."""
    from engine.parallel import single_process

    with single_process():
        yield


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    config = toy_config(folder)
    ensure_prepared(config.data, load_tokenizer(config.tokenizer))
    return folder


@pytest.fixture(scope="session")
def alone_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy run on one process, undisturbed."""
    directory = tmp_path_factory.mktemp("alone")
    run_world(1, train, toy_config(shards), directory)
    assert len(read_metrics(directory)) == 5
    return directory
