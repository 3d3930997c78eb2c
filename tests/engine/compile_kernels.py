"""Compiles the Triton kernels for a GPU that is not there; a process of its own, since Triton must not interpret."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.changes import LOCAL_TILES, fp8_attention_kernels, fp8_kernels, geglu_products, residual_products
from engine.modernbert.kernels import attention, pointwise

BF16, FP32 = "*bf16", "*fp32"
NORM = {"states": BF16, "weight": BF16, "mean": FP32, "inverse": FP32, "normed": BF16, "width": "i32"}
LOCAL = dict.fromkeys(("qkv", "cos", "sin", "out", "grad", "dqkv"), BF16)
FP8 = {"data": "*u8", "transposed": "*u8", "scale_inverse": FP32, "scale": FP32, "amax": FP32, "rows": "i32"}
SIZES = ("rows", "width", "tokens", "stride")
"""Numbers that are multiples of 16 in training."""
LOCAL |= {"documents": "*i32", "lse": FP32, "tokens": "i32"}


def build(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> str:
    """Compile for compute capability 9.0, and return the PTX."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]  # which Triton sees when it launches a kernel
        for place, name in enumerate(names)
        if "*" in signature[name] or (name in SIZES and signature[name] == "i32")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, constants, built.metadata.shared, "bytes of shared memory")
    ptx: str = built.asm["ptx"]
    return ptx


def build_tilings(kernel: Any) -> None:
    """Build the first tiling of a product; the page of results has the registers of all."""
    for config in kernel.configs[:1]:
        tiles: dict[str, Any] = {
            name: TensorDescriptor(torch.empty(1, 16), [1, 16], [16, 1], [1, 16]) for name in kernel.arg_names
        }
        config.pre_hook(tiles | config.kwargs)
        types = {name: f"tensordesc<bf16{tile.block_shape}>" for name, tile in tiles.items()}
        types |= {"rows": "i32", "width": "i32", "inner": "i32"}
        types = {name: kind for name, kind in types.items() if name not in config.kwargs}
        build(kernel.fn, types, config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages)


def main() -> None:
    tile = {"width": 1152, "ROWS": pointwise.ROWS, "COLUMNS": pointwise.COLUMNS}
    build(pointwise._geglu, {"states": BF16, "output": BF16, "rows": "i32"}, tile)
    build(pointwise._geglu_backward, {"states": BF16, "grad": BF16, "result": BF16, "rows": "i32"}, tile)
    place = {"site": "i64", "first_channel": "i32", "threshold": "i64", "scale": "fp32"}
    build(pointwise._drop, {"states": BF16, "keys": "*i32", "output": BF16, "rows": "i32", **place}, tile)
    turned = dict.fromkeys(("qkv", "q", "k", "v", "cos", "sin"), BF16)
    for back in (False, True):
        sizes = {"DIM": 64, "ROWS": 4 * pointwise.ROWS, "BACK": back}
        build(pointwise._rotate, {**turned, "rows": "i32", "heads": "i32"}, sizes)
        build(pointwise._norm, {**NORM, "added": BF16, "total": BF16, "eps": "fp32"}, {"ADDS": back, "BLOCK": 1024})
    more = {"kept": BF16, "result": BF16, "parts": FP32, "rows": "i32"}
    build(pointwise.norm_backward, {**NORM, **more}, {"ROWS_PER_PROGRAM": pointwise.ROWS_PER_PROGRAM, "BLOCK": 1024})
    build(
        pointwise._exponentials,
        {"logits": BF16, "largest": FP32, "sums": FP32, "stride": "i32"},
        {"width": 50368, "BLOCK": 4096},
        num_warps=8,
    )
    for writes in (False, True):
        build(
            pointwise._softmax_minus_label,
            {"logits": BF16, "labels": "*i64", "sums": FP32, "stride": "i32"},
            {"width": 50368, "BLOCK": 4096, "WRITES": writes},
            num_warps=16,
        )
    _build_fp8()
    for tile in ((attention.BLOCK_M, attention.BLOCK_N, attention.OPTIONS), *LOCAL_TILES):
        sizes = {"HEADS": 12, "DIM": 64, "BEFORE": 64, "AFTER": 0, "BLOCK_M": tile[0], "BLOCK_N": tile[1]}
        for kernel in (attention._forward, attention._backward):
            build(kernel, LOCAL, sizes, **tile[2])
    for product in (
        geglu_products._linear_and_gate,
        geglu_products._gate_gradient,
        residual_products._linear_and_add,
    ):
        build_tilings(product)


def _build_fp8() -> None:
    """Each must cast by the instruction that rounds to the nearest and saturates."""
    tile, warps = {"width": 2624, "TILE": fp8_kernels.TILE}, {"num_warps": fp8_kernels.WARPS}
    names = {**FP8, "states": BF16, "grad": BF16}
    built = [
        (build(fp8_kernels._geglu, names, tile, **warps), "e4m3x2"),
        (build(fp8_kernels._geglu_backward, names, tile, **warps), "e5m2x2"),
    ]
    names |= {**NORM, "added": BF16, "total": BF16, "eps": "fp32"}
    for adds in (False, True):
        sizes = {"ADDS": adds, "ROWS": fp8_kernels.ROWS, "COLUMNS": fp8_kernels.COLUMNS, "BLOCK": 1024}
        built.append((build(fp8_kernels._norm, names, sizes, num_warps=4), "e4m3x2"))
    more = {"kept": BF16, "result": BF16, "parts": FP32}
    sizes = {"ROWS": pointwise.ROWS_PER_PROGRAM, "COLUMNS": fp8_kernels.GRADIENT_COLUMNS, "BLOCK": 1024}
    built.append((build(fp8_kernels._norm_backward, {**names, **more}, sizes, num_warps=4), "e5m2x2"))
    names = {**FP8, **LOCAL, **dict.fromkeys(("dq", "dk", "dv"), BF16)}
    sizes = {"HEADS": 16, "DIM": 64, "ROWS": fp8_kernels.TILE}
    built.append((build(fp8_attention_kernels._rotate_backward, names, sizes), "e5m2x2"))
    sizes = {
        "HEADS": 16,
        "DIM": 64,
        "BEFORE": 64,
        "AFTER": 0,
        "BLOCK_M": attention.BLOCK_M,
        "BLOCK_N": attention.BLOCK_N,
    }
    built.append((build(fp8_attention_kernels._forward, names, sizes, **attention.OPTIONS), "e4m3x2"))
    built.append((build(fp8_attention_kernels._backward, names, sizes, **attention.OPTIONS), "e5m2x2"))
    for ptx, kind in built:
        assert f"cvt.rn.satfinite.{kind}.f32" in ptx


if __name__ == "__main__":
    main()
