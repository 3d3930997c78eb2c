"""The tokenizer of a run, loaded from a Hugging Face tokenizer directory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from configs.errors import InputError
from configs.hub import download_snapshot, is_hub_id
from datapipe.paths import local_path

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of a tokenizer that are read and exported."""
# The names of BERT and RoBERTa, tried in this order if the configuration files do not name the token.
USUAL_TOKENS = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
}
LONGEST_TEXT = 2**20
"""Characters tokenized at once; the tokenizer needs about 100 bytes per character."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the ids that training needs."""

    name: str
    """The reference it was loaded by."""
    sha256: str
    """Hexadecimal, of tokenizer.json: the identity that shards are checked against."""
    vocab_size: int
    """Number of ids, added tokens included."""
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    """Ascending. They are never masked, and never drawn as a random replacement."""
    backend: tokenizers.Tokenizer = field(repr=False, compare=False)
    directory: Path = field(repr=False, compare=False)
    """Folder of its files."""

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest dtype of the shard format that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @property
    def mask_token(self) -> str:
        """The text of the mask token, such as `[MASK]` or `<mask>`."""
        return str(self.backend.id_to_token(self.mask_id))

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> list[NDArray[Any]]:
        """Ids per text, without special tokens; a literal "[MASK]" in a text is tokenized as ordinary text.

        At most LONGEST_TEXT characters are tokenized at once, to bound memory. A longer text is cut before a space or
        newline, because byte-level tokenizers cut there as well. `progress` receives the bytes of UTF-8 of each part.
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
            if progress is not None:
                progress(sum(len(part.encode()) for _, part in parts[start:end]))
            start = end
        return [arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in ids]

    def save(self, directory: Path) -> None:
        """Copy the files of the tokenizer, unchanged, into a directory such as an export."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.directory / name).exists():
                shutil.copyfile(self.directory / name, directory / name)


def first_difference(trained: Tokenizer, chosen: Tokenizer) -> str | None:
    """Describe the first token or role in which two tokenizers disagree; None if a model of one can take the other.

    Tokens that `chosen` has besides those of `trained` are no disagreement.
    """
    trained_ids, chosen_ids = (tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (trained, chosen))
    for token, token_id in sorted(trained_ids.items(), key=lambda item: item[1]):
        if chosen_ids.get(token) != token_id:
            return f"{token!r} is id {token_id} there and {chosen_ids.get(token, 'absent')} here"
    for role in USUAL_TOKENS:
        ids = [getattr(tokenizer, f"{role}_id") for tokenizer in (trained, chosen)]
        if ids[0] != ids[1]:
            return f"the {role} token is id {ids[0]} there and {ids[1]} here"
    return None


def load_tokenizer(reference: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        reference: Directory with a tokenizer.json, `package://tokenizer/modernbert`, or Hugging Face hub id.

    Raises:
        InputError: There is no such tokenizer, or it lacks a [CLS], [SEP], [PAD] or [MASK] token.
    """
    directory = _directory(reference)
    content = (directory / "tokenizer.json").read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise _unusable(f"tokenizer {reference}: tokenizer.json cannot be read: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    ids = {role: _token_id(backend, directory, role) for role in USUAL_TOKENS}
    missing = [role for role, value in ids.items() if value is None]
    if missing:
        raise _unusable(
            f"tokenizer {reference}: no {', '.join(missing)} token; name it in its tokenizer_config.json as "
            + ", ".join(f'"{role}_token"' for role in missing)
        )
    special = {id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}
    role_ids = {role: int(value) for role, value in ids.items() if value is not None}
    return Tokenizer(
        name=reference,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        cls_id=role_ids["cls"],
        sep_id=role_ids["sep"],
        pad_id=role_ids["pad"],
        mask_id=role_ids["mask"],
        special_ids=tuple(sorted(special | set(role_ids.values()))),
        backend=backend,
        directory=directory,
    )


def _unusable(fault: str) -> InputError:
    return InputError(fault, key="tokenizer", code="tokenizer-unusable")


def _directory(reference: str) -> Path:
    directory = local_path(reference)
    if not directory.is_dir():
        if not is_hub_id(reference):
            raise InputError(
                f"tokenizer {reference}: no such directory, and not a hub id such as answerdotai/ModernBERT-base",
                key="tokenizer",
                code="no-such-tokenizer",
            )
        directory = download_snapshot(reference, FILES, "tokenizer")
    if not (directory / "tokenizer.json").is_file():
        raise _unusable(f"tokenizer {reference}: no tokenizer.json in its directory or hub repository")
    return directory


def _token_id(backend: tokenizers.Tokenizer, directory: Path, role: str) -> int | None:
    for name in FILES[1:]:
        path = directory / name
        if path.exists():
            token = json.loads(path.read_text(encoding="utf-8")).get(f"{role}_token")
            content = token.get("content") if isinstance(token, dict) else token
            if content is not None:
                return backend.token_to_id(content)
    return next((id_ for name in USUAL_TOKENS[role] if (id_ := backend.token_to_id(name)) is not None), None)


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > LONGEST_TEXT:
        limit = start + LONGEST_TEXT
        cut = max(text.rfind(" ", start + 1, limit), text.rfind("\n", start + 1, limit))
        end = cut if cut > 0 else limit
        yield text[start:end]
        start = end
    yield text[start:]
