"""The tokenizer of a run, loaded from a Hugging Face tokenizer directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from configs.errors import InputError
from configs.files import CHECKPOINT_RECORD, RUN_TOKENIZER, write_json
from configs.hub import download_snapshot, is_hub_id
from datapipe.identifiers import Identifier, overlaps
from datapipe.paths import local_path
from datapipe.tokenizer_content import bytes_of_tokens, content_sha256

CONFIG = "tokenizer_config.json"
FILES = ("tokenizer.json", CONFIG, "special_tokens_map.json")
"""Files of a tokenizer that are read and exported."""
# The names of BERT and RoBERTa, tried in this order if the configuration files do not name the token.
USUAL_TOKENS = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
}
PROBES = ("a", "A", "1", "\u4e2d")
"""Texts that show what a post-processor puts around a text; the first that has a token is taken."""
BOM = b"\xef\xbb\xbf"
LONGEST_TEXT = 2**20
"""Characters tokenized at once; the tokenizer needs about 100 bytes per character."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the ids that training needs."""

    name: str
    """The reference it was loaded by."""
    sha256: str
    """Hexadecimal, of the file tokenizer.json. Files saved by other versions differ; `content_sha256` does not."""
    vocab_size: int
    """Number of ids, added tokens included."""
    cls_id: int
    sep_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    mask_id: int
    prefix_ids: tuple[int, ...]
    """Ids before each document, as its post-processor frames a text for fine-tuning."""
    suffix_ids: tuple[int, ...]
    """Ids after each document."""
    frames_itself: bool
    """Whether the post-processor frames texts. If not, documents begin with cls and end with sep."""
    special_ids: tuple[int, ...]
    """Ascending. They are never masked, and never drawn as a random replacement."""
    backend: tokenizers.Tokenizer = field(repr=False, compare=False)
    directory: Path = field(repr=False, compare=False)
    """Folder of its files."""

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest dtype of the shard format that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @cached_property
    def content_sha256(self) -> str:
        """Hexadecimal, equal for files that give every text the same ids, whoever saved them."""
        return content_sha256(self.backend)

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """The UTF-8 text that each id stands for."""
        return bytes_of_tokens(self.backend)

    @cached_property
    def byte_lengths(self) -> NDArray[np.int32]:
        """`[vocab_size] int32`, bytes of text per id; 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token_id, text in self.token_bytes.items():
            lengths[token_id] = 0 if token_id in self.special_ids else len(text)
        return lengths

    @property
    def mask_token(self) -> str:
        """The text of the mask token, such as `[MASK]` or `<mask>`."""
        return str(self.backend.id_to_token(self.mask_id))

    @property
    def role_tokens(self) -> dict[str, str]:
        """Text of the cls, sep, pad and mask token, by their keys in `tokenizer_config.json`."""
        return {f"{role}_token": str(self.backend.id_to_token(getattr(self, f"{role}_id"))) for role in USUAL_TOKENS}

    @property
    def framing(self) -> str:
        """How documents are framed, for people: `[CLS] ... [SEP]`."""
        tokens = [[str(self.backend.id_to_token(id_)) for id_ in ids] for ids in (self.prefix_ids, self.suffix_ids)]
        by_role = "" if self.frames_itself else " (by role: its post-processor, and so fine-tuning, adds nothing)"
        return " ".join([*tokens[0], "...", *tokens[1]]) + by_role

    @property
    def framing_length(self) -> int:
        """Special tokens per document."""
        return len(self.prefix_ids) + len(self.suffix_ids)

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> list[NDArray[Any]]:
        """Ids per text, without special tokens; a literal "[MASK]" in a text is tokenized as ordinary text.

        At most LONGEST_TEXT characters are tokenized at once, to bound memory. A longer text is cut before a space or
        newline, because byte-level tokenizers cut there as well. `progress` receives the bytes of UTF-8 of each part.
        """
        batch = self.backend.encode_batch_fast
        return self._encode(texts, batch, lambda encoding, *_: np.array(encoding.ids, self.dtype), progress)

    def encode_marked(
        self,
        texts: Sequence[str],
        identifiers: Sequence[Sequence[Identifier]],
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[NDArray[Any], NDArray[np.bool_] | None]]:
        """Ids per text as by `encode`, and `[tokens]`, those that overlap an identifier; None if the text has none.

        Args:
            texts: The texts.
            identifiers: Merged identifiers of each text.
            progress: Receives the bytes of UTF-8 of each part.
        """
        if not any(identifiers):
            return [(ids, None) for ids in self.encode(texts, progress)]

        def take(encoding: tokenizers.Encoding, text: int, start: int, length: int) -> NDArray[Any]:
            ids = np.array(encoding.ids, self.dtype)
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2) + start
            return np.stack([ids, overlaps(offsets, start, start + length, identifiers[text])])

        encoded = self._encode(texts, self.backend.encode_batch, take, progress)
        return [
            (pair[0], pair[1].astype(bool) if own else None) for pair, own in zip(encoded, identifiers, strict=True)
        ]

    def _encode(
        self,
        texts: Sequence[str],
        encode_batch: Callable[..., list[tokenizers.Encoding]],
        take: Callable[[tokenizers.Encoding, int, int, int], NDArray[Any]],
        progress: Callable[[int], None] | None,
    ) -> list[NDArray[Any]]:
        """Tokenize texts in parts, and join `take(encoding, text, first character, characters)` of the parts of each.

        An encoding is not kept, because it is far larger than what is taken from it.
        """
        parts = [(text, start, part) for text, whole in enumerate(texts) for start, part in _parts(whole)]
        taken: list[list[NDArray[Any]]] = [[] for _ in texts]
        first = 0
        while first < len(parts):
            end, size = first, 0
            while end < len(parts) and (end == first or size + len(parts[end][2]) <= LONGEST_TEXT):
                size, end = size + len(parts[end][2]), end + 1
            encodings = encode_batch([part for *_, part in parts[first:end]], add_special_tokens=False)
            for (text, start, part), encoding in zip(parts[first:end], encodings, strict=True):
                taken[text].append(take(encoding, text, start, len(part)))
            if progress is not None:
                progress(sum(len(part.encode()) for *_, part in parts[first:end]))
            first = end
        return [own[0] if len(own) == 1 else np.concatenate(own, axis=-1) for own in taken]

    def save(self, directory: Path) -> None:
        """Copy the files of the tokenizer into a directory such as an export, without byte order marks.

        `tokenizer_config.json` then names the four tokens that training needs, because transformers guesses none.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.directory / name).exists():
                (directory / name).write_bytes((self.directory / name).read_bytes().removeprefix(BOM))
        path = directory / CONFIG
        config = _read_json(self.name, path) if path.exists() else {}
        if unnamed := {key: token for key, token in self.role_tokens.items() if not config.get(key)}:
            write_json(path, config | unnamed)


