"""The changes that only a GPU can judge compute what the engine computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.mlp import MLPSubmodules
from torch import Tensor

from configs.schema import RunConfig
from engine.modernbert.layers import GatedMLP
from engine.modernbert.linears import PlainColumnLinear, PlainRowLinear
from engine.modernbert.model import transformer_config
from monitoring.log import read_metrics
from tests.engine.recorded_graph import RecordedGraph, record
from tests.engine.test_kernels import DEVICE, ON_GPU, near
from tests.engine.test_parity import build
from tests.engine.world import run_world, stored, toy_config, train

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("alone")

from benchmarks.changes import CHANGES, geglu_products, layer_graphs, residual_products, tuned_products  # noqa: E402
from benchmarks.changes.geglu_products import FusedMLP  # noqa: E402

DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # Triton's interpreter multiplies no BF16


def mlp(kind: type, hidden: int, width: int) -> GatedMLP:
    config = transformer_config(
        build(hidden_size=hidden, intermediate_size=width)[2], dtype=torch.bfloat16, gradient_accumulation_fusion=True
    )
    torch.manual_seed(0)
    layer = kind(config, MLPSubmodules(linear_fc1=PlainColumnLinear, linear_fc2=PlainRowLinear)).to(DEVICE, DTYPE)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.2)
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device=DEVICE), False
    return layer


def passes(layer: GatedMLP, tokens: tuple[int, ...], drop: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Outputs and the input's gradients of micro-batches, and both weights' sums of gradients."""
    torch.manual_seed(1)
    results = []
    for count in tokens:
        states = torch.randn(count, 1, 192, dtype=DTYPE, device=DEVICE, requires_grad=True)
        output, bias = layer(states, drop)
        output.backward(torch.randn_like(output))
        assert bias is None
        results += [output, states.grad]
    assert all(weight.grad_added_to_main_grad for weight in layer.parameters())
    return [*results, *(weight.main_grad for weight in layer.parameters())]


def all_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        near(one, other.cpu(), 1e-2 if ON_GPU else 1e-5)


