from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from studies.models import load_model


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
