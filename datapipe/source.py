"""One corpus of the mixture: its shards, opened as they are needed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import Source as SourceConfig
from datapipe.manifest import NAME, Shard, TokenizerIdentity, read_manifest
from datapipe.samples import local_path
from datapipe.shards import DamagedError, ShardReader
from datapipe.tokenizer import Tokenizer

OPEN_SHARDS = 64
"""Shards of a source kept open in one process."""


@dataclass(frozen=True)
class SourceSummary:
    """What a source holds, by its manifest."""

    name: str
    shards: int
    documents: int
    tokens: int
    """Without special tokens."""
    bytes: int


class Source:
    """Documents of one corpus by shard and number."""

    def __init__(self, config: SourceConfig, tokenizer: Tokenizer) -> None:
        self.name = config.name
        self.weight = config.weight
        self._tokenizer = tokenizer
        self._directory, self.shards = _locate(config, tokenizer)
        self.documents = tuple(shard.documents for shard in self.shards)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        """Changes when the content or the order of the shards does."""
        content = "\n".join(f"{shard.name} {shard.documents} {shard.sha256}" for shard in self.shards)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def summary(self) -> SourceSummary:
        totals = (sum(getattr(shard, key) for shard in self.shards) for key in ("documents", "tokens", "bytes"))
        return SourceSummary(self.name, len(self.shards), *totals)

    def reader(self, shard: int) -> ShardReader:
        reader = self._open.get(shard)
        if reader is None:
            reader = self._open[shard] = ShardReader(self.path(shard))
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return reader

    def path(self, shard: int) -> Path:
        return self._directory / self.shards[shard].name

    def ids(self, shard: int, document: int) -> NDArray[Any]:
        """Token ids of a document, every one below the tokenizer's vocabulary size. Raises DamagedError."""
        ids = self.reader(shard).ids(document)
        if len(ids) and int(ids.max()) >= self._tokenizer.vocab_size:
            raise DamagedError(
                f"shard {self.path(shard)}, document {document}: token id {ids.max()} is beyond the vocabulary of "
                f"{self._tokenizer.vocab_size}; prepare the shards with the model's tokenizer"
            )
        return ids

    def wrapped(self, shard: int, document: int) -> NDArray[np.int32]:
        """[CLS] ids [SEP], int32; empty for an empty document. Raises DamagedError."""
        ids = self.ids(shard, document)
        if not len(ids):
            return np.empty(0, np.int32)
        result = np.empty(len(ids) + 2, np.int32)
        result[0], result[-1] = self._tokenizer.cls_id, self._tokenizer.sep_id
        result[1:-1] = ids
        return result

    def check(self, vocab_size: int, scan_bytes: int) -> None:
        """Every shard is there and whole; ids fit a model of `vocab_size`. Raises InputError.

        Every document is read where the source has at most `scan_bytes`, otherwise the first of each shard; the rest
        is checked as it is read in training.
        """
        if self._tokenizer.vocab_size > vocab_size:
            raise InputError(
                f"source {self.name}: its tokenizer has ids up to {self._tokenizer.vocab_size - 1}, the model's "
                f"vocabulary ends at {vocab_size - 1}; set model.vocab_size to {self._tokenizer.vocab_size} or more"
            )
        whole = self.summary.bytes <= scan_bytes
        for number, shard in enumerate(self.shards):
            path = self.path(number)
            remedy = "copy it again or run `detour prepare` into a new directory"
            if not path.is_file():
                raise InputError(f"source {self.name}: shard {path} is missing; {remedy}")
            if (size := path.stat().st_size) != shard.bytes:
                kind = "empty" if size == 0 else "truncated" if size < shard.bytes else "not the one of its manifest"
                raise InputError(
                    f"source {self.name}: shard {path} is {kind} ({size:,} of {shard.bytes:,} bytes); {remedy}"
                )
            reader = self.reader(number)
            if reader.problem or len(reader) != shard.documents:
                problem = reader.problem or f"shard {path} holds {len(reader)} documents, not {shard.documents}"
                raise InputError(f"source {self.name}: {problem}; {remedy}")
            for document in range(shard.documents if whole else min(1, shard.documents)):
                self.ids(number, document)


def _locate(config: SourceConfig, tokenizer: Tokenizer) -> tuple[Path, tuple[Shard, ...]]:
    """Directory and shards that `source.shards` names, checked against the run's tokenizer."""
    path = local_path(config.shards)
    key = f"source {config.name}: shards"
    directory = path if path.is_dir() or path.suffix != ".tar" else path.parent
    if not directory.is_dir():
        raise InputError(f"{key}: no directory {directory}; make it with `detour prepare`, or give the source `text`")
    if not (directory / NAME).is_file():
        raise InputError(f"{key}: {directory} has no {NAME}; make the shards with `detour prepare`")
    manifest = read_manifest(directory)
    shards = manifest.shards
    if directory != path:
        shards = tuple(shard for shard in shards if Path(shard.name).match(path.name))
        if not shards:
            raise InputError(f"{key}: no shard of {directory / NAME} matches {path.name}")
    if not sum(shard.documents for shard in shards):
        raise InputError(f"{key}: {directory} holds no documents; prepare it again from text that has some")
    if manifest.tokenizer.sha256 != tokenizer.sha256:
        raise InputError(
            f"{key}: {directory} was made with tokenizer {_describe(manifest.tokenizer)}, "
            f"this run's is {_describe(TokenizerIdentity.of(tokenizer))}; set `tokenizer` to the one of the shards, "
            "or prepare them again"
        )
    return directory, shards


def _describe(identity: TokenizerIdentity) -> str:
    return f"{identity.name} (sha256 {identity.sha256[:12]}, {identity.vocab_size} ids)"
