"""Exposure of secrets by rank (Carlini et al. 2019), and the score by which they are ranked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import InputError
from datapipe.canaries import Canary
from datapipe.tokenizer import Tokenizer
from studies.models import load_model

BATCH = 64
"""Rows per forward pass."""
Attack = Literal["clm", "mlm"]
"""clm: each token of a secret is predicted from what stands before it; mlm: from all other tokens."""
Array = NDArray[np.float64]


class Encoded(NamedTuple):
    """A sentence as the model was trained on it."""

    ids: tuple[int, ...]
    """Token ids with the framing."""
    secret: tuple[int, ...]
    """Positions of the secret's tokens."""


def exposures(scores: Array, candidates: Array) -> Array:
    """Compute the exposure of each secret in bits: log2 of the number of ranks, minus log2 of its own.

    Equal scores share their mean rank, so that a model that gives all the same score exposes nothing.

    Args:
        scores: `[secrets]`, higher for secrets that the model prefers.
        candidates: `[candidates]`, scores of random secrets of the same form.
    """
    ordered = np.sort(candidates)
    higher = len(ordered) - np.searchsorted(ordered, scores, "right")
    equal = np.searchsorted(ordered, scores, "right") - np.searchsorted(ordered, scores, "left")
    return np.asarray(math.log2(len(ordered) + 1) - np.log2(1 + higher + equal / 2))


def chance(candidates: int) -> tuple[float, float]:
    """Return mean and standard deviation of the exposure of a secret that the model never saw, in bits.

    All ranks are equally likely then. The mean approaches 1 / ln 2 = 1.44.
    """
    values = math.log2(candidates + 1) - np.log2(np.arange(1, candidates + 2))
    return float(values.mean()), float(values.std())


def encode(canaries: Sequence[Canary], tokenizer: Tokenizer) -> list[Encoded]:
    """Encode sentences as training does, and find the tokens of their secrets.

    Raises:
        InputError: The tokenizer does not tell the secrets apart.
    """
    encodings = tokenizer.backend.encode_batch([canary.text for canary in canaries], add_special_tokens=False)
    encoded = []
    for canary, encoding in zip(canaries, encodings, strict=True):
        start = canary.text.index(canary.secret)
        end = start + len(canary.secret)
        offset = len(tokenizer.prefix_ids)
        places = tuple(
            offset + index for index, (first, last) in enumerate(encoding.offsets) if first < end and last > start
        )
        encoded.append(Encoded((*tokenizer.prefix_ids, *encoding.ids, *tokenizer.suffix_ids), places))
    distinct = len({tuple(one.ids[place] for place in one.secret) for one in encoded})
    if distinct < len({canary.secret for canary in canaries}):
        raise InputError(
            f"tokenizer {tokenizer.name} gives different numbers the same tokens, so a model cannot memorise the "
            "secrets of canaries; audit a model whose tokenizer knows the digits",
            key="tokenizer",
            code="secrets-not-told-apart",
        )
    return encoded


def score(
    folder: Path,
    attack: Attack,
    encoded: Sequence[Encoded],
    tokenizer: Tokenizer,
    progress: Callable[[str], None] | None = None,
) -> Array:
    """Compute the log-likelihood of each secret given the rest of its sentence, in nats, `[sentences]`.

    Args:
        folder: Hugging Face model: a decoder for clm, an encoder for mlm.
        attack: The way to predict.
        encoded: The sentences.
        tokenizer: Tokenizer of the model.
        progress: Receives progress lines.

    Raises:
        InputError: The model computes values that are not finite.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    kind: Any = AutoModelForCausalLM if attack == "clm" else AutoModelForMaskedLM
    model = load_model(kind, folder)
    head = model.lm_head if attack == "clm" else model.head
    owners, rows, places = _rows(encoded, attack, tokenizer.mask_id)
    scores = np.zeros(len(encoded))
    for start in range(0, len(rows), BATCH):
        part = slice(start, start + BATCH)
        batch = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows[part]], batch_first=True, padding_value=tokenizer.pad_id
        )
        mask = torch.arange(batch.shape[1])[None] < torch.tensor([[len(row)] for row in rows[part]])
        found = [(row, place) for row, row_places in enumerate(places[part]) for place in row_places]
        row_numbers, columns = torch.tensor(found).T
        wanted = torch.tensor(
            [
                encoded[owner].ids[place]
                for owner, some in zip(owners[part], places[part], strict=True)
                for place in some
            ]
        )
        with torch.inference_mode():
            states = model.model(batch.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
            chosen = states[row_numbers.to(model.device), (columns - int(attack == "clm")).to(model.device)]
            logits = model.decoder(head(chosen)).double().log_softmax(-1)
            values = logits.gather(1, wanted.to(model.device)[:, None])[:, 0].cpu().numpy()
        np.add.at(scores, np.array(owners[part])[row_numbers.numpy()], values)
        if progress is not None:
            progress(f"{attack.upper()}: scored {min(start + BATCH, len(rows)):,} of {len(rows):,} rows")
    if not np.isfinite(scores).all():
        raise InputError(
            f"{folder}: the model's predictions are not finite numbers; audit an older checkpoint", code="not-finite"
        )
    return scores


def _rows(
    encoded: Sequence[Encoded], attack: Attack, mask_id: int
) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Owner, ids and predicted positions per row: a row per sentence for clm, and per token of a secret for mlm."""
    if attack == "clm":
        return list(range(len(encoded))), [one.ids for one in encoded], [one.secret for one in encoded]
    masked = [(owner, one.ids, place) for owner, one in enumerate(encoded) for place in one.secret]
    return (
        [owner for owner, _, _ in masked],
        [(*ids[:place], mask_id, *ids[place + 1 :]) for _, ids, place in masked],
        [(place,) for _, _, place in masked],
    )
