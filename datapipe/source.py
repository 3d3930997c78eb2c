"""One corpus of the mixture: its shards, opened as they are needed."""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import Data
from configs.schema import Source as SourceConfig
from datapipe.manifest import NAME, Shard, TokenizerIdentity
from datapipe.shards import DamagedError, ShardReader
from datapipe.store import REMEDY, LocalStore, Store, open_store
from datapipe.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceSummary:
    """What a source holds, by its manifest."""

    name: str
    shards: int
    documents: int
    tokens: int
    """Without special tokens; 0 for raw text, which is tokenized only as it is read."""
    bytes: int
    share: float
    """Of the training tokens, from 0 to 1."""
    problems: tuple[str, ...]
    """What is damaged and will be skipped; always empty under `on_error: stop`."""


class Source:
    """Documents of one corpus by shard and number. Not thread-safe.

    streams: How many read from it in this process; all of them if not given.
    closed: When set, whoever waits for remote shards gives up. Raises InputError, and RunFailedError where a remote
    store does not answer.
    """

    def __init__(
        self,
        config: SourceConfig,
        data: Data,
        tokenizer: Tokenizer,
        streams: int | None = None,
        closed: threading.Event | None = None,
    ) -> None:
        self.name = config.name
        self.epochs = config.epochs
        self.skips = data.on_error == "skip"
        self._tokenizer = tokenizer
        self.store, self.shards, self.raw = _locate(config, data, tokenizer, closed or threading.Event())
        self.documents = tuple(shard.documents for shard in self.shards)
        self.tokens = sum(shard.tokens for shard in self.shards)
        if config.upsample is not None and self.raw:
            raise InputError(
                f"source {self.name}: upsample needs to know its tokens, and raw text is not counted yet; "
                "give the sources weights, or prepare the text with `detour prepare`"
            )
        wrapped = self.tokens + 2 * sum(self.documents)
        self.weight = config.weight or (config.upsample or 0.0) * wrapped or 1.0
        """Share of the tokens, relative to the other sources."""
        self._open: OrderedDict[int, ShardReader | DamagedError] = OrderedDict()
        self._most_open = 2 * (streams or data.streams)  # of each stream the shard it reads and the one before
        self.reported: set[str] = set()
        """What has been logged as skipped."""
        self._encoded: dict[tuple[int, int], NDArray[Any]] = {}

    @property
    def fingerprint(self) -> str:
        """Changes when the content or the order of the shards does; of raw text also when it moves or is tokenized
        otherwise, since nothing says that it is the same.
        """
        content = [f"{shard.name} {shard.documents} {shard.bytes} {shard.sha256}" for shard in self.shards]
        if self.raw:
            content += [self.store.name, self._tokenizer.sha256]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]

    def reader(self, shard: int) -> ShardReader:
        """Raises DamagedError, at every call, for a shard that is not there."""
        reader = self._open.get(shard)
        if reader is None:
            reader = self._open[shard] = self._opened(shard)
            if len(self._open) > self._most_open:
                _, oldest = self._open.popitem(last=False)
                if isinstance(oldest, ShardReader):
                    oldest.close()
        self._open.move_to_end(shard)
        if isinstance(reader, DamagedError):
            raise DamagedError(str(reader))
        return reader

    def _opened(self, shard: int) -> ShardReader | DamagedError:
        try:
            known = self.shards[shard]
            return ShardReader(self.store.open(known), self.path(shard), self.store.index(known))
        except DamagedError as error:
            return error

    def path(self, shard: int) -> str:
        return f"{self.store.name}/{self.shards[shard].name}"

    def ids(self, shard: int, document: int) -> NDArray[Any]:
        """Token ids of a document, every one below the tokenizer's vocabulary size. Raises DamagedError."""
        if self.raw:
            encoded = self._encoded.pop((shard, document), None)
            return self._tokenizer.encode([self.reader(shard).text(document)])[0] if encoded is None else encoded
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

    def usable(self) -> bool:
        """Whether any document is neither empty nor damaged."""
        for shard, documents in enumerate(self.documents):
            for document in range(documents):
                with suppress(DamagedError):
                    if len(self.ids(shard, document)):
                        return True
        return False

    def encode_ahead(self, places: Sequence[tuple[int, int]]) -> None:
        """Tokenize documents of raw text that will be read next, all at once and so on all cores."""
        texts = {}
        for shard, document in places:
            try:
                texts[shard, document] = self.reader(shard).text(document)
            except DamagedError:  # reported when it is read
                continue
        self._encoded.update(zip(texts, self._tokenizer.encode(list(texts.values())), strict=True))

    def check(self, vocab_size: int, scan_bytes: int) -> list[str]:
        """Every shard is there and whole, and ids fit a model of `vocab_size`; what is not is named.

        Every document is read where the source is local and has at most `scan_bytes`, otherwise one of each shard, and
        of a remote source one; the rest is checked as it is read in training.
        """
        if self._tokenizer.vocab_size > vocab_size:
            raise InputError(
                f"source {self.name}: its tokenizer has ids up to {self._tokenizer.vocab_size - 1}, the model's "
                f"vocabulary ends at {vocab_size - 1}; set model.vocab_size to {self._tokenizer.vocab_size} or more"
            )
        local = isinstance(self.store, LocalStore)
        whole = local and not self.raw and sum(shard.bytes for shard in self.shards) <= scan_bytes
        problems = []
        for number in range(len(self.shards) if local else 1):
            try:
                problems += self._check_shard(number, whole)
            except DamagedError as error:
                problems.append(str(error))
        return problems

    def _check_shard(self, number: int, whole: bool) -> list[str]:
        shard, path = self.shards[number], self.path(number)
        # The tar itself is walked through where there is time for it, else taken by its index as in training.
        reader = ShardReader(self.store.open(shard), path) if whole else self.reader(number)
        size, problem, found = reader.bytes, reader.problem, len(reader)
        if whole:
            reader.close()
        if size != shard.bytes:
            kind = "empty" if not size else "truncated" if size < shard.bytes else "not its manifest's"
            return [f"shard {path} is {kind} ({size:,} of {shard.bytes:,} bytes); {REMEDY}"]
        if problem or found != shard.documents:
            return [f"{problem or f'shard {path} holds {found}, not {shard.documents} documents'}; {REMEDY}"]
        problems = []
        for document in range(shard.documents if whole else min(1, shard.documents)):
            try:
                self.ids(number, document)
            except DamagedError as error:
                problems.append(str(error))
        if whole and not problems:
            self._require_unchanged(shard, path, reader.spans)
        return problems

    def _require_unchanged(self, shard: Shard, path: str, spans: NDArray[np.int64]) -> None:
        """Raises InputError where other documents would be trained on than the manifest's, and nothing be skipped."""
        with self.store.open(shard) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if digest != shard.sha256:
            raise InputError(f"source {self.name}: {path} was changed: its sha256 is not its manifest's; {REMEDY}")
        index = self.store.index(shard)
        if index is not None and not np.array_equal(index, spans):
            raise InputError(f"source {self.name}: the .idx of shard {path} points to other documents; delete the .idx")

    def close(self) -> None:
        self.store.close()
        for reader in self._open.values():
            if isinstance(reader, ShardReader):
                reader.close()


