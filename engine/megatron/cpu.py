"""Megatron-Core on a machine without CUDA: the one file in which CPU and GPU training differ.

`install()` gives each `megatron.core` module its own view of the name `torch`. In that view, factories called with
`device="cuda"` and the functions of `torch.cuda` work on the CPU. The rest of the process keeps the real torch, where
`device="cuda"` still raises. Only `Tensor.cuda` and `Tensor.type` are patched for the whole process.

Written for Megatron 0.16.1 and 0.19.2. Each patched name is replaced by `_replace`, which raises if it is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import pkgutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "as_tensor")
_installed = False
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt, from malloc.h."""
NORM_BLOCK = 4096
"""Number of gradients whose squares are summed in fp32; sums of such blocks are summed in fp64."""


def install() -> None:
    """Make Megatron-Core usable without CUDA. Call before building a model; does nothing where CUDA is available."""
    global _installed
    if torch.cuda.is_available() or _installed:
        return
    _installed = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron warns that Transformer Engine and Apex are absent
        _import_megatron()
    view = _cpu_view_of_torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
    _patch_tensor()
    _patch_random_state()
    _patch_gradient_norm()
    _keep_freed_memory()


def _replace(owner: Any, name: str, function: Any) -> None:
    """Replace a function of a foreign module or class and keep the original as `__wrapped__`.

    Raises AttributeError if the name is gone.
    """
    function.__wrapped__ = getattr(owner, name)
    setattr(owner, name, function)


class _Stream:
    """Stands in for torch.cuda.Stream and torch.cuda.Event: a CPU works in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        return lambda *args, **kwargs: self

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None: ...


def _import_megatron() -> None:
    """Import all modules that training uses, so that each gets its view of torch.

    Meanwhile `torch.compile` does nothing and two packages seem absent: Megatron's decorators would load Inductor, and
    its inference engine Weights & Biases, which takes seconds and serves nothing here.
    """
    compile_ = torch.compile
    torch.compile = _identity  # type: ignore[assignment]
    hidden = [name for name in ("wandb", "torch.utils.tensorboard") if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        _load_modules()
    finally:
        torch.compile = compile_
        for name in hidden:
            del sys.modules[name]


def _identity(function: Any = None, **_: Any) -> Any:
    return _identity if function is None else function


def _load_modules() -> None:
    """Import the modules by name. Megatron 0.19.2 imports its checkpoint strategies lazily."""
    for name in ("distributed", "optimizer", "pipeline_parallel", "models.gpt.gpt_model", "timers"):
        importlib.import_module(f"megatron.core.{name}")
    checkpointing = importlib.import_module("megatron.core.dist_checkpointing")
    for module in pkgutil.walk_packages(checkpointing.__path__, checkpointing.__name__ + "."):
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)


def _cpu_view_of_torch() -> types.ModuleType:
    view = types.ModuleType("torch")
    view.__dict__.update(torch.__dict__)

    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return wrapper

    for name in _FACTORIES:
        setattr(view, name, on_cpu(getattr(torch, name)))

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    cuda.__dict__.update(
        current_device=lambda: _CPU,
        synchronize=nothing,
        empty_cache=nothing,
        set_device=nothing,
        current_stream=lambda *args, **kwargs: _Stream(),
        default_stream=lambda *args, **kwargs: _Stream(),
        Stream=_Stream,
        Event=_Stream,
        stream=lambda stream=None: contextlib.nullcontext(),
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=lambda seed: torch.default_generator.manual_seed(int(seed)),
    )
    view.cuda = cuda  # type: ignore[attr-defined]
    return view


def _patch_tensor() -> None:
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    original = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        # Megatron names its gradient buckets by tensor type and knows CUDA's types only.
        if dtype is not None:
            return original(self, dtype, non_blocking, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    _replace(torch.Tensor, "type", type_)


def _patch_random_state() -> None:
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        # Megatron's own `fork` warns that the state of the CPU's generator has changed, which is intended here.
        before, outer = torch.get_rng_state(), self._current_state_name
        if outer != "default-rng":
            self.states_[outer] = before
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)
            self._current_state_name = outer

    _replace(random, "_get_cuda_rng_state", get_state)
    _replace(random, "_set_cuda_rng_state", set_state)
    _replace(random.CudaRNGStatesTracker, "fork", fork)


def _patch_gradient_norm() -> None:
    clipping: Any = importlib.import_module("megatron.core.optimizer.clip_grads")

    def l2_norm(
        chunk: int, overflow: Any, lists: list[list[torch.Tensor]], per_tensor: bool
    ) -> tuple[torch.Tensor, None]:
        squares = [squared_norm(tensor) for tensors in lists for tensor in tensors]
        return torch.stack(squares).sum().sqrt().float()[None], None

    _replace(clipping, "l2_norm_impl", l2_norm)


def squared_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squares in fp64.

    torch and Megatron's fallback sum all squares in fp32 on a CPU: the norm of millions of gradients is off, by an
    amount that depends on the layout. Here blocks are summed in fp32 and their sums in fp64, without a copy.
    """
    rows, rest = (torch.linalg.vector_norm(blocks, dim=-1).double().square().sum() for blocks in _in_blocks(tensor))
    return rows + rest


def _in_blocks(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a tensor into rows of NORM_BLOCK elements, and one row of the remaining elements."""
    flat = tensor.reshape(-1)
    remainder = len(flat) // NORM_BLOCK * NORM_BLOCK
    return flat[:remainder].view(-1, NORM_BLOCK), flat[remainder:].view(1, -1)


def _keep_freed_memory() -> None:
    """Keep glibc from returning freed memory to the system, because each step allocates the same memory again.

    The system would have to clear it each time. Blocks above 32 MB, the largest threshold, are returned all the same.
    """
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
