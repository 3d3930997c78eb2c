"""A process group of one for tests of the model in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine import cpu

cpu.install()


@pytest.fixture(scope="session")
def alone() -> Iterator[None]:
    """torch.distributed and Megatron's groups with this process alone."""
    from engine.export import single_process

    with single_process():
        yield
