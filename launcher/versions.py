"""Versions of Detour and of the packages that decide what a run computes."""

from __future__ import annotations

from importlib import metadata


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
