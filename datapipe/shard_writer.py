"""Writing one shard in format 2, to the same bytes every time."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.files import file_sha256, partial_path
from datapipe.manifest import Shard
from datapipe.shards import checksum
from datapipe.tar_members import BLOCK

END_BLOCKS = 2
"""Blocks of zeros that end a tar."""
SAMPLE_DOCUMENTS = 4096
"""Most documents of a sample: tar headers and padding are then few bytes per document."""
SAMPLE_BYTES = 2**20
"""Bytes of ids from which a sample is full."""


class ShardWriter:
    """Writes one tar of documents by WebDataset's `TarWriter`, which appears only when `close` is called.

    Equal documents give equal bytes, because owner, mode and time are fixed, the padding to a whole tar record is cut
    off, and nothing is compressed.

    Args:
        path: The tar.

    Raises:
        OSError: The disk refuses a write.
    """

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # imports torch, which processes that tokenize do without

        self._path, self._partial = path, partial_path(path)
        self._file = self._partial.open("wb")
        self._tar = TarWriter(self._file, user="", group="", mode=0o644, mtime=0)
        self._ids: list[NDArray[Any]] = []
        self._metadata: list[dict[str, Any]] = []
        self._marked: list[NDArray[np.bool_] | None] = []
        self._size = self._samples = self._documents = self._tokens = 0

    def add(self, ids: NDArray[Any], metadata: dict[str, Any], marked: NDArray[np.bool_] | None = None) -> None:
        """Append a document.

        Args:
            ids: `[tokens]` uint16 or uint32, without special tokens; all of the same dtype.
            metadata: JSON, with the same keys for every document.
            marked: `[tokens]`, tokens of identifiers, which are never labels.
        """
        self._ids.append(ids)
        self._metadata.append(metadata)
        self._marked.append(marked if marked is not None and marked.any() else None)
        self._size += ids.nbytes
        self._documents += 1
        self._tokens += len(ids)
        if len(self._ids) == SAMPLE_DOCUMENTS or self._size >= SAMPLE_BYTES:
            self._write_sample()

    def close(self) -> Shard:
        """Finish the tar and make it visible."""
        self._write_sample()
        size = self._tar.tarstream.offset + END_BLOCKS * BLOCK
        self._tar.close()
        self._file.truncate(size)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        shard = Shard(self._path.name, size, self._documents, self._tokens, file_sha256(self._partial))
        self._path.with_suffix(".idx").unlink(missing_ok=True)  # of a shard of format 1 that was here before
        self._partial.replace(self._path)
        return shard

    def discard(self) -> None:
        """Remove the unfinished tar."""
        with suppress(OSError):  # the disk may refuse the rest of a buffer too
            self._tar.close()
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write_sample(self) -> None:
        if not self._ids:
            return
        lengths = np.array([len(ids) for ids in self._ids], np.uint32)
        columns = {key: _column([one.get(key) for one in self._metadata]) for key in self._metadata[0]}
        described = json.dumps({"documents": len(self._ids), **columns}, ensure_ascii=False, separators=(",", ":"))
        marks: list[NDArray[np.bool_] | None] = [None] * len(self._ids)
        members: dict[str, Any] = {}
        if any(marked is not None for marked in self._marked):
            bits = [np.zeros(len(i), bool) if m is None else m for i, m in zip(self._ids, self._marked, strict=True)]
            marks, members["marked.npy"] = [*bits], np.packbits(np.concatenate(bits))
        self._tar.write(
            {
                "__key__": f"{self._path.stem}-{self._samples:06d}",
                "ids.npy": np.concatenate(self._ids),
                "lengths.npy": lengths.astype(np.uint16) if lengths.max() < 2**16 else lengths,
                "crc32.npy": np.array(list(map(checksum, self._ids, marks)), np.uint32),
                "json": described.encode("utf-8", "replace"),
                **members,
            }
        )
        self._tar.tarstream.members.clear()  # tarfile would keep the header of every member
        self._samples += 1
        self._ids, self._metadata, self._marked, self._size = [], [], [], 0


def _column(values: list[Any]) -> Any:
    """The values of a key per document: the only one, `{"from": n}` for the numbers n, n + 1, ..., or all of them."""
    first = values[0]
    if values.count(first) == len(values):
        return first
    if isinstance(first, str) and first.isascii() and first.isdigit():
        start = int(first[:18])
        if all(value == str(number) for number, value in enumerate(values, start)):
            return {"from": start}
    return values
