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
from datapipe.identifiers import with_marks
from datapipe.manifest import NAME, Shard, TokenizerIdentity
from datapipe.shards import REMEDY, ShardReader
from datapipe.store import LocalStore, Store, open_store
from datapipe.tar_members import DamagedError
from datapipe.tokenizer import Tokenizer

KEY = "data.sources"
"""The configuration key that most faults here are blamed on."""


@dataclass(frozen=True)
class SourceSummary:
    """The content of a source, by its manifest."""

    name: str
    shards: int
    documents: int
    tokens: int
    """Special tokens not counted; 0 for raw text, which is tokenized as it is read."""
    framed_tokens: int
    """The same with the special tokens around each document."""
    bytes: int
    share: float
    """Share of the training tokens, from 0 to 1."""
    problems: tuple[str, ...]
    """Damage that will be skipped, one line each; empty under `on_error: stop`."""
    contents: frozenset[str] = frozenset()
    """sha256 of each shard, where a manifest states it, and the fingerprint of the source."""


class Source:
    """Reads documents of one corpus by shard and number. Not thread-safe.

    Args:
        config: The source.
        data: The settings that all sources share.
        tokenizer: Tokenizer of the run.
        streams: Streams that read from it in this process; all streams of the run if not given.
        cancelled: When set, a wait for remote shards ends with StoreClosedError.

    Raises:
        InputError: The shards are missing, or another tokenizer made them.
        RunFailedError: A remote store does not answer.
    """

    def __init__(
        self,
        config: SourceConfig,
        data: Data,
        tokenizer: Tokenizer,
        streams: int | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self.name = config.name
        self.epochs = config.epochs
        self.skips = data.on_error == "skip"
        """Whether damaged documents are left out."""
        self._tokenizer = tokenizer
        self.store, self.shards, self.raw = _locate(config, data, tokenizer, cancelled or threading.Event())
        self.documents = tuple(shard.documents for shard in self.shards)
        """Documents per shard."""
        self.tokens = sum(shard.tokens for shard in self.shards)
        """Special tokens not counted."""
        if config.upsample is not None and self.raw:
            raise InputError(
                f"source {self.name}: upsample needs to know its tokens, and raw text is not counted yet; "
                "give the sources weights, or prepare the text with `detour prepare`",
                key=KEY,
                code="upsample-of-raw-text",
            )
        self.framed_tokens = self.tokens + tokenizer.framing_length * sum(self.documents) if self.tokens else 0
        """Tokens with the special tokens around each document; 0 for raw text."""
        self.weight = config.weight or (config.upsample or 0.0) * self.framed_tokens or 1.0
        """Share of the tokens, relative to the other sources."""
        self._open: OrderedDict[int, ShardReader | DamagedError] = OrderedDict()
        self._most_open = 2 * (streams or data.streams)  # per stream the shard it reads and the shard before
        self.reported: set[str] = set()
        """Damage that has been logged."""
        self._encoded: dict[tuple[int, int], NDArray[Any]] = {}

    @property
    def fingerprint(self) -> str:
        """Identity of the content and the order of the shards.

        For raw text it also depends on the path and the tokenizer, because no manifest says that the text is the same.
        """
        content = [f"{shard.name} {shard.documents} {shard.bytes} {shard.sha256}" for shard in self.shards]
        if self.raw:
            content += [self.store.name, self._tokenizer.sha256]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]

    def reader(self, shard: int) -> ShardReader:
        """The open reader of a shard.

        Raises:
            DamagedError: The shard is not there; again at every call.
        """
        reader = self._open.get(shard)
        if reader is None:
            reader = self._open[shard] = self._opened(shard)
            if len(self._open) > self._most_open:
                _, oldest = self._open.popitem(last=False)
                if isinstance(oldest, ShardReader):
                    oldest.close()
        self._open.move_to_end(shard)
        if isinstance(reader, DamagedError):
            raise reader.copy()
        return reader

    def _opened(self, number: int) -> ShardReader | DamagedError:
        shard = self.shards[number]
        try:
            return ShardReader(self.store.open(shard), self.path(number), self.store.index(shard))
        except DamagedError as error:
            return error

    def path(self, shard: int) -> str:
        """Path or URL of a shard."""
        return f"{self.store.name}/{self.shards[shard].name}"

    def ids(self, shard: int, document: int) -> NDArray[Any]:
        """Token ids of a document, `[tokens]`, each below the tokenizer's vocabulary size.

        Raises:
            DamagedError: The document cannot be used.
        """
        return self._document(shard, document)[0]

    def _document(self, shard: int, document: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """The ids of a document, and those that are marked, as `ShardReader.document` gives them."""
        if self.raw:
            encoded = self._encoded.pop((shard, document), None)
            raw = self._tokenizer.encode([self.reader(shard).text(document)])[0] if encoded is None else encoded
            return raw, None
        ids, marked = self.reader(shard).document(document)
        if len(ids) and int(ids.max()) >= self._tokenizer.vocab_size:
            raise DamagedError(
                f"shard {self.path(shard)}, document {document}: token id {ids.max()} is beyond the vocabulary of "
                f"{self._tokenizer.vocab_size}; prepare the shards with the model's tokenizer",
                code="id-beyond-vocabulary",
            )
        return ids, marked

    def with_special_tokens(self, shard: int, document: int) -> NDArray[np.int32]:
        """The document as the tokenizer frames it, `[tokens] int32`, by `with_marks`; empty for an empty document.

        Raises:
            DamagedError: The document cannot be used.
        """
        ids, marked = self._document(shard, document)
        if not len(ids):
            return np.empty(0, np.int32)
        start = len(self._tokenizer.prefix_ids)
        result = np.empty(len(ids) + self._tokenizer.framing_length, np.int32)
        result[:start] = self._tokenizer.prefix_ids
        result[start : start + len(ids)] = ids if marked is None else with_marks(ids.astype(np.int32), marked)
        result[start + len(ids) :] = self._tokenizer.suffix_ids
        return result

    def usable(self) -> bool:
        """Whether any document is neither empty nor damaged."""
        for shard, documents in enumerate(self.documents):
            for document in range(documents):
                with suppress(DamagedError):
                    if len(self.ids(shard, document)):
                        return True
        return False

    def encode_ahead(self, documents: Sequence[tuple[int, int]]) -> None:
        """Tokenize documents of raw text that will be read next, at once and so on all cores.

        Args:
            documents: (shard, number) of each.
        """
        texts = {}
        for shard, document in documents:
            try:
                texts[shard, document] = self.reader(shard).text(document)
            except DamagedError:  # reported when the document is read
                continue
        self._encoded.update(zip(texts, self._tokenizer.encode(list(texts.values())), strict=True))

    def check(self, vocab_size: int, scan_bytes: int) -> list[DamagedError]:
        """Check that every shard is there and whole, and return the damage.

        Every document is read if the source is local and has at most `scan_bytes`. Otherwise one document per shard is
        read, and of a remote source one document; training checks the rest as it reads.

        Args:
            vocab_size: Vocabulary of the model.
            scan_bytes: Largest source that is read whole.

        Raises:
            InputError: The ids do not fit the model, or a shard is whole and not the manifest's.
        """
        if self._tokenizer.vocab_size > vocab_size:
            raise InputError(
                f"source {self.name}: its tokenizer has ids up to {self._tokenizer.vocab_size - 1}, the model's "
                f"vocabulary ends at {vocab_size - 1}; set model.vocab_size to {self._tokenizer.vocab_size} or more",
                key="model.vocab_size",
                code="vocabulary-too-small",
            )
        local = isinstance(self.store, LocalStore)
        scan = local and not self.raw and sum(shard.bytes for shard in self.shards) <= scan_bytes
        problems = []
        for number in range(len(self.shards) if local else 1):
            try:
                problems += self._check_shard(number, scan)
            except DamagedError as error:
                problems.append(error)
        return problems

    def _check_shard(self, number: int, scan: bool) -> list[DamagedError]:
        shard, path = self.shards[number], self.path(number)
        # A scan walks through the tar itself; otherwise the index is used, as in training.
        reader = ShardReader(self.store.open(shard), path) if scan else self.reader(number)
        if scan:
            reader.close()
        if reader.bytes != shard.bytes:
            fault = "empty" if not reader.bytes else "truncated" if reader.bytes < shard.bytes else "changed"
            size = f"{reader.bytes:,} of {shard.bytes:,} bytes"
            return [DamagedError(f"shard {path} is {fault} ({size}); {REMEDY}", code=f"shard-{fault}")]
        if reader.problem:
            return [DamagedError(f"{reader.problem}; {REMEDY}", code=reader.problem.code)]
        if len(reader) != shard.documents:
            count = f"{len(reader)}, not {shard.documents} documents"
            return [DamagedError(f"shard {path} holds {count}; {REMEDY}", code="document-missing")]
        problems = []
        for document in range(shard.documents if scan else min(1, shard.documents)):
            try:
                self.ids(number, document)
            except DamagedError as error:
                problems.append(error)
        if scan and not problems:
            self._require_unchanged(shard, path, reader.spans)
        return problems

    def _require_unchanged(self, shard: Shard, path: str, spans: NDArray[np.int64]) -> None:
        """Raise InputError for a healthy shard that is not the manifest's, because nothing would be skipped."""
        with self.store.open(shard) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if digest != shard.sha256:
            raise InputError(
                f"source {self.name}: {path} was changed: its sha256 is not its manifest's; {REMEDY}",
                key=KEY,
                code="shard-changed",
            )
        index = self.store.index(shard)
        if index is not None and not np.array_equal(index, spans):
            raise InputError(
                f"source {self.name}: the .idx of shard {path} points to other documents; delete the .idx",
                key=KEY,
                code="index-mismatch",
            )

    def close(self) -> None:
        """Close every open shard and the store."""
        self.store.close()
        for reader in self._open.values():
            if isinstance(reader, ShardReader):
                reader.close()


def _locate(
    config: SourceConfig, data: Data, tokenizer: Tokenizer, cancelled: threading.Event
) -> tuple[Store, tuple[Shard, ...], bool]:
    """Store and shards that `source.shards` names, and whether the shards hold raw text."""
    try:
        store, pattern = open_store(config.shards, data, cancelled)
        manifest = store.manifest()
        shards = _raw_shards(store) if manifest is None else manifest.shards
    except InputError as error:
        raise InputError(f"source {config.name}: {error}", key=error.key or KEY, code=error.code) from None
    label = f"source {config.name}: {store.name}"
    shards = tuple(shard for shard in shards if fnmatch.fnmatchcase(shard.name, pattern))
    if not shards:
        raise InputError(f"{label} holds no shard that matches {pattern}", key=KEY, code="no-shard")
    if not sum(shard.documents for shard in shards):
        raise InputError(
            f"{label} holds no documents; prepare it again from text that has some", key=KEY, code="no-documents"
        )
    if manifest is not None and not manifest.tokenizer.is_of(tokenizer):
        raise InputError(
            f"{label} was made with tokenizer {_describe(manifest.tokenizer)}, "
            f"this run's is {_describe(TokenizerIdentity.of(tokenizer))}; set `tokenizer` to the one of the shards, "
            "or prepare them again",
            key="tokenizer",
            code="tokenizer-mismatch",
        )
    counts = [] if manifest is None else list(manifest.sources.values())
    if 0 < sum(count.get("tokens", 0) for count in counts) == sum(count.get("marked", 0) for count in counts):
        raise InputError(
            f"{label}: every token is marked as an identifier, so nothing would be learned; "
            "mend the spans or the patterns, and prepare the text again",
            key=KEY,
            code="no-label",
        )
    return store, shards, manifest is None


def _raw_shards(store: Store) -> tuple[Shard, ...]:
    """The tars of a directory without a manifest; they must hold text."""
    shards = []
    for name in store.tars():
        shard = Shard(name, 0, 0, 0, "")
        reader = ShardReader(store.open(shard), f"{store.name}/{name}")
        if not reader.raw:
            fault = reader.problem or f"{store.name} has token ids and no {NAME}, which says of which tokenizer"
            code = reader.problem.code if reader.problem else "manifest-missing"
            raise InputError(f"{fault}; make the shards with `detour prepare`", code=code)
        shards.append(Shard(name, reader.bytes, len(reader), 0, ""))
        reader.close()
    if not shards:
        raise InputError(
            f"{store.name} holds neither {NAME} nor a tar; make the shards with `detour prepare`",
            code="manifest-missing",
        )
    return tuple(shards)


def _describe(identity: TokenizerIdentity) -> str:
    return f"{identity.name} (sha256 {identity.sha256[:12]}, {identity.vocab_size} ids)"
