"""Train a byte-level BPE tokenizer of 8,192 entries: python tokenizer.py DIRECTORY TEXT..."""

import sys
from pathlib import Path

from datapipe.inputs import find_files
from datapipe.new_tokenizer import train_tokenizer
from datapipe.text import read_texts

directory, *inputs = sys.argv[1:]
texts = (text.text.decode() for name in inputs for path in find_files(name) for text in read_texts(path))
train_tokenizer(Path(directory), texts, 8192)
