"""The tokenizer of a run: what Detour needs to know of a Hugging Face tokenizer directory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from configs.errors import InputError
from datapipe.samples import PREFIX, local_path

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Tried in this order where the configuration files do not name the token: BERT's and RoBERTa's names.
USUAL = {"cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "pad": ("[PAD]", "<pad>"), "mask": ("[MASK]", "<mask>")}


LONGEST_TEXT = 2**20
"""Characters tokenized at once; the tokenizer needs about 100 bytes for each."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the ids training needs."""

    name: str
    """The reference it was loaded by."""
    sha256: str
    """Of tokenizer.json, byte for byte: the identity that shards are checked against."""
    vocab_size: int
    """Added tokens included."""
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    """Ascending; these are never masked, and never drawn as a random replacement."""
    backend: tokenizers.Tokenizer = field(repr=False, compare=False)
    directory: Path = field(repr=False, compare=False)
    """Where its files lie."""

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest dtype of the shard format that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Ids of each text, without special tokens: a literal "[MASK]" in a text is tokenized as ordinary text.

        Memory stays bounded: at most LONGEST_TEXT characters are tokenized at once, and a longer text is cut before a
        space or newline, where byte-level tokenizers cut as well.
        """
        parts = [(owner, part) for owner, text in enumerate(texts) for part in _parts(text)]
        ids: list[list[NDArray[Any]]] = [[] for _ in texts]
        start = 0
        while start < len(parts):
            end, size = start, 0
            while end < len(parts) and (end == start or size + len(parts[end][1]) <= LONGEST_TEXT):
                size, end = size + len(parts[end][1]), end + 1
            encodings = self.backend.encode_batch_fast([part for _, part in parts[start:end]], add_special_tokens=False)
            for (owner, _), encoding in zip(parts[start:end], encodings, strict=True):
                ids[owner].append(np.array(encoding.ids, self.dtype))
            start = end
        return [some[0] if len(some) == 1 else np.concatenate(some) for some in ids]

    def save(self, directory: Path) -> None:
        """Copy its files, unchanged, into a directory such as an export."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.directory / name).exists():
                shutil.copyfile(self.directory / name, directory / name)


def load_tokenizer(reference: str) -> Tokenizer:
    """Load from a directory with a tokenizer.json, `package://tokenizer/modernbert`, or a Hugging Face hub id.

    Raises InputError where there is none, or where it lacks a [CLS], [SEP], [PAD] or [MASK] token.
    """
    directory = _directory(reference)
    content = (directory / "tokenizer.json").read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"tokenizer {reference}: tokenizer.json cannot be read: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    ids = {role: _token_id(backend, directory, role) for role in USUAL}
    missing = [role for role, value in ids.items() if value is None]
    if missing:
        raise InputError(
            f"tokenizer {reference}: no {', '.join(missing)} token; name it in its tokenizer_config.json as "
            + ", ".join(f'"{role}_token"' for role in missing)
        )
    special = {id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}
    found = {role: int(value) for role, value in ids.items() if value is not None}
    return Tokenizer(
        name=reference,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        cls_id=found["cls"],
        sep_id=found["sep"],
        pad_id=found["pad"],
        mask_id=found["mask"],
        special_ids=tuple(sorted(special | set(found.values()))),
        backend=backend,
        directory=directory,
    )


def _directory(reference: str) -> Path:
    path = local_path(reference)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise InputError(f"tokenizer {reference}: the directory holds no tokenizer.json")
        return path
    if reference.startswith((PREFIX, ".", "/", "~")) or reference.count("/") != 1:
        raise InputError(
            f"tokenizer {reference}: no such directory, and not a hub id such as answerdotai/ModernBERT-base"
        )
    return _download(reference)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(FILES)))
    except Exception as error:  # the hub's client raises a family of network, HTTP and cache errors
        raise InputError(
            f"tokenizer {hub_id}: neither a directory here nor to be had from the Hugging Face hub "
            f"({type(error).__name__}); give a directory with a tokenizer.json"
        ) from None
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"tokenizer {hub_id}: the hub repository holds no tokenizer.json")
    return folder


def _token_id(backend: tokenizers.Tokenizer, directory: Path, role: str) -> int | None:
    for name in FILES[1:]:
        path = directory / name
        if path.exists():
            token = json.loads(path.read_text(encoding="utf-8")).get(f"{role}_token")
            content = token.get("content") if isinstance(token, dict) else token
            if content is not None:
                return backend.token_to_id(content)
    return next((id_ for name in USUAL[role] if (id_ := backend.token_to_id(name)) is not None), None)


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > LONGEST_TEXT:
        limit = start + LONGEST_TEXT
        cut = max(text.rfind(" ", start + 1, limit), text.rfind("\n", start + 1, limit))
        end = cut if cut > 0 else limit
        yield text[start:end]
        start = end
    yield text[start:]
