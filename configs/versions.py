"""Versions of Detour and of the packages that decide what a run computes, and the identity of Detour's own files."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
"""Directory of Detour's packages: site-packages, or the source tree of an editable installation."""
PACKAGES = ("configs", "datapipe", "engine", "launcher", "monitoring", "studies")
SUFFIXES = (".py", ".json", ".yaml")
"""Endings of the files that decide what a process does."""
COMPARED = ("torch", "megatron-core", "ray", "numpy", "transformers", "tokenizers", "triton", "transformer-engine")
"""Distributions of which all workers of a run need the same version."""
DIGITS = 12
"""Hexadecimal digits of a short hash."""


def version_line() -> str:
    """Name Detour's version, and those of torch, Megatron-Core and Ray."""
    packages = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "megatron-core", "ray"))
    return f"detour-train {version_of('detour-train')} ({packages})"


def version_of(package: str) -> str:
    """Version of an installed distribution, or `missing`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


@cache
def software() -> dict[str, str]:
    """Describe the software of this process, as labels of `detour_run_info`, report and model card show it."""
    return {
        "version": version_of("detour-train"),
        "commit": _commit(),
        "code": _short_hash(json.dumps(own_code(), sort_keys=True).encode()),
        "python": platform.python_version(),
        "torch": version_of("torch"),
        "megatron": version_of("megatron-core"),
        "ray": version_of("ray"),
    }


def compared_versions() -> dict[str, str]:
    """Return the version of Python and of each distribution in COMPARED."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in COMPARED}


@cache
def own_code() -> dict[str, str]:
    """`code_files` as this process first found them, because its modules were imported from those."""
    return code_files()


def code_files() -> dict[str, str]:
    """Map each file of Detour's packages to a short hash of its content now. Paths are relative to HOME."""
    files = [path for package in PACKAGES for path in (HOME / package).rglob("*") if path.suffix in SUFFIXES]
    return {
        path.relative_to(HOME).as_posix(): _short_hash(path.read_bytes())
        for path in sorted([*files, HOME / "detour_train.py"])
        if path.is_file()
    }


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _commit() -> str:
    """Return the git commit of a source tree, with `-dirty` where files were changed, or of a wheel built by pip."""
    if (HOME / ".git").exists():
        command = ["git", "-C", str(HOME), "describe", "--always", "--dirty", "--exclude=*", f"--abbrev={DIGITS}"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or the tree belongs to another user
            return "unknown"
    try:
        origin = json.loads(metadata.distribution("detour-train").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return "unknown"
    return str(origin.get("vcs_info", {}).get("commit_id", "unknown"))[:DIGITS]
