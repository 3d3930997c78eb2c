"""`manifest.json`: the shards of a set and the tokenizer that made them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import file_sha256, write_json
from datapipe.paths import local_path
from datapipe.tokenizer import Tokenizer, load_tokenizer

NAME = "manifest.json"
FORMAT_VERSION = 2
"""Format of the shards that are written: many documents to a sample."""
FORMATS_READ = (1, 2)
KEPT = ("documents", "tokens", "bytes", "longest", "spans", "marked", "compared", "near held-out")
"""Counts of a source that are no reasons to leave documents out: `bytes` of their text, tokens of the `longest`,
`spans` of identifiers and their `marked` tokens, documents `compared` with held-out ones, and those near one."""
_PLAIN_TAR_NAME = re.compile(r"[^./\0][^/\0]*\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One tar of a shard set."""

    name: str
    """File name; the file lies beside the manifest."""
    bytes: int
    documents: int
    tokens: int
    """Special tokens not counted."""
    sha256: str
    """Hexadecimal, of the whole file."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """The facts by which a run recognises the tokenizer of its shards."""

    name: str
    """The reference it was loaded by."""
    sha256: str
    """Hexadecimal, of its tokenizer.json."""
    vocab_size: int
    special_ids: tuple[int, ...]
    content_sha256: str = ""
    """Hexadecimal, `Tokenizer.content_sha256`; manifests of 0.1.0 do not have it."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerIdentity:
        """The identity of a loaded tokenizer."""
        return cls(
            tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.special_ids, tokenizer.content_sha256
        )

    def is_of(self, tokenizer: Tokenizer) -> bool:
        """Whether a tokenizer gives every text the ids of this one, whoever saved its files."""
        if self.sha256 == tokenizer.sha256:
            return True
        return (self.content_sha256 or self._content_by_name()) == tokenizer.content_sha256

    def _content_by_name(self) -> str | None:
        """The content digest of a manifest of 0.1.0, if its tokenizer is still where it was."""
        try:
            named = load_tokenizer(self.name) if local_path(self.name).is_dir() else None
        except InputError:
            return None
        return named.content_sha256 if named and named.sha256 == self.sha256 else None


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.json."""

    tokenizer: TokenizerIdentity
    shards: tuple[Shard, ...]
    """In the order of their documents."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per source: the counts of KEPT, and documents left out, by reason."""
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Per input file the number of faulty records that were left out, and the first of the faults."""

    identifiers: dict[str, str | bool] = field(default_factory=dict)
    """`identifiers.policy` of the preparation."""
    prepared_from: dict[str, Any] = field(default_factory=dict)
    """`text` and `reading` of the preparation; empty in the manifests of earlier versions."""

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of all shards, special tokens not counted."""
        return sum(shard.tokens for shard in self.shards)


def add_counts(total: dict[str, int], counts: Mapping[str, int]) -> None:
    """Add the counts of a part to those of a source."""
    for key, count in counts.items():
        total[key] = max(total.get(key, 0), count) if key == "longest" else total.get(key, 0) + count


def parse_manifest(content: str | bytes, origin: str) -> Manifest:
    """Read the JSON of a manifest.

    Args:
        content: The JSON.
        origin: Path or URL, for messages.

    Raises:
        InputError: A key is wrong; the message names it.
    """
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise _invalid(f"{origin} is not valid JSON ({error})") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version not in FORMATS_READ:
        raise InputError(
            f"{origin}: format_version is {version!r}, this Detour reads {' and '.join(map(str, FORMATS_READ))}",
            code="manifest-version",
        )
    try:
        tokenizer = TokenizerIdentity(**{**tree["tokenizer"], "special_ids": tuple(tree["tokenizer"]["special_ids"])})
        shards = tuple(Shard(**shard) for shard in tree["shards"])
        sources = {name: dict(counts) for name, counts in tree.get("sources", {}).items()}
        identifiers = dict(tree.get("identifiers", {}))
        prepared_from = dict(tree.get("prepared_from", {}))
        faults = {name: (int(count), str(first)) for name, (count, first) in tree.get("faults", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _invalid(f"{origin}: missing or unknown key ({error})") from None
    for wrong_value in _wrong_values(tokenizer, shards, sources):
        raise _invalid(f"{origin}: {wrong_value}")
    return Manifest(tokenizer, shards, sources, faults, identifiers, prepared_from)


def _invalid(fault: str) -> InputError:
    return InputError(f"{fault}; run `detour prepare` again", code="manifest-invalid")


def _wrong_values(
    tokenizer: TokenizerIdentity, shards: Iterable[Shard], sources: dict[str, dict[str, Any]]
) -> Iterator[str]:
    """Yield a message per invalid name, count or digest, because manifests come from anywhere."""
    for shard in shards:
        if not (isinstance(shard.name, str) and _PLAIN_TAR_NAME.fullmatch(shard.name)):
            yield f"shard name {shard.name!r} must be the plain file name of a .tar beside the manifest"
        yield from _wrong_counts(f"shard {shard.name}", asdict(shard), ("bytes", "documents", "tokens"))
        yield from _wrong_sha256(f"shard {shard.name}", shard.sha256)
    yield from _wrong_sha256("tokenizer", tokenizer.sha256)
    if tokenizer.content_sha256:
        yield from _wrong_sha256("tokenizer", tokenizer.content_sha256)
    yield from _wrong_counts("tokenizer", asdict(tokenizer), ("vocab_size",))
    for name, counts in sources.items():
        yield from _wrong_counts(f"source {name}", counts, counts)


def _wrong_counts(owner: str, values: dict[str, Any], keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if type(values[key]) is not int or values[key] < 0:
            yield f"{key} of {owner} must be a number from 0, not {values[key]!r}"


def _wrong_sha256(owner: str, value: Any) -> Iterator[str]:
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        yield f"sha256 of {owner} must be 64 hexadecimal digits, not {value!r}"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a local shard directory.

    Raises:
        InputError: The file is missing, unreadable or wrong.
    """
    path = directory / NAME
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; `detour prepare` writes it beside the shards", code="manifest-missing"
        ) from None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json into a directory, atomically."""
    tree = asdict(manifest)
    for key in ("identifiers", "prepared_from"):
        if not tree[key]:
            del tree[key]
    write_json(directory / NAME, {"format_version": FORMAT_VERSION, **tree})


def verify(directory: Path) -> list[str]:
    """Read all bytes of the shards and return one line per difference from the manifest."""
    problems = []
    for shard in read_manifest(directory).shards:
        path = directory / shard.name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif (size := path.stat().st_size) != shard.bytes:
            problems.append(f"{path}: {size:,} bytes, the manifest says {shard.bytes:,}")
        elif file_sha256(path) != shard.sha256:
            problems.append(f"{path}: its sha256 is not the manifest's: the file changed")
    return problems
