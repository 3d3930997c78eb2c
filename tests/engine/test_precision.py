"""The choices of `precision: auto`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InputError
from engine.precision import resolve_precision
from tests.engine.world import toy_config

LARGE = 1_032_000_000


@pytest.mark.parametrize(
    ("capability", "parameters", "changes", "expected"),
    [
        ((9, 0), LARGE, {}, "fp8"),
        ((9, 0), 395_000_000, {}, "bf16"),
        ((9, 0), LARGE, {"parallel": {"tensor": 2}}, "bf16"),
        ((9, 0), LARGE, {"fp8_recipe": "mxfp8"}, "bf16"),
        ((9, 0), LARGE, {"precision": "bf16"}, "bf16"),
        ((8, 0), LARGE, {}, "bf16"),
        ((10, 0), LARGE, {}, "bf16"),
    ],
)
def test_fp8_is_chosen_where_it_was_measured_faster(
    capability: tuple[int, int],
    parameters: int,
    changes: dict[str, Any],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert resolve_precision(toy_config(tmp_path, **{"precision": "auto", **changes}), parameters) == expected


def test_fp8_asked_for_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_precision(toy_config(tmp_path, precision="auto"), LARGE) in ("fp32", "bf16")
    with pytest.raises(InputError) as error:
        resolve_precision(toy_config(tmp_path, precision="fp8"), LARGE)
    assert error.value.key == "precision"
