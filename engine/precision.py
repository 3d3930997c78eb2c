"""Which number format a run computes in."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from configs.errors import InputError
from configs.schema import RunConfig

Precision = Literal["fp32", "bf16", "fp8"]
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
FP8_PAYS_FROM = 1_000_000_000
"""Parameters from which FP8 was measured faster than BF16 (benchmarks/results/gpu-2026-11-26.md): on one Hopper GPU, by
1.14 to 1.36; at 400 million it was as fast at best."""


def resolve_precision(config: RunConfig, parameters: int) -> Precision:
    """`auto` is bf16 where the hardware multiplies it faster than fp32: on GPUs, and on CPUs with AMX or AVX-512 BF16;
    and fp8 where a model of so many parameters was measured faster in it.

    Raises InputError where FP8 is asked for and the GPU or Transformer Engine lacks.
    """
    if config.precision == "auto":
        if parameters >= FP8_PAYS_FROM and _was_measured_in_fp8(config):
            return "fp8"
        fast = torch.cuda.is_available() or _cpu_multiplies_bf16()
        return "bf16" if fast else "fp32"
    if config.precision == "fp8":
        _require_fp8(config.fp8_recipe)
    return config.precision


def _was_measured_in_fp8(config: RunConfig) -> bool:
    """With whole matrices: tensor parallelism makes smaller ones of them."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return hopper and config.fp8_recipe != "mxfp8" and config.parallel.tensor == 1


def _cpu_multiplies_bf16() -> bool:
    features = torch.cpu.get_capabilities()
    return bool(features.get("amx_tile") or features.get("avx512_bf16"))


def _require_fp8(recipe: str) -> None:
    remedy = "set precision=bf16, or run on an FP8 GPU with the gpu extra (`detour doctor` says what is missing)"
    if not torch.cuda.is_available():
        raise InputError(
            f"precision: fp8 needs an NVIDIA GPU of the Hopper generation or later; there is none here; {remedy}"
        )
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        raise InputError(f"precision: fp8 needs compute capability 8.9 or more, this GPU has {major}.{minor}; {remedy}")
    if importlib.util.find_spec("transformer_engine") is None:
        raise InputError(f"precision: fp8 needs Transformer Engine, which is not installed; {remedy}")
    if recipe == "mxfp8" and major < 10:
        raise InputError(f"fp8_recipe: mxfp8 needs a Blackwell GPU, this one has compute capability {major}.{minor}")
    if recipe == "blockwise" and major < 9:
        raise InputError(f"fp8_recipe: blockwise needs a Hopper GPU, this one has compute capability {major}.{minor}")
