"""Word boundaries of a tokenizer: which of its pieces begin a word."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from datapipe.tokenizer import Tokenizer

BYTE_LEVEL_SPACES = ("Ġ", "Ċ", "ĉ", "č")
"""Space, newline, tab and carriage return in the alphabet of byte-level tokenizers."""
METASPACE = ("▁",)
"""The space of SentencePiece and of tokenizers like it."""


def word_starts(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Return `[vocab_size]`, whether a piece begins a word wherever it stands; special tokens do.

    A piece of a byte-level or SentencePiece tokenizer begins a word if a space stands before its text. So a word is
    what lies between spaces, its punctuation included. A WordPiece begins a word if it has no mark of a continuation
    (`##`).

    Raises:
        InputError: The pieces do not say where words begin.
    """
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    if model["type"] == "WordPiece":
        continuation = model["continuing_subword_prefix"]
        pieces = {piece: not piece.startswith(continuation) for piece in model["vocab"]}
    else:
        byte_level = '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
        spaces = BYTE_LEVEL_SPACES if byte_level else METASPACE
        pieces = {piece: piece.startswith(spaces) for piece in tokenizer.backend.get_vocab(with_added_tokens=False)}
    if not any(pieces.values()):
        raise InputError(
            f"mask_unit: no piece of tokenizer {tokenizer.name} says that it begins a word (by a space, as in "
            "byte-level and SentencePiece tokenizers, or as WordPiece does); use mask_unit: token",
            key="mask_unit",
            code="no-word-boundaries",
        )
    for token_id, token in tokenizer.backend.get_added_tokens_decoder().items():
        pieces[token.content] = token_id in tokenizer.special_ids or token.content[:1].isspace()
    starts = np.zeros(tokenizer.vocab_size, bool)
    for piece, begins in pieces.items():
        starts[tokenizer.backend.token_to_id(piece)] = begins
    starts[list(tokenizer.special_ids)] = True
    return starts
