"""Shard sets made from drawn documents, through the real files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from configs.errors import InputError
from configs.files import file_sha256
from datapipe.manifest import Manifest, Shard, TokenizerIdentity, write_manifest
from datapipe.tokenizer import Tokenizer, load_tokenizer
from tests.datapipe.tars import TAR_END, npy_bytes, tar_member

settings.register_profile("detour", deadline=None)
settings.load_profile("detour")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("package://tokenizer/modernbert")


@contextmanager
def refused(code: str, names: str = "", key: str | None = None) -> Iterator[None]:
    """The block ends in an InputError of this code, whose message names `names` and which blames `key`."""
    with pytest.raises(InputError) as error:
        yield
    assert error.value.code == code, str(error.value)
    assert names in str(error.value)
    assert key is None or error.value.key == key


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
