"""The content of a tokenizer.json, independent of who saved it: its identity, and the bytes behind each token."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import tokenizers

SPACE = "\u2581"
"""The sign that SentencePiece writes for a space."""
FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def content_sha256(backend: tokenizers.Tokenizer) -> str:
    """Digest what decides the ids of a text: vocabulary, merges, normalizer, pre-tokenizer and added tokens.

    Files that another program or version saved again have the same digest: the order of keys, the form of merges,
    padding, truncation, and fields that are null, false or empty play no part.
    """
    content = json.loads(backend.to_str())
    model = content["model"]
    # A special token's text is never looked for, so its other flags change nothing.
    added = [
        [token["id"], token["content"], *(sorted(key for key, value in token.items() if value is True))]
        if not token["special"]
        else [token["id"], token["content"], "special"]
        for token in sorted(content["added_tokens"], key=lambda token: token["id"])
    ]
    settings = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    parts = [
        model["vocab"],
        model.get("merges"),
        added,
        _without_defaults([settings, content["normalizer"], content["pre_tokenizer"]]),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def bytes_of_tokens(backend: tokenizers.Tokenizer) -> dict[int, bytes]:
    """The UTF-8 text that each id stands for; a special token stands for none.

    It is exact for byte-level tokenizers. For SentencePiece and WordPiece it is the text after normalisation, where a
    text may begin with a space more.
    """
    added = backend.get_added_tokens_decoder()
    decode = _decoder(backend)
    return {
        token_id: (b"" if added[token_id].special else token.encode()) if token_id in added else decode(token)
        for token, token_id in backend.get_vocab(with_added_tokens=True).items()
    }


def _without_defaults(value: Any) -> Any:
    """Leave out what is null, false or empty, because versions differ in whether they write it."""
    if isinstance(value, dict):
        kept = {key: _without_defaults(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if not (item is None or item is False or item in ([], {}, ""))}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _decoder(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    kinds = _kinds(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
    if "ByteLevel" in kinds:
        table = _byte_alphabet()

        def from_alphabet(token: str) -> bytes:
            try:
                return token.translate(table).encode("latin-1")
            except UnicodeEncodeError:  # not of the alphabet: a token that was written as plain text
                return token.encode()

        return from_alphabet

    def from_pieces(token: str) -> bytes:
        if "ByteFallback" in kinds and (match := FALLBACK_BYTE.fullmatch(token)):
            return bytes.fromhex(match[1])
        if "WordPiece" in kinds:
            return token[2:].encode() if token.startswith("##") else f" {token}".encode()
        return token.replace(SPACE, " ").encode()

    return from_pieces


def _kinds(decoder: Any) -> set[str]:
    """Types of a decoder and of the decoders that it joins."""
    if not decoder:
        return set()
    return {decoder["type"]}.union(*(_kinds(part) for part in decoder.get("decoders", ())))


def _byte_alphabet() -> dict[int, str]:
    """The characters that byte-level tokenizers write for bytes, as a table for `str.translate` to Latin-1."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {256 + place: chr(byte) for place, byte in enumerate(others)}
