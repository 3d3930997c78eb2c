"""`detour doctor`: the abilities of this machine, and remedies for what is wrong."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError, RunFailedError
from configs.versions import version_of


@dataclass(frozen=True)
class Finding:
    """One fact about this machine."""

    subject: str
    text: str
    remedy: str | None = None
    """The command or step that mends it; None: nothing is wrong."""


def examine() -> Iterator[Finding]:
    """Yield findings on packages, devices, memory, Ray and data, each as soon as it is known."""
    for check in (_versions, _devices, _precision, _attention, _gpu_packages, _memory, _ray, _shards):
        yield from check()


def _versions() -> list[Finding]:
    packages = [f"{name} {version_of(name)}" for name in ("torch", "megatron-core", "ray", "transformers")]
    return [Finding("versions", f"Python {platform.python_version()}, {', '.join(packages)}")]


def _devices() -> list[Finding]:
    import torch

    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return [Finding("devices", f"{len(names)} GPU: {', '.join(names)}; {cores}")]
    if Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi"):
        return [
            Finding(
                "devices",
                f"an NVIDIA driver, but this torch ({torch.__version__}) sees no GPU; {cores}",
                "install a CUDA build of torch that fits the driver (nvidia-smi shows its CUDA version)",
            )
        ]
    return [Finding("devices", f"no GPU; {cores}")]


def _precision() -> list[Finding]:
    import torch

    from configs.load import load_config
    from engine.precision import FP8_PAYS_FROM, resolve_precision

    usual, large = (resolve_precision(load_config("demo"), size) for size in (0, FP8_PAYS_FROM))
    more = f", {large} from a billion parameters" if large != usual else ""
    findings = [Finding("precision", f"auto is {usual} here{more}")]
    try:
        resolve_precision(load_config("demo", ["precision=fp8"]), 0)
        findings.append(Finding("fp8", "available"))
    except InputError as error:
        reason = str(error).removeprefix("precision: ")
        fixable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
        findings.append(Finding("fp8", f"not available: {reason.split(';')[0]}", _gpu_extra() if fixable else None))
    return findings


def _attention() -> list[Finding]:
    import torch

    from engine import device

    if not torch.cuda.is_available():
        return [Finding("attention", "CPU: by window in local layers, by document in global ones")]
    findings = []
    if lacking := device.kernels_lack():
        remedy = f"apt-get install {lacking}: Triton compiles the launchers of its kernels"
        findings = [
            Finding("kernels", "norms, RoPE, the GELU gate and local attention run in torch's operations", remedy)
        ]
    kernels = ["torch varlen (FlashAttention-2)"] if importlib.util.find_spec("torch.nn.attention.varlen") else []
    kernels += ["Transformer Engine"] if importlib.util.find_spec("transformer_engine") else []
    kernels += ["FlashAttention-3"] if importlib.util.find_spec("flash_attn_interface") else []
    text = ", ".join(kernels) or "none for packed sequences"
    return [Finding("attention", text, None if kernels else _gpu_extra()), *findings]


def _gpu_packages() -> list[Finding]:
    import torch

    if importlib.util.find_spec("transformer_engine") is None:
        return [Finding("te", "Transformer Engine not installed", _gpu_extra())] if torch.cuda.is_available() else []
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a build for another torch fails in many ways
        remedy = "pip uninstall transformer-engine transformer-engine-torch" + (
            ", then reinstall it against this torch" if torch.cuda.is_available() else ": there is no GPU for it here"
        )
        return [Finding("te", f"Transformer Engine is installed but broken: {error}".splitlines()[0], remedy)]
    return [Finding("te", f"Transformer Engine {version_of('transformer-engine')}")]


def _memory() -> list[Finding]:
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    text = f"{memory.available / 1e9:.0f} GB free of {memory.total / 1e9:.0f}; disk here {disk.free / 1e9:.0f} GB free"
    remedy = None
    if shared < 512 * 2**20:
        remedy = "/dev/shm has less than 512 MB free, which Ray needs: in Docker, add --shm-size=1g"
    elif disk.free < 2e9:
        remedy = "free some disk space: a run needs room for its checkpoints"
    return [Finding("memory", text, remedy)]


def _ray() -> list[Finding]:
    import ray

    from launcher.cluster import connect, is_joined
    from launcher.nodes import alive_nodes

    cluster = f"cluster at {os.environ['RAY_ADDRESS']}" if is_joined() else "local"
    try:
        with connect(local_workers=1):
            nodes = alive_nodes()
            ray.get(ray.remote(num_cpus=0)(lambda: None).remote())
    except InputError as error:  # the cluster cannot be joined; the message names the variable and the remedy
        return [Finding("ray", cluster, str(error))]
    except Exception as error:  # any error is a finding
        remedy = "check RAY_ADDRESS" if is_joined() else "see the logs in /tmp/ray/session_latest/logs"
        return [Finding("ray", f"{cluster}: {error}".splitlines()[0], remedy)]
    total = f"{sum(node.cpus for node in nodes)} CPUs, {sum(node.gpus for node in nodes)} GPUs"
    return [Finding("ray", f"{cluster}, {len(nodes)} node{'s' * (len(nodes) != 1)}, {total}")]


def _shards() -> list[Finding]:
    """Check the data of the recipe that `detour-train` would take here."""
    from configs.load import load_config
    from datapipe.loader import check_sources
    from datapipe.manifest import NAME as MANIFEST
    from datapipe.paths import local_path
    from datapipe.tokenizer import load_tokenizer

    try:
        config = load_config(None)
        tokenizer = load_tokenizer(config.tokenizer)
        findings = []
        for source in config.data.sources:
            if source.text and not (local_path(source.shards) / MANIFEST).is_file():
                findings.append(Finding("shards", f"{source.name}: prepared at the first `detour-train {config.name}`"))
            else:
                data = config.data.model_copy(update={"sources": (source,)})
                (summary,) = check_sources(data, tokenizer, tokenizer.vocab_size)
                findings.append(Finding("shards", f"{source.name}: {summary.documents:,} documents, whole"))
        return findings
    except (InputError, RunFailedError) as error:  # RunFailedError: a store does not answer
        return [Finding("shards", "not usable", str(error))]


def _gpu_extra() -> str:
    return f"{Path(sys.executable).name} -m pip install --no-build-isolation 'detour-train[gpu]' (README: On GPUs)"
