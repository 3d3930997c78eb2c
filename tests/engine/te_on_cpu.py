"""Transformer Engine's own Python on a CPU: the few functions of its C++ extension that training calls are written here
in torch, from their documentation.

So what Python decides is tested without a GPU: how Megatron and Detour build and call the layers, what each FP8 recipe
quantizes and how, what delayed scaling keeps, whether a run resumes exactly. The kernels and their speed are not.
"""

from __future__ import annotations

import enum
import functools
import os
import sys
import types
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

EXTENSION = "transformer_engine_torch"
UNUSED = ("einops", "onnx", "onnxscript")
"""Stand-ins for the package's imports that Detour does not use."""
BLOCK = 128
"""Elements that share a scale in the blockwise recipe, along one axis or both."""
CALLS: Counter[str] = Counter()
"""Quantizations by quantizer, matrix products by operands, and transpositions of what was quantized before."""


class _Anything(type):
    """A class whose attributes and calls are empty: what is imported from the extension and never used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> None: ...

    def __int__(cls) -> int:
        return 0


class _Nothing(metaclass=_Anything): ...


def install(packages: Path) -> None:
    """Import Transformer Engine from a directory that holds its Python package, and make Megatron use it.

    For a process of its own: afterwards Transformer Engine believes that there is an H100.
    """
    os.environ.update(NVTE_PROJECT_BUILDING="1")  # import without the compiled core library
    os.environ.update(NVTE_UNFUSED_FP8_UPDATE="1")  # delayed scaling updates its history in torch
    sys.path.insert(0, str(packages))
    sys.modules[EXTENSION] = _extension()
    for name in UNUSED:
        sys.modules.setdefault(name, _module(name))
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch

    from engine.megatron import cpu

    cpu.install()
    import megatron.core.extensions.transformer_engine as megatrons

    view = _view_with_a_gpu(megatrons.torch)
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
    megatrons.torch = view
    _accept_cpu_tensors()


def _module(name: str) -> Any:
    module: Any = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None)
    module.__getattr__ = functools.partial(getattr, _Nothing)
    return module


def _extension() -> types.ModuleType:
    """The stand-in for the compiled extension; the numbers of its enumerations are those of the C++ headers."""
    extension = _module(EXTENSION)
    formats = ["Byte", "Int32", "Float32", "Float16", "BFloat16", "Float8E4M3", "Float8E5M2", "Float4E2M1"]
    forward = [f"GEMM{i}_{tensor}" for i in (1, 2, 3) for tensor in ("INPUT", "WEIGHT", "OUTPUT")]
    backward = [f"GRAD_{tensor}{i}" for i in (1, 2, 3) for tensor in ("OUTPUT", "INPUT")]
    attention = ["NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8"]
    extension.DType = enum.IntEnum("DType", [f"k{name}" for name in formats], start=0)
    extension.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", forward, start=0)
    extension.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", backward, start=0)
    extension.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", attention, start=-1)
    extension.get_cublasLt_version = lambda: 130000
    extension.create_empty_quantized_tensor = _empty
    extension.quantize = _quantize
    extension.generic_gemm = _gemm
    extension.fp8_transpose = _transpose_later
    return extension


def _view_with_a_gpu(torch_: Any) -> types.ModuleType:
    """Return `engine.megatron.cpu`'s view of torch, in which torch.cuda reports an H100."""
    view: Any = types.ModuleType("torch")
    view.__dict__.update(torch_.__dict__)
    view.cuda = types.ModuleType("torch.cuda")
    view.cuda.__dict__.update(
        torch_.cuda.__dict__,
        is_available=lambda: True,
        is_current_stream_capturing=lambda: False,
        get_device_capability=lambda *_: (9, 0),
        get_device_properties=lambda *_: types.SimpleNamespace(major=9, minor=0, multi_processor_count=132),
    )
    return view


def _accept_cpu_tensors() -> None:
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    original = TransformerEngineBaseModule.prepare_forward

    def prepare_forward(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.Tensor, "is_cuda", True):
            return original(*args, **kwargs)

    TransformerEngineBaseModule.prepare_forward = prepare_forward