def _locate(
    config: SourceConfig, data: Data, tokenizer: Tokenizer, closed: threading.Event
) -> tuple[Store, tuple[Shard, ...], bool]:
    """Store and shards that `source.shards` names, and whether they hold raw text."""
    try:
        store, pattern = open_store(config.shards, data, closed)
        manifest = store.manifest()
        shards = _raw_shards(store) if manifest is None else manifest.shards
    except InputError as error:
        raise InputError(f"source {config.name}: {error}") from None
    where = f"source {config.name}: {store.name}"
    shards = tuple(shard for shard in shards if fnmatch.fnmatchcase(shard.name, pattern))
    if not shards:
        raise InputError(f"{where} holds no shard that matches {pattern}")
    if not sum(shard.documents for shard in shards):
        raise InputError(f"{where} holds no documents; prepare it again from text that has some")
    if manifest is not None and manifest.tokenizer.sha256 != tokenizer.sha256:
        raise InputError(
            f"{where} was made with tokenizer {_describe(manifest.tokenizer)}, "
            f"this run's is {_describe(TokenizerIdentity.of(tokenizer))}; set `tokenizer` to the one of the shards, "
            "or prepare them again"
        )
    return store, shards, manifest is None


def _raw_shards(store: Store) -> tuple[Shard, ...]:
    """The tars of a directory without a manifest, provided that they hold text."""
    shards = []
    for name in store.tars():
        shard = Shard(name, 0, 0, 0, "")
        reader = ShardReader(store.open(shard), f"{store.name}/{name}")
        if not reader.raw:
            problem = reader.problem or f"{store.name} has token ids and no {NAME}, which says of which tokenizer"
            raise InputError(f"{problem}; make the shards with `detour prepare`")
        shards.append(Shard(name, reader.bytes, len(reader), 0, ""))
        reader.close()
    if not shards:
        raise InputError(f"{store.name} holds neither {NAME} nor a tar; make the shards with `detour prepare`")
    return tuple(shards)


def _describe(identity: TokenizerIdentity) -> str:
    return f"{identity.name} (sha256 {identity.sha256[:12]}, {identity.vocab_size} ids)"
