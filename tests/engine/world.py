"""Runs the trainer in several gloo processes on this machine, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.load import validate
from configs.schema import RunConfig
from tests.toy_recipe import toy_recipe


def run_world(size: int, function: Callable[..., Any], *args: Any, fresh: bool = False) -> list[Any]:
    """Call `function(*args)` on every rank of a process group of `size`; return the results by rank.

    A rank's error is raised. fresh: in processes that have imported nothing; else in forks of a process that has
    imported Megatron. On a GPU always fresh, because CUDA does not survive a fork.
    """
    import torch

    fresh = fresh or torch.cuda.is_available()
    context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
    context.set_forkserver_preload(["tests.engine.preload"])
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        shared = size, Path(folder) / "store", results, dict(os.environ), function, args
        processes = [context.Process(target=_rank, args=(rank, *shared)) for rank in range(size)]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        while len(found) < size:
            rank, error, result = results.get()
            if error:
                for process in processes:
                    process.kill()
                raise AssertionError(f"rank {rank}:\n{error}")
            found[rank] = result
        for process in processes:
            process.join()
    return [found[rank] for rank in range(size)]


def _rank(
    rank: int, size: int, store: Path, results: Any, environment: Any, function: Callable[..., Any], args: Any
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(environment)  # the fork server keeps its own from when it started
    torch.set_num_threads(1)
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(str(store), size), rank=rank, world_size=size)
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    else:
        results.put((rank, None, result))


def stored(directory: Path, step: int) -> dict[str, Any]:
    """Read every tensor of a run's checkpoint: weights, and Adam's moments under `optimizer.state.*`."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from engine.checkpoint import step_directory, verify
    from engine.megatron.torch_index import read_tensors

    path = step_directory(directory / "checkpoints", step)
    verify(path)
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    # From 0.19 on Megatron stores what is not a tensor there as well.
    return read_tensors(path, [name for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)])


def train(config: RunConfig, directory: Path, stop_after: int | None = None) -> Any:
    """Train on this rank; stop after so many calls of the stop function, which is asked once per step."""
    from engine.trainer import train as real

    calls = iter(range(1, 10**9))
    return real(config, directory, lambda: "test" if stop_after and next(calls) >= stop_after else None)


def toy_config(shards: Path, **changes: Any) -> RunConfig:
    """Configure three CLM and two MLM steps over two sources; `changes` replace whole sections, or keys in them."""
    sources = [
        {"name": name, "text": f"package://corpus/tico19_{name}.jsonl.gz", "shards": str(shards / name)}
        for name in ("en", "fr")
    ]
    settings = {
        "phases": [
            {"objective": "clm", "steps": 3, "lr": {"warmup": "1 steps"}},
            {"objective": "mlm", "steps": 2, "mask_rate": 0.3, "lr": {"shape": "1-sqrt", "final": 0.1}},
        ],
        "optimizer": {"lr": 2e-4},
        "checkpoint": {"every": "100 steps"},
    }
    return validate(RunConfig, toy_recipe(sources, settings, changes), "toy")
