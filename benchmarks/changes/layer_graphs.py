"""CUDA graphs of the local layers: the host launches one graph instead of each kernel.

A graph repeats kernels on the same memory. A local layer can be one, because its kernels hold no number of the host: T
is the same in every micro-batch, and documents and dropout are tensors. Global layers depend on the longest document.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from megatron.core.distributed import distributed_data_parallel
from torch import Tensor

from engine.modernbert.attention import PackedDocuments
from engine.modernbert.layers import ModernBertLayer
from engine.modernbert.linears import takes_plain_linears


@contextmanager
def graphs_of_local_layers() -> Iterator[None]:
    """Replay graphs of local layers in training in this context.

    Micro-batches of a shape run without a graph until one has come to its backward pass: kernels are compiled then, and
    libraries have allocated what they keep. A micro-batch holds its graph until its backward pass, so a pipeline has as
    many graphs of a layer as micro-batches in flight.
    """
    free: dict[Any, list[LayerGraph]] = {}
    ordinary = ModernBertLayer.forward

    def forward(layer: ModernBertLayer, hidden_states: Any, **more: Any) -> Any:
        packed, rotary = more["packed_seq_params"], more["rotary_pos_emb"]
        states = hidden_states if isinstance(hidden_states, tuple) else (hidden_states,)
        if not _can_be_graph(layer, states[0]):
            return ordinary(layer, hidden_states, **more)
        needs_grad = tuple(tensor.requires_grad for tensor in states)
        key = (layer, states[0].shape, packed.causal, packed.dropout is None, needs_grad)
        if key not in free:
            output, context = ordinary(layer, hidden_states, **more)

            def finish(_grad: Tensor) -> None:
                free.setdefault(key, [])

            (output[-1] if isinstance(output, tuple) else output).register_hook(finish)
            return output, context
        _wait_for_weights(layer)
        inputs = (rotary, packed.documents, *([packed.dropout.keys] if packed.dropout else []), *states)
        graph = free[key].pop() if free[key] else LayerGraph(ordinary, layer, inputs, packed)
        outputs = _Replay.apply(graph, free[key], *inputs, *graph.weights)
        return (outputs if layer.gives_summands else outputs[0]), None

    with mock.patch.object(ModernBertLayer, "forward", forward):
        yield


def _can_be_graph(layer: ModernBertLayer, states: Tensor) -> bool:
    plain = takes_plain_linears(layer.config) and layer.config.recompute_granularity is None
    return _on_gpu(states) and layer.self_attention.is_local and torch.is_grad_enabled() and plain


def _wait_for_weights(layer: ModernBertLayer) -> None:
    """Wait until other data-parallel ranks have sent the weights, in Megatron's hooks, which a replay does not call."""
    for module in layer.modules():
        for hook in module._forward_pre_hooks.values():  # noqa: SLF001
            if inspect.getmodule(hook) is distributed_data_parallel:
                hook(module, ())


def _on_gpu(states: Tensor) -> bool:
    return states.is_cuda


class LayerGraph:
    """The graphs of a layer's forward and backward pass, and the memory that they read and write.

    Args:
        ordinary: The layer's forward pass.
        layer: A local layer.
        inputs: RoPE's cosines and sines [2, 2, T, d], the documents [T], with dropout its keys [T], and one or two
            residual states [T, 1, h].
        packed: Parameters of the micro-batch.
    """

    def __init__(
        self, ordinary: Any, layer: ModernBertLayer, inputs: tuple[Tensor, ...], packed: PackedDocuments
    ) -> None:
        self.weights = [weight for weight in layer.parameters() if weight.requires_grad]
        self.inputs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
        rotary, documents, *states = self.inputs
        dropout = replace(packed.dropout, keys=states.pop(0)) if packed.dropout else None
        static = replace(packed, documents=documents, dropout=dropout, queries=None, _masks={})
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        aliases = {weight: _alias(weight) for weight in self.weights}
        with ExitStack() as stack:
            for module in layer.modules():
                own = {name: aliases[weight] for name, weight in module.named_parameters(recurse=False)}
                stack.enter_context(mock.patch.dict(module._parameters, own))  # noqa: SLF001
            # Another thread prepares the next batch on the GPU meanwhile.
            stack.enter_context(torch.cuda.graph(self.forward, capture_error_mode="thread_local"))
            output, _ = ordinary(
                layer,
                tuple(states) if len(states) == 2 else states[0],
                rotary_pos_emb=rotary,
                packed_seq_params=static,
            )
        self.outputs: tuple[Tensor, ...] = output if isinstance(output, tuple) else (output,)
        self.grad_outputs = [torch.empty_like(tensor) for tensor in self.outputs]
        needed = [tensor for tensor in (*self.inputs, *aliases.values()) if tensor.requires_grad]
        with torch.cuda.graph(self.backward, pool=self.forward.pool(), capture_error_mode="thread_local"):
            grads = torch.autograd.grad(self.outputs, needed, self.grad_outputs)
        self.adds_itself = [weight for weight, alias in aliases.items() if alias.grad_added_to_main_grad]
        found = iter(grads)
        self.grads = [next(found) if tensor.requires_grad else None for tensor in (*self.inputs, *self.weights)]


def _alias(weight: Any) -> Any:
    """Return a tensor with the weight's memory that autograd does not know.

    Megatron has made the weight's node in autograd on the ordinary stream, and a backward pass that reached the node
    would make that stream wait for the one that is captured, which ends the capture.
    """
    alias: Any = weight.detach().requires_grad_()
    if hasattr(weight, "main_grad"):
        alias.main_grad = weight.main_grad
    alias.grad_added_to_main_grad = False
    return alias


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: LayerGraph, free: list[LayerGraph], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.graph, ctx.free = graph, free
        for static, tensor in zip(graph.inputs, tensors, strict=False):
            static.detach().copy_(tensor)
        graph.forward.replay()
        return tuple(tensor.detach() for tensor in graph.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        graph: LayerGraph = ctx.graph
        for static, grad in zip(graph.grad_outputs, grads, strict=True):
            static.copy_(grad)
        graph.backward.replay()
        for weight in graph.adds_itself:
            weight.grad_added_to_main_grad = True
        ctx.free.append(graph)
        return None, None, *(grad if grad is None else grad.detach() for grad in graph.grads)
