"""Shard sets made from drawn documents, through the real files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from datapipe.manifest import Manifest, Shard, TokenizerIdentity, file_sha256, write_manifest
from datapipe.shards import TAR_END, npy_bytes, tar_member
from datapipe.tokenizer import Tokenizer, load_tokenizer

settings.register_profile("detour", deadline=None)
settings.load_profile("detour")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("package://tokenizer/modernbert")


def write_shards(directory: Path, shards: Sequence[Sequence[Sequence[int]]], tokenizer: Tokenizer) -> Path:
    """A shard set holding exactly these documents: shards x documents x token ids."""
    directory.mkdir(parents=True)
    entries = []
    for number, documents in enumerate(shards):
        path = directory / f"{number:06d}.tar"
        members = [
            tar_member(f"{i:06d}.ids.npy", npy_bytes(np.array(ids, np.uint16))) for i, ids in enumerate(documents)
        ]
        path.write_bytes(b"".join(members) + TAR_END)
        tokens = sum(len(ids) for ids in documents)
        entries.append(Shard(path.name, path.stat().st_size, len(documents), tokens, file_sha256(path)))
    write_manifest(directory, Manifest(TokenizerIdentity.of(tokenizer), tuple(entries)))
    return directory