@pytest.mark.parametrize("drop", [None, partial(torch.mul, 2.0)])
def test_geglu_in_products(drop: Callable[[Tensor], Tensor] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes have edges inside the tiles of every axis."""
    if not ON_GPU:
        for kernel in (geglu_products._linear_and_gate, geglu_products._gate_gradient):
            monkeypatch.setattr(kernel, "configs", kernel.configs[:1])  # the interpreter times nothing
    all_near(*(passes(mlp(kind, 192, 136), (128, 200), drop) for kind in (FusedMLP, GatedMLP)))


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_products_by_shape() -> None:
    """The second micro-batch has fewer rows, as the model's last layer has."""
    layer = partial(mlp, GatedMLP, 192, 136)
    expected = passes(layer(), (128, 40, 128))
    with tuned_products.by_shape():
        all_near(passes(layer(), (128, 40, 128)), expected)
    for tuned in (tuned_products._output, tuned_products._input_gradient, tuned_products._weight_gradient):
        assert tuned.rows == 128


def _leaves(nodes: list[Any]) -> set[int]:
    """Return the ids of the leaves that a backward pass from these nodes reaches."""
    seen, found = set(), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {id(node.variable)} if hasattr(node, "variable") else set()
            nodes += [following for following, _ in node.next_functions]
    return found


def _train_plainly(config: RunConfig, directory: Path, change: str | None) -> int:
    """Train with plain linear layers, with a change or without; return how often a graph was replayed."""
    from engine import build
    from engine.modernbert import layers

    bare, config_of, replays = build.ModernBert, build.transformer_config, 0

    class LayerGraph(layer_graphs.LayerGraph):
        def __init__(self, ordinary: Any, layer: Any, *more: Any) -> None:
            super().__init__(ordinary, layer, *more)
            reached = _leaves([tensor.grad_fn for tensor in self.outputs])
            assert len(reached) > len(self.weights) and not reached & set(map(id, layer.parameters()))

    class Graph(RecordedGraph):
        def replay(self) -> None:
            nonlocal replays
            replays += 1
            super().replay()

    with ExitStack() as stack:
        for owner, name, value in (
            (build, "ModernBert", lambda *args, **more: bare(*args, **{**more, "transformer_engine": True})),
            (
                build,
                "transformer_config",
                lambda *args, **more: config_of(*args, **{**more, "gradient_accumulation_fusion": True}),
            ),
            (layers, "takes_plain_linears", lambda config: True),
            (layer_graphs, "takes_plain_linears", lambda config: True),
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "graph", record),
            (layer_graphs, "_on_gpu", lambda states: True),
            (layer_graphs, "LayerGraph", LayerGraph),
            (build, "BUCKET_PARAMETERS", 1),  # each weight has a bucket, which its module waits for
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        if change == "graphs":
            stack.enter_context(layer_graphs.graphs_of_local_layers())
        elif change == "residuals":
            kernel = residual_products._linear_and_add
            stack.enter_context(mock.patch.object(kernel, "configs", kernel.configs[:1]))
            stack.enter_context(residual_products.residuals_in_products())
        train(config, directory, None)
    return replays


@pytest.fixture(scope="module")
def toy(shards: Path) -> RunConfig:
    """Causal and bidirectional steps of two micro-batches each; in the latter the last layer computes labels alone."""
    return toy_config(
        shards,
        model={"num_hidden_layers": 4},
        data={"sequence_length": 64},
        batch={"sequences": 4, "micro": 2},
        phases=[{"objective": "clm", "steps": 3}, {"objective": "mlm", "steps": 2}],
    )


@pytest.fixture(scope="module")
def plain(toy: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    run_world(1, _train_plainly, toy, directory, None)
    return directory


@pytest.mark.skipif(ON_GPU, reason="the stand-in for a graph is for a CPU")
@pytest.mark.parametrize(
    ("pipeline", "dropout", "replays"),
    [(1, 0.0, [2 * 2 * (5 + 3)]), (1, 0.1, [2 * 2 * (2 + 1)] * 2), (2, 0.0, [2 * (4 + 2), 2 * (5 + 3)])],
    ids=["one rank", "two data-parallel ranks with dropout", "two pipeline stages"],
)
def test_graphs_of_local_layers(
    pipeline: int, dropout: float, replays: list[int], toy: RunConfig, plain: Path, tmp_path: Path
) -> None:
    """The same losses, gradient norms and weights to the bit, with graphs replayed forward and backward.

    Layers 2 and 3 of 4 are local. The first micro-batch of an objective has no graph, in the first of two stages the
    first two, because both are in flight.
    """
    rates = {"mlp_dropout": dropout, "attention_output_dropout": dropout}
    layout = toy.parallel.model_copy(update={"pipeline": pipeline})
    config = toy.model_copy(update={"parallel": layout, "model": toy.model.model_copy(update=rates)})
    found, expected, world = tmp_path / "graphs", plain, len(replays)
    found.mkdir()
    if world > 1:
        expected = tmp_path / "plain"
        expected.mkdir()
        run_world(world, _train_plainly, config, expected, None)
    assert run_world(world, _train_plainly, config, found, "graphs") == replays
    for line, other in zip(read_metrics(found), read_metrics(expected), strict=True):
        assert (line["loss"], line["grad_norm"]) == (other["loss"], other["grad_norm"])
    expected_weights = stored(expected, 5)
    assert all(torch.equal(tensor, expected_weights[name]) for name, tensor in stored(found, 5).items())


@pytest.mark.skipif(ON_GPU, reason="one tiling alone, in fp32")
def test_residual_sums_in_products(toy: RunConfig, plain: Path, tmp_path: Path) -> None:
    run_world(1, _train_plainly, toy, tmp_path, "residuals")
    for line, expected in zip(read_metrics(tmp_path), read_metrics(plain), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    expected_weights = stored(plain, 5)
    assert all((tensor - expected_weights[name]).abs().max() < 1e-5 for name, tensor in stored(tmp_path, 5).items())


def _names_of_rows() -> tuple[list[str], list[str]]:
    """Return the names of the benchmark's rows, and those announced, where a step takes 100 ms with every change."""
    from benchmarks import gpu

    def measured(name: str, step: Callable[[], float]) -> float:
        return 100.0 if "FP8" in name else step()  # which needs Transformer Engine: test_fp8_casts.py enters it

    with mock.patch.multiple(gpu, measured=measured, milliseconds=lambda config, quick: 100.0):
        rows = [row.name for row in gpu.changes_rows(Path(), quick=True)]
    return rows, [name for name, *_ in gpu.predicted_changes()]


def test_the_benchmark_measures_each_change() -> None:
    ((rows, announced),) = run_world(1, _names_of_rows)
    assert rows == announced and len({name.partition(":")[0] for name in rows}) == len(CHANGES)
