"""Leakage: test examples of a task that also occur in the training text."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unicodedata import normalize

from configs.errors import InputError
from configs.schema import SCRATCH, Reading, RunConfig, Source
from datapipe.input_file import InputFile
from datapipe.inputs import find_files, find_inputs
from datapipe.manifest import NAME, read_manifest
from datapipe.notes import Notes
from datapipe.shards import ShardReader
from datapipe.text import read_texts
from datapipe.tokenizer import load_tokenizer
from studies.examples import Example
from studies.models import config_of_run

WORDS = 13
"""Consecutive words that must agree, as in Brown et al. 2020 (GPT-3), appendix C."""
FEWEST_WORDS = 4
"""Words below which an example is too short to be counted as leaked."""
LISTED = 20
"""Leaked examples that the result names."""
ALONE = 32 * 2**20
"""Bytes of training text below which one process reads faster than it starts others."""
_WORD = re.compile(r"\w+")
_MARK = re.compile("[\u0300-\u036f]+")
Owners = dict[tuple[str, ...], set[int]]
"""Run of words -> the examples that hold it."""


@dataclass
class Corpora:
    """The training text of some models."""

    files: dict[Path | InputFile, str | Reading | None] = field(default_factory=dict)
    """Text files with their reading, and the paths of shards with the tokenizer of their ids."""
    unseen: list[str] = field(default_factory=list)
    """Sources that cannot be searched, each with the reason."""

    def add_text(self, reference: str) -> None:
        """Add text files.

        Raises:
            InputError: The reference names no text.
        """
        self.files |= dict.fromkeys(find_files(reference), Reading())

    def add_run(self, model: str, config: RunConfig | None) -> None:
        """Add every source of a run, and of the run that it began from."""
        if config is None:
            self._miss(f"the training text of {model}, which is no run")
            return
        for source in config.data.sources:
            if not self._add_shards(source.shards) and not self._add_source_text(source):
                self._miss(f"source {source.name} of {config.name} (neither its text nor local shards are here)")
        if config.origin is not None:
            self.add_run(config.origin.run, config_of_run(config.origin.run))
        init = config.model.init
        if init != SCRATCH:
            before = config_of_run(init) if Path(init).exists() else None
            self.add_run(init, before if before != config else None)

    def _add_source_text(self, source: Source) -> bool:
        """Add the text of a source, as its run reads it; return whether there is any."""
        try:
            files = find_inputs(source.text, source.reading, Notes()) if source.text else []
        except InputError:
            return False
        self.files |= dict.fromkeys(files, source.reading)
        return bool(files)

    def _add_shards(self, shards: str) -> bool:
        """Add the shards of a source, which the run has read; return whether all of them are here."""
        try:
            manifest = read_manifest(Path(shards))
        except InputError:
            return self._add_raw(shards)
        paths = [Path(shards) / shard.name for shard in manifest.shards]
        self.files |= {path: manifest.tokenizer.name for path in paths if path.is_file()}
        return all(path.is_file() for path in paths)

    def _add_raw(self, shards: str) -> bool:
        """Add a directory of tars of raw text, which has no manifest."""
        tars = sorted(Path(shards).glob("*.tar")) if not (Path(shards) / NAME).exists() else []
        self.files |= dict.fromkeys(tars)
        return bool(tars)

    def _miss(self, what: str) -> None:
        if what not in self.unseen:
            self.unseen.append(what)


def leakage(examples: Sequence[Example], corpora: Corpora, processes: int | None = None) -> dict[str, Any]:
    """Count the examples that share 13 consecutive words with the training text.

    Case, accents and punctuation are ignored. An example of 4 to 12 words is leaked if it occurs as a whole.

    Args:
        examples: Test examples of a task.
        corpora: The training text.
        processes: Processes that read; default: one for a small text, else one per core.

    Returns:
        `examples`, `too_short` (below 4 words, and not looked for), `found`, `share`, `training_documents`, `where` of
        the first leaked ones, and `not_looked_at`, the sources that could not be searched. `found` and `share` are None
        if nothing could be.
    """
    owners: Owners = defaultdict(set)
    too_short = 0
    for number, example in enumerate(examples):
        words = _words(f"{example.text} {example.pair or ''}")
        too_short += len(words) < FEWEST_WORDS
        if len(words) >= FEWEST_WORDS:
            for ngram in _ngrams(words, min(WORDS, len(words))):
                owners[ngram].add(number)
    files = list(corpora.files.items())
    if processes is None:
        processes = 1 if sum(size_of(file) for file, _ in files) < ALONE else (os.cpu_count() or 1)
    leaked: set[int] = set()
    documents = 0
    for found, read in _scan_all(dict(owners), files, min(processes, len(files))):
        leaked |= found
        documents += read
    return {
        "examples": len(examples),
        "too_short": too_short,
        "found": len(leaked) if files else None,
        "share": len(leaked) / len(examples) if files else None,
        "training_documents": documents,
        "where": [examples[number].location for number in sorted(leaked)][:LISTED],
        "not_looked_at": corpora.unseen,
    }


def _scan_all(
    owners: Owners, files: Sequence[tuple[Path | InputFile, str | Reading | None]], processes: int
) -> Iterator[tuple[set[int], int]]:
    if processes <= 1:
        yield from (_scan(owners, *file) for file in files)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _Searcher.take, (owners,)) as pool:
        yield from pool.map(_Searcher.scan, files)


class _Searcher:
    """The runs of words that a process searches for, sent to it once."""

    owners: Owners

    @classmethod
    def take(cls, owners: Owners) -> None:
        cls.owners = owners

    @classmethod
    def scan(cls, file: tuple[Path | InputFile, str | Reading | None]) -> tuple[set[int], int]:
        return _scan(cls.owners, *file)


def _scan(owners: Owners, file: Path | InputFile, how: str | Reading | None) -> tuple[set[int], int]:
    """Search one file; return the leaked examples and the number of documents."""
    sizes = sorted({len(ngram) for ngram in owners})
    leaked: set[int] = set()
    documents = 0
    for text in _texts(file, how):
        documents += 1
        words = _words(text)
        for size in sizes:
            for ngram in _ngrams(words, size):
                if ngram in owners:
                    leaked |= owners[ngram]
    return leaked, documents


def name_of(file: Path | InputFile) -> str:
    """Path or URL of a file."""
    return file.name if isinstance(file, InputFile) else str(file)


def size_of(file: Path | InputFile) -> int:
    """Bytes of a file."""
    return file.size if isinstance(file, InputFile) else file.stat().st_size


def _texts(file: Path | InputFile, how: str | Reading | None) -> Iterator[str]:
    if isinstance(file, InputFile):
        assert isinstance(how, Reading)
        yield from (text.text.decode("utf-8", "replace") for text in read_texts(file, how))
        return
    backend = load_tokenizer(how).backend if isinstance(how, str) else None
    reader = ShardReader(file.open("rb", buffering=0), str(file))
    try:
        for document in range(len(reader)):
            yield backend.decode(reader.ids(document).tolist()) if backend else reader.text(document)
    finally:
        reader.close()


def _words(text: str) -> list[str]:
    """List the words in lower case without accents, which shards of some tokenizers lack or write in another form."""
    return _WORD.findall(text.lower() if text.isascii() else _MARK.sub("", normalize("NFKD", text.lower())))


def _ngrams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + size]) for start in range(len(words) - size + 1))
