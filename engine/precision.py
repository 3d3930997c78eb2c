"""The number format that a run computes in."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from configs.errors import InputError
from configs.schema import RunConfig

Precision = Literal["fp32", "bf16", "fp8"]
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
FP8_PAYS_FROM = 1_000_000_000
"""Parameters from which FP8 was measured faster than BF16, on one Hopper GPU (benchmarks/results/gpu-2026-11-26.md)."""


Capability = tuple[int, int]
HOPPER: Capability = (9, 0)
"""Compute capability of the GPUs that were measured."""


def resolve_precision(config: RunConfig, parameters: int, planned: Capability | None = None) -> Precision:
    """Choose what `precision: auto` stands for, and check what is asked for.

    FP8 where a model of this size was measured faster in it; else BF16 where the hardware multiplies it faster than
    FP32: on GPUs, and on CPUs with AMX or AVX-512 BF16; else FP32.

    Args:
        config: The run's configuration.
        parameters: Parameters of the model.
        planned: Compute capability of the GPU. Default: that of this machine's GPU, if it has one.

    Raises:
        InputError: FP8 is requested but unavailable.
    """
    capability = planned or (torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    if config.precision == "auto":
        if parameters >= FP8_PAYS_FROM and _was_measured_in_fp8(config, capability):
            return "fp8"
        fast = capability is not None or _cpu_multiplies_bf16()
        return "bf16" if fast else "fp32"
    if config.precision == "fp8":
        _require_fp8(config.fp8_recipe, capability)
        if planned is None and importlib.util.find_spec("transformer_engine") is None:
            raise InputError(
                f"precision: fp8 needs Transformer Engine, which is not installed; {_REMEDY}", key="precision"
            )
    return config.precision


def _was_measured_in_fp8(config: RunConfig, capability: Capability | None) -> bool:
    """Return whether FP8 was measured on such a GPU, with this recipe, and without tensor parallelism."""
    return capability == HOPPER and config.fp8_recipe != "mxfp8" and config.parallel.tensor == 1


def _cpu_multiplies_bf16() -> bool:
    features = torch.cpu.get_capabilities()
    return bool(features.get("amx_tile") or features.get("avx512_bf16"))


_REMEDY = "set precision=bf16, or run on an FP8 GPU with the gpu extra (`detour doctor` says what is missing)"


def _require_fp8(recipe: str, capability: Capability | None) -> None:
    if capability is None:
        raise InputError(
            f"precision: fp8 needs an NVIDIA GPU of the Hopper generation or later; this machine has none; {_REMEDY}",
            key="precision",
        )
    major, minor = capability
    if (major, minor) < (8, 9):
        raise InputError(
            f"precision: fp8 needs compute capability 8.9 or more, this GPU has {major}.{minor}; {_REMEDY}",
            key="precision",
        )
    if recipe == "mxfp8" and major < 10:
        raise InputError(
            f"fp8_recipe: mxfp8 needs a Blackwell GPU, this one has compute capability {major}.{minor}",
            key="fp8_recipe",
        )
    if recipe == "blockwise" and major < 9:
        raise InputError(
            f"fp8_recipe: blockwise needs a Hopper GPU, this one has compute capability {major}.{minor}",
            key="fp8_recipe",
        )
