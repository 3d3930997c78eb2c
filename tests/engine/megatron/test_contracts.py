"""The installed Megatron, torch and Transformer Engine against what `engine/megatron` and the model rely on.

Runs before every other test, so that an upgrade fails by the name that has changed and not as a wrong loss.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import pickle
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import fp8_utils
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing import ShardedTensor, mapping
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    distributed_data_parallel,
    param_and_grad_buffer,
)
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MixedPrecisionOptimizer
from megatron.core.tensor_parallel import random
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo

from configs.schema import Optimizer
from engine.device import device
from engine.megatron import torch_index
from engine.megatron.logging import EXPECTED
from engine.megatron.optimizer import build_optimizer

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="cpu.install does nothing where CUDA is available")


def names_in(code: Callable[..., Any] | types.CodeType) -> set[str]:
    """Return the globals and attributes that a function reads, also in functions inside it."""
    code = code if isinstance(code, types.CodeType) else inspect.unwrap(code).__code__
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return {*code.co_names, *code.co_varnames}.union(*map(names_in, inner))


def arguments(function: Any) -> list[str]:
    """Return the names of a function's arguments; the original's where `engine.megatron.cpu` has replaced it."""
    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def ddp_model(alone: None) -> Any:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    return DistributedDataParallel(config, settings, torch.nn.Linear(8, 8).to(device()))


@pytest.fixture(scope="module")
def optimizer(ddp_model: Any) -> Iterator[Any]:
    yield build_optimizer([ddp_model], Optimizer(), torch.float32)


# adam.py


def test_adam_is_chosen_by_globals_of_two_modules() -> None:
    build = megatron_optimizer._get_megatron_optimizer_based_on_param_groups
    assert {"Adam", "USING_PYTORCH_OPTIMIZER", "init_state_fn", "adam_w_mode"} <= names_in(build) | constants_in(build)
    member = distrib_optimizer.DistributedOptimizer
    assert "Adam" in names_in(member.__init__)
    assert {"HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"} <= names_in(member.state_dict)
    assert "HAVE_APEX_OR_TE" in names_in(member.load_state_dict)


def constants_in(function: Any) -> set[Any]:
    """Return the texts that a function holds."""
    return {constant for constant in inspect.unwrap(function).__code__.co_consts if isinstance(constant, str)}


def test_fused_adamw_takes_a_scale_and_an_overflow_flag() -> None:
    taken = [argument.name for argument in torch.ops.aten._fused_adamw_.default._schema.arguments]
    assert taken[:6] == ["self", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"]
    keywords = ["lr", "beta1", "beta2", "weight_decay", "eps", "amsgrad", "maximize", "grad_scale", "found_inf"]
    assert taken[6:] == keywords
    assert callable(torch._fused_adamw_)


# optimizer.py


def test_an_optimizer_step_has_three_parts() -> None:
    parts = {"prepare_grads", "get_grad_norm", "step_with_ready_grads"}
    assert all(callable(getattr(ChainedOptimizer, part)) for part in parts)
    for step in (ChainedOptimizer.step, MixedPrecisionOptimizer.step):
        assert parts - {"get_grad_norm"} <= names_in(step)
    assert callable(ChainedOptimizer.scale_loss) and callable(ChainedOptimizer.reload_model_params)


def test_a_chained_optimizer_gives_its_members(optimizer: Any, ddp_model: Any) -> None:
    (member,) = optimizer.chained_optimizers
    assert arguments(member.init_state_fn) == ["opt", "config"]
    assert member.config.clip_grad == Optimizer().clip
    assert all(group["wd_mult"] in (0.0, 1.0) for group in optimizer.param_groups)
    weight = ddp_model.module.weight
    group, position = member.model_param_group_index_map[weight]
    assert member.optimizer.param_groups[group]["params"][position].numel() == weight.numel()
    assert weight.main_grad.shape == weight.shape
    assert len(member.get_parameters()) == 2


# optimizer_shards.py


def test_a_distributed_optimizer_tells_its_ranges(optimizer: Any, ddp_model: Any) -> None:
    (member,) = optimizer.chained_optimizers
    weight = ddp_model.module.weight
    assert {id(parameter) for buffer in member.buffers for parameter in buffer.params} == {
        id(parameter) for parameter in ddp_model.module.parameters()
    }
    (buffer,) = member.gbuf_ranges
    ((bucket,),) = buffer.values()
    on_this_rank = bucket["param_map"][weight]["param"]
    assert (on_this_rank.start, on_this_rank.end) == (0, weight.numel())
    states = member._get_main_param_and_optimizer_states(weight)
    assert {name: state.numel() for name, state in states.items()} == dict.fromkeys(
        ("param", "exp_avg", "exp_avg_sq"), weight.numel()
    )
    assert {"optimizer"} == member.state_dict().keys()
    assert "param_state_sharding_type" in constants_in(distrib_optimizer.DistributedOptimizer.load_state_dict)


def test_sharded_tensors() -> None:
    assert [field.name for field in fields(ShardedTensor)][:8] == [
        "key",
        "data",
        "dtype",
        "local_shape",
        "global_shape",
        "global_offset",
        "axis_fragmentations",
        "replica_id",
    ]
    assert arguments(mapping.ShardedTensorFactory.build) == ["self"]
    assert mapping.is_main_replica((0, 0, 0)) and not mapping.is_main_replica((0, 0, 1))
    assert list(nested_values({"w": 1, "v": [2]})) == [1, 2]


# ddp_timing.py, teardown.py, names.py, logging.py


def test_the_forward_pass_waits_in_finish_param_sync(ddp_model: Any) -> None:
    (group,) = ddp_model.bucket_groups
    assert arguments(type(group).finish_param_sync) == ["self", "skip_next_bucket_dispatch"]
    assert (group.param_gather_dispatched, group.param_gather_handle) == (False, None)
    assert {"param_gather_dispatched", "param_gather_handle"} <= names_in(type(group).finish_param_sync)
    assert "finish_param_sync" in names_in(DistributedDataParallel._make_forward_pre_hook)


def test_references_that_close_cycles(ddp_model: Any) -> None:
    assert len(ddp_model.grad_accs) == 2
    assert "grad_scale_func" in {field.name for field in fields(TransformerConfig)}


def test_the_layer_offset_of_a_pipeline_stage() -> None:
    offset = inspect.signature(transformer_layer.get_transformer_layer_offset)
    offset.bind("config")


@pytest.mark.parametrize("name", EXPECTED)
def test_loggers_are_named_after_modules(name: str) -> None:
    assert importlib.import_module(name).logger.name == name


# cpu.py


@on_cpu
def test_megatrons_modules_use_the_name_torch() -> None:
    for module in (param_and_grad_buffer, distributed_data_parallel, random, clip_grads, distrib_optimizer):
        assert module.torch is not torch and module.torch.cuda.current_device() == torch.device("cpu"), module


@on_cpu
def test_random_states_go_through_two_functions_and_fork() -> None:
    assert arguments(random._get_cuda_rng_state) == ["device", "clone", "graph_safe"]
    assert arguments(random._set_cuda_rng_state) == ["new_state", "device", "graph_safe"]
    tracker = random.CudaRNGStatesTracker
    assert arguments(tracker.fork) == ["self", "name"]
    assert inspect.signature(tracker.fork).parameters["name"].default == random._MODEL_PARALLEL_RNG_TRACKER_NAME
    assert {"states_", "_current_state_name"} <= names_in(tracker.fork) & vars(tracker()).keys()


@on_cpu
def test_the_gradient_norm_is_l2_norm_impl() -> None:
    assert arguments(clip_grads.l2_norm_impl)[:4] == ["chunk_size", "noop_flag", "tensor_lists", "per_tensor"]
    assert {"l2_norm_impl", "multi_tensor_applier"} <= names_in(clip_grads.get_grad_norm_fp32)


# torch_index.py


def test_storage_of_a_shard() -> None:
    assert [field.name for field in fields(_StorageInfo)][:3] == ["relative_path", "offset", "length"]


@pytest.mark.parametrize(("module", "name"), sorted(torch_index.INDEX_NAMES))
def test_names_in_an_index(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_torch_reads_an_index_of_ours(tmp_path: Path) -> None:
    shards = [
        torch_index.StoredShard("weight", (0, 0), (1, 3), (2, 3), torch.float32, "__0_0.distcp", 0, 10),
        torch_index.StoredShard("weight", (1, 0), (1, 3), (2, 3), torch.float32, "__1_0.distcp", 0, 10),
    ]
    (tmp_path / torch_index.INDEX_FILE).write_bytes(torch_index.encode_index(shards))
    torch_index.verify_index(tmp_path)
    weight: Any = torch_checkpoint.FileSystemReader(tmp_path).read_metadata().state_dict_metadata["weight"]
    assert (weight.size, weight.properties.dtype, len(weight.chunks)) == ((2, 3), torch.float32, 2)
    with pytest.raises(ValueError, match="weight"):
        torch_index.encode_index(shards[:1])


def test_the_environment_makes_torch_refuse_pickled_code(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "made"),))

    torch.save(Code(), tmp_path / "code.pt")
    with torch_index.weights_only_loading(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "code.pt", weights_only=False)
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert (tmp_path / "made").exists(), "outside the block nothing is refused"


# fp8_state.py


def transformer_engine() -> Path | None:
    """Return the folder of Transformer Engine's Python package, which cannot be imported without a GPU."""
    if "TE_PYTHON" in os.environ:
        return Path(os.environ["TE_PYTHON"]) / "transformer_engine"
    spec = importlib.util.find_spec("transformer_engine")
    return Path(spec.origin).parent if spec and spec.origin else None


