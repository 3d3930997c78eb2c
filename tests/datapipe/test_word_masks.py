"""Whole-word masking: no word is half masked, whatever kind of tokenizer made it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from datapipe.batch import IGNORE, PackedSequence
from datapipe.targets import Masked
from datapipe.tokenizer import Tokenizer, load_tokenizer
from datapipe.words import word_starts
from tests.datapipe.conftest import refused

SPECIAL = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"]
TEXT = ["the patient, aged 61, was re-admitted (twice).", "thetis patted the patients' cats\nand agnes admired them"]
KINDS = ("byte-level", "sentencepiece", "wordpiece")
texts = st.text(alphabet="".join(sorted(set("".join(TEXT)))), min_size=1, max_size=80)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """The shipped tokenizer, or a small one of another kind, trained here."""
    if kind == "byte-level":
        return load_tokenizer("package://tokenizer/modernbert")
    options: dict[str, Any] = {"vocab_size": 90, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "wordpiece":
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.train_from_iterator(TEXT * 3, trainers.WordPieceTrainer(**options))
    else:
        backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "sentencepiece" else pre_tokenizers.Whitespace()
        backend.train_from_iterator(TEXT * 3, trainers.BpeTrainer(**options))
    with TemporaryDirectory() as folder:
        backend.save(str(Path(folder) / "tokenizer.json"))
        return load_tokenizer(folder)


@cache
def by_word(kind: str) -> Masked:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids
    return Masked(0.5, (0.8, 0.1, 0.1), 0, *ids, word_starts(tokenizer))


@settings(max_examples=60)
@given(kind=st.sampled_from(KINDS), text=texts, number=st.integers(0, 1000))
def test_no_word_is_half_masked(kind: str, text: str, number: int) -> None:
    tokenizer = tokenizer_of(kind)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = np.array([tokenizer.cls_id, *encoding.ids, tokenizer.sep_id], np.int32)
    labels = by_word(kind)([PackedSequence(ids, (len(ids),), 0, number)])[1][0]
    chosen = labels[1:-1] != IGNORE
    if kind == "wordpiece":
        words = [np.array([word == one for word in encoding.word_ids]) for one in set(encoding.word_ids)]
    else:
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        words = [np.array([a < end and b > start for a, b in encoding.offsets]) for start, end in spans]
    for tokens in words:
        assert len(set(chosen[tokens].tolist())) <= 1, (encoding.tokens, chosen)
    assert labels[0] == labels[-1] == IGNORE


def test_where_words_begin() -> None:
    """A word is cut by special tokens, and by the ends of documents and rows."""
    begins = np.zeros(10, bool)
    begins[[5, 6, 0, 1]] = True
    targets = Masked(0.5, (1.0, 0.0, 0.0), 0, 1, 10, (0, 1), begins)
    ids = np.array([[7, 5, 7, 7, 6, 7, 0, 7, 7, 7, 5, 7, 0, 0], [0, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]], np.int32)
    rows = [PackedSequence(ids[0], (9, 3), 0, 0), PackedSequence(ids[1], (14,), 0, 1)]
    assert targets.units(rows).tolist() == [
        [0, 1, 1, 1, 4, 4, 6, 7, 7, 9, 10, 10, 12, 13],
        [0] + [1] * 13,
    ]
    assert (targets([PackedSequence(np.zeros(4, np.int32), (), 0, 0)])[1] == IGNORE).all()


def test_words_are_masked_at_the_asked_rate() -> None:
    """The asked share of four million tokens is predicted to 0.1 %, in words of random lengths."""
    begins = np.zeros(1000, bool)
    begins[:500] = True
    targets = Masked(0.3, (0.8, 0.1, 0.1), 5, 999, 1000, (0, 999), begins)
    drawn = np.random.default_rng(0)
    maskable = predicted = 0
    for first in range(0, 512, 64):
        rows = [PackedSequence(drawn.integers(1, 999, 8192).astype(np.int32), (8192,), 0, first + n) for n in range(64)]
        predicted += int((targets(rows)[1] != IGNORE).sum())
        maskable += 64 * 8192
    assert abs(predicted / maskable - 0.3) < 0.001


@pytest.mark.parametrize(
    ("kind", "first", "inner"), [("byte-level", "Ġpatient", "patient"), ("sentencepiece", "▁the", "t")]
)
def test_the_marks_of_each_kind(kind: str, first: str, inner: str) -> None:
    tokenizer = tokenizer_of(kind)
    starts = word_starts(tokenizer)
    assert starts[tokenizer.backend.token_to_id(first)] and not starts[tokenizer.backend.token_to_id(inner)]
    assert starts[list(tokenizer.special_ids)].all()


def test_pieces_that_do_not_tell() -> None:
    with refused("no-word-boundaries", key="mask_unit"):
        word_starts(tokenizer_of("whitespace"))
