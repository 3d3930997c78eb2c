"""Small tokenizers of the two families that models are trained with: byte-level BPE, and SentencePiece-like."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The patient was treated with aspirin for pneumonia, and the fever fell within two days.",
    "Le patient a été traité par antibiotiques ; la fièvre a baissé en deux jours.",
    "Pneumothorax was ruled out by a chest radiograph. The patient was sent home.",
]


def byte_level(folder: Path, framed: bool = True) -> Path:
    """As ModernBERT's: byte-level BPE, `[CLS] ... [SEP]` unless not `framed`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    roles = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(roles.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if framed:
        ids = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ids)
    return _written(folder, backend, roles)


def sentencepiece_like(folder: Path) -> Path:
    """As mmBERT's: pad 0, cls and sep 1, framed `<bos> ... <eos>` with bos 2."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + fallback, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.post_processor = processors.TemplateProcessing("<bos> $A <eos>", None, [("<bos>", 2), ("<eos>", 1)])
    roles = {"bos": "<bos>", "eos": "<eos>", "cls": "<eos>", "sep": "<eos>", "pad": "<pad>", "mask": "<mask>"}
    return _written(folder, backend, roles | {"unk": "<unk>"})


def extended(folder: Path, base: Path) -> Path:
    """`base` with two words and a special token more."""
    backend = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    backend.add_tokens(["pneumothorax", "antibiotiques"])
    backend.add_special_tokens(["[PATIENT]"])
    return _written(folder, backend, config=json.loads((base / "tokenizer_config.json").read_text()))


def _written(
    folder: Path,
    backend: tokenizers.Tokenizer,
    roles: dict[str, str] | None = None,
    config: dict[str, str] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {f"{role}_token": token for role, token in (roles or {}).items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config or named), encoding="utf-8")
    return folder