@pytest.mark.skipif(transformer_engine() is None, reason="Transformer Engine is not installed")
def test_state_of_delayed_scaling() -> None:
    package = transformer_engine()
    assert package is not None
    classes = {
        node.name: node
        for file in ("module/base.py", "quantization.py")
        for node in ast.walk(ast.parse((package / "pytorch" / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    module = ast.unparse(classes["TransformerEngineBaseModule"])
    assert "def init_fp8_meta_tensors(self, recipe: Recipe)" in module
    for text in ("self.fp8_meta = {}", "'scaling_fwd'", "'scaling_bwd'", "meta['num_gemms'] = num_gemms"):
        assert text in module, text
    state = ast.unparse(classes["DelayedScalingRecipeState"])
    for text in ("scale: torch.Tensor", "amax_history: torch.Tensor"):
        assert text in state, text


def test_the_recipe_of_a_configuration() -> None:
    assert arguments(fp8_utils.get_fp8_recipe) == ["config"]


# engine/modernbert: base classes that are public but change from version to version


def test_base_classes_of_the_model() -> None:
    assert {"num_attention_heads_per_partition", "hidden_size_per_attention_head"} <= names_in(Attention.__init__)
    assert arguments(is_layer_window_attention)[:3] == ["window_size", "window_attn_skip_freq", "layer_number"]
    assert callable(LanguageModule.setup_embeddings_and_output_layer)
    assert callable(LanguageModule.shared_embedding_or_output_weight)
    assert {"pg_collection", "layer_number"} <= set(arguments(transformer_layer.TransformerLayer.__init__))


def test_gradient_buckets_and_recomputation() -> None:
    assert "bucket_size" in {field.name for field in fields(DistributedDataParallelConfig)}
    layouts = (param_and_grad_buffer, distrib_optimizer)  # where Megatron 0.16.1 and 0.19.2 lay out the buckets
    assert any('"shared_embedding"' in inspect.getsource(module) for module in layouts)
    names = {field.name for field in fields(TransformerConfig)}
    assert {"recompute_granularity", "recompute_method", "recompute_num_layers"} <= names
