"""`manifest.json`: what a shard set holds and which tokenizer made it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import InputError
from datapipe.tokenizer import Tokenizer

NAME = "manifest.json"
FORMAT_VERSION = 1
_PLAIN_NAME = re.compile(r"[^./\0][^/\0]*\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One tar of a shard set."""

    name: str
    """File name, beside the manifest."""
    bytes: int
    documents: int
    tokens: int
    """Without special tokens."""
    sha256: str


@dataclass(frozen=True)
class TokenizerIdentity:
    name: str
    sha256: str
    vocab_size: int
    special_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerIdentity:
        return cls(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.special_ids)


@dataclass(frozen=True)
class Manifest:
    tokenizer: TokenizerIdentity
    shards: tuple[Shard, ...]
    """In the order of their documents."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source -> its `documents` and `tokens`, and how many documents were left out, by reason."""

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


def parse_manifest(content: str | bytes, origin: str) -> Manifest:
    """Read the JSON of a manifest. Raises InputError naming the key that is wrong."""
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise InputError(f"{origin} is not valid JSON ({error}); run `detour prepare` again") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{origin}: format_version is {version!r}, this Detour reads {FORMAT_VERSION}")
    try:
        tokenizer = TokenizerIdentity(**{**tree["tokenizer"], "special_ids": tuple(tree["tokenizer"]["special_ids"])})
        shards = tuple(Shard(**shard) for shard in tree["shards"])
        sources = {name: dict(counts) for name, counts in tree.get("sources", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{origin}: missing or unknown key ({error}); run `detour prepare` again") from None
    for wrong in _wrong_values(tokenizer, shards, sources):
        raise InputError(f"{origin}: {wrong}; run `detour prepare` again")
    return Manifest(tokenizer, shards, sources)


def _wrong_values(
    tokenizer: TokenizerIdentity, shards: Iterable[Shard], sources: dict[str, dict[str, Any]]
) -> Iterator[str]:
    """Of the values that files are found and counted by, those that are none; manifests come from anywhere."""
    for shard in shards:
        if not (isinstance(shard.name, str) and _PLAIN_NAME.fullmatch(shard.name)):
            yield f"shard name {shard.name!r} must be the plain file name of a .tar beside the manifest"
        yield from _no_counts(f"shard {shard.name}", asdict(shard), ("bytes", "documents", "tokens"))
        yield from _no_sha256(f"shard {shard.name}", shard.sha256)
    yield from _no_sha256("tokenizer", tokenizer.sha256)
    yield from _no_counts("tokenizer", asdict(tokenizer), ("vocab_size",))
    for name, counts in sources.items():
        yield from _no_counts(f"source {name}", counts, counts)


def _no_counts(what: str, values: dict[str, Any], keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if type(values[key]) is not int or values[key] < 0:
            yield f"{key} of {what} must be a number from 0, not {values[key]!r}"


def _no_sha256(what: str, value: Any) -> Iterator[str]:
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        yield f"sha256 of {what} must be 64 hexadecimal digits, not {value!r}"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a local shard directory. Raises InputError."""
    path = directory / NAME
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; `detour prepare` writes it beside the shards") from None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write atomically: a reader sees the whole manifest or none."""
    tree: dict[str, Any] = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    replace_file(directory / NAME, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def replace_file(path: Path, content: str) -> None:
    """Write a small text file so that no reader ever sees a part of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(directory: Path) -> list[str]:
    """Every way in which the shards differ from their manifest, one line each; reads all bytes."""
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
