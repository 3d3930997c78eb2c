"""Tars and arrays as bytes, for shards that no writer would make."""

from __future__ import annotations

import io
import tarfile

import numpy as np

TAR_END = bytes(1024)


def tar_member(name: str, content: bytes) -> bytes:
    """Header, content and padding of a regular file."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def npy_bytes(array: np.ndarray) -> bytes:
    """A .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
