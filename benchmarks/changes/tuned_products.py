"""The layers' products by the fastest kernel for each shape, and all products by cuBLASLt.

cuBLAS reaches 705 of 798 TFLOP/s over all products of base; which shapes are the slow ones is not known. Inductor times
cuBLAS and its own Triton kernels once per shape in each process, so a run is not repeated to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from engine.modernbert import linears
from engine.modernbert.linears import add_weight_gradient
from engine.modernbert.ops import add_product_

OPTIONS: dict[str, Any] = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}


@contextmanager
def by_cublaslt() -> Iterator[None]:
    """Let torch take cuBLASLt's products in this context, where it has the choice."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@contextmanager
def by_shape() -> Iterator[None]:
    """Let plain linear layers take the fastest kernels in this context; a weight's gradient is added in its product."""
    torch.compiler.reset()  # torch compiles a function for eight shapes, which the model before may have used up
    for tuned in (_output, _input_gradient, _weight_gradient):
        tuned.rows = None
    with mock.patch.multiple(linears, _Product=_TunedProduct, add_product_=_add_product_):
        yield


class Tuned:
    """A function on matrices, compiled for each of their shapes at the first number of rows that it meets.

    Other numbers of rows are those of the model's last layer, which change with every micro-batch. So the micro-batch
    must be set: `auto` would try others first.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS)
        self.rows: int | None = None

    def __call__(self, rows: int, *matrices: Tensor) -> Any:
        self.rows = self.rows or rows
        return (self.compiled if rows == self.rows else self.function)(*matrices)


@Tuned
def _output(states: Tensor, weight: Tensor) -> Tensor:
    return states @ weight.t()


@Tuned
def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    return grad @ weight


_weight_gradient = Tuned(add_product_)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    _weight_gradient(len(right), total, left, right)


class _TunedProduct(torch.autograd.Function):
    """states @ weight.T, [..., k] -> [..., n], as the plain linear layers compute it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _by_rows(_output, states, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        grad_states = _by_rows(_input_gradient, grads[0], weight) if ctx.needs_input_grad[0] else None
        return grad_states, add_weight_gradient(weight, grads[0], states) if ctx.needs_input_grad[1] else None


def _by_rows(function: Tuned, states: Tensor, weight: Tensor) -> Tensor:
    rows = states.reshape(-1, states.shape[-1])
    output: Tensor = function(len(rows), rows, weight)
    return output.view(*states.shape[:-1], -1)