def _empty(quantizer: Any, shape: Any, dtype: torch.dtype, device: torch.device, pin_memory: bool = False) -> Any:
    """A quantized tensor as the C++ extension allocates one: data as it is and transposed, as the quantizer wants."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    shape = tuple(shape)
    rows = torch.empty(shape, dtype=torch.uint8) if quantizer.rowwise_usage else None
    columns = torch.empty(shape[-1], *shape[:-1], dtype=torch.uint8) if quantizer.columnwise_usage else None
    fields: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if isinstance(quantizer, Float8BlockQuantizer):
        inner, outer = Float8BlockwiseQTensorStorage, Float8BlockwiseQTensor
        for kind, data in (("rowwise", rows), ("columnwise", columns)):
            scales = torch.zeros(quantizer.get_scale_shape(shape, columnwise=kind == "columnwise"))
            fields |= {f"{kind}_data": data, f"{kind}_scale_inv": None if data is None else scales}
        fields["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    else:
        inner, outer = Float8TensorStorage, Float8Tensor
        fields |= {"data": rows, "data_transpose": columns, "fp8_scale_inv": torch.empty(1)}
    if quantizer.internal:
        return inner(**fields, fake_dtype=dtype)
    return outer(shape=shape, dtype=dtype, device=device, **fields)


def _quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None) -> Any:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    if noop is not None and noop.item():
        return output
    CALLS[type(quantizer).__name__] += 1
    if output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    values, dtype = tensor.detach().float(), TE_DType_To_Torch[quantizer.dtype]
    if isinstance(quantizer, Float8BlockQuantizer):
        rows = values.reshape(-1, values.shape[-1])
        for kind, matrix in (("rowwise", rows), ("columnwise", rows.t())):
            data, inverse = (getattr(output, f"_{kind}_{part}") for part in ("data", "scale_inv"))
            if data is not None:
                cast, scales = _cast_blocks(matrix, quantizer, dtype)
                data.copy_(cast.view(torch.uint8).view(data.shape))
                inverse[:, : scales.shape[1]] = scales
        return output
    largest = values.abs().amax()
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
        scale = _scale_of(largest.clamp(min=quantizer.amax_epsilon), quantizer, dtype)
    else:  # delayed: by the history, to which this tensor is added
        scale = quantizer.scale.view(())
        quantizer.amax.copy_(largest.maximum(quantizer.amax))
    data = _cast(values * scale, dtype).view(torch.uint8)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        _transpose(data, out=output._transpose)
        output._transpose_invalid = False
    output._scale_inv.copy_(1 / scale)
    return output


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    top = torch.finfo(dtype).max
    return values.clamp(-top, top).to(dtype)


def _scale_of(largest: torch.Tensor, quantizer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The factor that brings the largest magnitude to the largest number of the format."""
    scale = torch.where(largest > 0, torch.finfo(dtype).max / largest, 1.0)
    return scale.log2().floor().exp2() if quantizer.force_pow_2_scales else scale


def _cast_blocks(matrix: torch.Tensor, quantizer: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[r, c] in FP8, and the inverse scales: [r blocks, c blocks] of square blocks, [c blocks, r] of blocks in rows."""
    rows, columns = matrix.shape
    high = BLOCK if quantizer.block_scaling_dim == 2 else 1
    padded = F.pad(matrix, (0, -columns % BLOCK, 0, -rows % high))
    blocks = padded.view(padded.shape[0] // high, high, padded.shape[1] // BLOCK, BLOCK)
    scale = _scale_of(blocks.abs().amax(dim=(1, 3), keepdim=True), quantizer, dtype)
    inverse = (1 / scale)[:, 0, :, 0]
    cast = _cast(blocks * scale, dtype).view(padded.shape)[:rows, :columns].contiguous()
    return cast, inverse if high == BLOCK else inverse.t()


def _transpose_later(data: torch.Tensor, dtype: Any = None, out: torch.Tensor | None = None) -> torch.Tensor:
    CALLS["transposition"] += 1
    return _transpose(data, out)


def _transpose(data: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """[..., n] -> [n, ...]."""
    moved = data.reshape(-1, data.shape[-1]).t().reshape(data.shape[-1], *data.shape[:-1])
    return moved.contiguous() if out is None else out.copy_(moved)


def _matrix(operand: Any, rowwise: bool) -> torch.Tensor:
    """The operand of a product as fp32 [rows, columns], from the data that the product reads."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    if isinstance(operand, Float8BlockwiseQTensorStorage):
        kind = "rowwise" if rowwise else "columnwise"
        data, scales = (getattr(operand, f"_{kind}_{part}") for part in ("data", "scale_inv"))
        data = data.view(len(data), -1) if not rowwise else data.view(-1, data.shape[-1])
        inverse = scales if operand._is_2D_scaled else scales[:, : len(data)].t()
        inverse = inverse.repeat_interleave(BLOCK, 1)[:, : data.shape[1]]
        if operand._is_2D_scaled:
            inverse = inverse.repeat_interleave(BLOCK, 0)[: len(data)]
        found = data.view(TE_DType_To_Torch[operand._fp8_dtype]).float() * inverse
        return found if rowwise else found.t()
    if isinstance(operand, Float8TensorStorage):
        transposed = operand._data is None or (not rowwise and not operand._transpose_invalid)
        data = operand._transpose if transposed else operand._data
        values = data.view(TE_DType_To_Torch[operand._fp8_dtype]).float() * operand._scale_inv
        return values.view(len(values), -1).t() if transposed else values.view(-1, values.shape[-1])
    return operand.reshape(-1, operand.shape[-1]).float()


def _gemm(
    a: Any, transa: bool, b: Any, transb: bool, out: Any, quantizer: Any, out_dtype: Any, *more: Any, **kwargs: Any
) -> tuple[torch.Tensor, None, None, None]:
    """cuBLAS's product by columns: op(b) @ op(a) by rows, which is what it says when read in torch's order."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage

    bias, _, gelu, *_, accumulate, _ = more
    assert bias is None and quantizer is None and not gelu and kwargs["comm_overlap"] is None, (
        "not what Detour asks for"
    )
    left, right = _matrix(b, not transb), _matrix(a, transa)
    quantized = [isinstance(operand, QuantizedTensorStorage) for operand in (a, b)]
    CALLS["fp8 product" if all(quantized) else "mixed product" if any(quantized) else "plain product"] += 1
    if any(quantized):
        for matrix in (left, right):
            assert matrix.shape[0] % 8 == 0 and matrix.shape[1] % 16 == 0, f"cuBLAS takes no FP8 of {matrix.shape}"
    product = (left.t() if transb else left) @ (right.t() if transa else right)
    if not transb:
        product = product.view(*b.size()[:-1], -1)
    if out is None:
        return product.to(TE_DType_To_Torch[out_dtype] if out_dtype is not None else b.dtype), None, None, None
    return out.add_(product) if accumulate else out.copy_(product), None, None, None
