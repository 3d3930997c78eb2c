"""Megatron-Core on a machine without CUDA: the one file in which CPU and GPU training differ.

`install()` gives every `megatron.core` module its own view of the name `torch`, in which factories called with
`device="cuda"` and the functions of `torch.cuda` go to the CPU. The rest of the process keeps the real torch: there,
`device="cuda"` still raises. Patched for the whole process: only `Tensor.cuda` and `Tensor.type`.
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
"""Of glibc's mallopt."""
NORM_BLOCK = 4096
"""Gradients whose squares are added up in fp32; the sums of such blocks are added up in fp64."""


def install() -> None:
    """Make Megatron-Core usable here. Does nothing where CUDA is available; call before building a model."""
    global _installed
    if torch.cuda.is_available() or _installed:
        return
    _installed = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces the lack of Transformer Engine and Apex, which is the point here
        _import_megatron()
    view = _cpu_view_of_torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
    _patch_tensor()
    _patch_random_state()
    _patch_gradient_norm()
    _keep_freed_memory()


class _Stream:
    """Stands in for torch.cuda.Stream and Event: work on a CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        return lambda *args, **kwargs: self

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None: ...


def _import_megatron() -> None:
    """Load what training uses, so that the views reach all of it; 0.19 imports its checkpoint strategies lazily."""
    # Its decorators would load Inductor, its inference engine Weights & Biases: seconds, for no use here.
    compile_, torch.compile = torch.compile, _identity
    hidden = [name for name in ("wandb", "torch.utils.tensorboard") if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # an ImportError for whoever asks
    try:
        _load_modules()
    finally:
        torch.compile = compile_
        for name in hidden:
            del sys.modules[name]


def _identity(function: Any = None, **_: Any) -> Any:
    return _identity if function is None else function


def _load_modules() -> None:
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
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    original = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        # Megatron names its gradient buckets by tensor types and knows those of CUDA alone.
        if dtype is not None:
            return original(self, dtype, non_blocking, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_


def _patch_random_state() -> None:
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        # Megatron's own warns that the CPU's state changed, which is what happens here by design.
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

    random.CudaRNGStatesTracker.fork = fork


def _patch_gradient_norm() -> None:
    clipping: Any = importlib.import_module("megatron.core.optimizer.clip_grads")

    def l2_norm(
        chunk: int, overflow: Any, lists: list[list[torch.Tensor]], per_tensor: bool
    ) -> tuple[torch.Tensor, None]:
        # Megatron's fallback adds the squares up in fp32: over millions of them the norm is off by 1e-4, and by another
        # 1e-4 in another layout. Blocks are added up in fp32 here and these sums in fp64, with no copy in fp64.
        squares = [
            torch.linalg.vector_norm(blocks, dim=-1).double().square().sum()
            for tensors in lists
            for tensor in tensors
            for blocks in _in_blocks(tensor)
        ]
        return torch.stack(squares).sum().sqrt().float()[None], None

    clipping.l2_norm_impl = l2_norm


def _in_blocks(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor as rows of NORM_BLOCK elements, and what is left over as one row."""
    flat = tensor.reshape(-1)
    whole = len(flat) // NORM_BLOCK * NORM_BLOCK
    return flat[:whole].view(-1, NORM_BLOCK), flat[whole:].view(1, -1)


def _keep_freed_memory() -> None:
    """A step frees and asks for the same memory again; glibc would give it back to the system in between, and the
    system clear it. Blocks above 32 MB, its largest threshold, go back all the same.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