def load_tokenizer(reference: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        reference: Directory with a tokenizer.json, `package://tokenizer/modernbert`, Hugging Face hub id, weight file
            with a tokenizer.json beside it, or Detour checkpoint, which knows the tokenizer it was trained with.

    Raises:
        InputError: There is no such tokenizer, its files are damaged, or a [CLS], [SEP], [PAD] or [MASK] is missing.
    """
    directory = _directory(reference)
    content = (directory / "tokenizer.json").read_bytes().removeprefix(BOM)
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise _unusable(f"tokenizer {reference}: tokenizer.json cannot be read: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    _require_any_text(reference, backend)
    named = _named_tokens(reference, directory)
    prefix, suffix = _added_by_post_processor(reference, backend)
    ids = {role: _token_id(reference, backend, named, role) for role in USUAL_TOKENS}
    if ids["cls"] is None and prefix:
        ids["cls"] = prefix[0]
    if ids["sep"] is None and suffix:
        ids["sep"] = suffix[-1]
    missing = [role for role, value in ids.items() if value is None]
    if missing:
        raise _unusable(
            f"tokenizer {reference}: no {', '.join(missing)} token; name it in its tokenizer_config.json as "
            + ", ".join(f'"{role}_token"' for role in missing)
        )
    role_ids = {role: int(value) for role, value in ids.items() if value is not None}
    _require_own_mask(reference, role_ids, _token_id(reference, backend, named, "unk"))
    frames_itself = bool(prefix or suffix)
    if not frames_itself:
        prefix, suffix = (role_ids["cls"],), (role_ids["sep"],)
    first, last = (_token_id(reference, backend, named, role) for role in ("bos", "eos"))
    special = {id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}
    return Tokenizer(
        name=reference,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        cls_id=role_ids["cls"],
        sep_id=role_ids["sep"],
        bos_id=first if first is not None else (*prefix, role_ids["cls"])[0],
        eos_id=last if last is not None else (role_ids["sep"], *suffix)[-1],
        pad_id=role_ids["pad"],
        mask_id=role_ids["mask"],
        prefix_ids=prefix,
        suffix_ids=suffix,
        frames_itself=frames_itself,
        special_ids=tuple(sorted(special.union(role_ids.values(), prefix, suffix))),
        backend=backend,
        directory=directory,
    )


def _unusable(fault: str) -> InputError:
    return InputError(fault, key="tokenizer", code="tokenizer-unusable")


def _directory(reference: str) -> Path:
    path = local_path(reference)
    directory = path.parent if path.is_file() else path  # a weight file has its tokenizer beside it
    if not directory.is_dir():
        if not is_hub_id(reference):
            raise InputError(
                f"tokenizer {reference}: no such directory, and not a hub id such as answerdotai/ModernBERT-base",
                key="tokenizer",
                code="no-such-tokenizer",
            )
        directory = download_snapshot(reference, FILES, "tokenizer")
    if (directory / "tokenizer.json").is_file():
        return directory
    if (directory / CHECKPOINT_RECORD).is_file():
        return _directory(_trained_with(reference, directory))
    raise _unusable(
        f"tokenizer {reference}: no tokenizer.json in its directory or hub repository; set tokenizer to one that has it"
    )


def _trained_with(reference: str, checkpoint: Path) -> str:
    """Reference to the tokenizer of a Detour checkpoint: the run's own copy, else the one that it records."""
    copy = checkpoint.absolute().parent.parent / RUN_TOKENIZER
    if (copy / "tokenizer.json").is_file():
        return str(copy)
    record = _read_json(reference, checkpoint / CHECKPOINT_RECORD)
    recorded = (record.get("config") or {}).get("tokenizer") or record.get("source")
    if not recorded:
        raise _unusable(f"tokenizer {reference}: this checkpoint records no tokenizer; set tokenizer to the model's")
    return str(recorded)


def _read_json(reference: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise _unusable(f"tokenizer {reference}: {path} is not valid JSON ({error}); mend or download it") from None
    if not isinstance(content, dict):
        raise _unusable(f"tokenizer {reference}: {path} holds a {type(content).__name__} and not a mapping")
    return content


def _named_tokens(reference: str, directory: Path) -> dict[str, str]:
    """Text of each token by role, as the configuration files name it."""
    named: dict[str, str] = {}
    for name in FILES[1:]:
        if not (directory / name).exists():
            continue
        for key, token in _read_json(reference, directory / name).items():
            content = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(content, str):
                named.setdefault(key.removesuffix("_token"), content)
    return named


def _token_id(reference: str, backend: tokenizers.Tokenizer, named: dict[str, str], role: str) -> int | None:
    if role in named:
        token_id = backend.token_to_id(named[role])
        if token_id is None and role in USUAL_TOKENS:
            raise _unusable(f"tokenizer {reference}: its {role}_token {named[role]!r} is not in its vocabulary")
        return token_id
    ids = (backend.token_to_id(name) for name in USUAL_TOKENS.get(role, ()))
    return next((token_id for token_id in ids if token_id is not None), None)


def _require_own_mask(reference: str, ids: dict[str, int], unk_id: int | None) -> None:
    """Refuse a mask token that means something else too, because MLM would train on its other meaning."""
    for role, token_id in (*ids.items(), ("unk", unk_id)):
        if role != "mask" and token_id == ids["mask"]:
            raise _unusable(
                f"tokenizer {reference}: its mask token and its {role} token are both id {token_id}; give the mask a "
                "token of its own"
            )


def _require_any_text(reference: str, backend: tokenizers.Tokenizer) -> None:
    """Refuse a tokenizer that fails on a word it does not know, which would end hours of preparation."""
    try:
        backend.encode("a \u4e2d \U0010ffff", add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise _unusable(
            f"tokenizer {reference} cannot encode words that it does not know ({error}); name its unknown token, "
            "`unk_token` of `model` in tokenizer.json, and give it an entry"
        ) from None


def _added_by_post_processor(reference: str, backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a post-processor puts before and after a text."""
    for probe in PROBES:
        bare = backend.encode(probe, add_special_tokens=False).ids
        framed = backend.encode(probe).ids
        for start in range(len(framed) - len(bare) + 1 if bare else 0):
            if framed[start : start + len(bare)] == bare:
                return tuple(framed[:start]), tuple(framed[start + len(bare) :])
    raise _unusable(
        f"tokenizer {reference}: its post-processor changes the tokens of a text; it cannot be trained with"
    )


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """The parts that are tokenized at once, each after the place of its first character."""
    start = 0
    while len(text) - start > LONGEST_TEXT:
        limit = start + LONGEST_TEXT
        cut = max(text.rfind(" ", start + 1, limit), text.rfind("\n", start + 1, limit))
        end = cut if cut > 0 else limit
        yield start, text[start:end]
        start = end
    yield start, text[start:]
