"""Train a byte-level BPE tokenizer of 8,192 entries: python tokenizer.py DIRECTORY TEXT..."""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from datapipe.inputs import find_files
from datapipe.text import read_texts

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
directory, *inputs = sys.argv[1:]
texts = (text.text.decode() for name in inputs for path in find_files(name) for text in read_texts(path))
tokenizer = Tokenizer(models.BPE())
tokenizer.normalizer = normalizers.NFC()
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator(
    texts,
    trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
)
ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
)
path = Path(directory)
path.mkdir(parents=True, exist_ok=True)
tokenizer.save(str(path / "tokenizer.json"))
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **SPECIAL}
(path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
