"""What a shard set holds, and whether it is what its manifest says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.units import format_count
from datapipe.manifest import Manifest, read_manifest, verify
from datapipe.order import permutation
from datapipe.packing import packing_ratio
from datapipe.shards import DamagedError, ShardReader, read_index
from datapipe.tokenizer import load_tokenizer

PACKED = 20_000
"""Documents the packing ratio is foretold from."""
SAMPLES = 3
SAMPLE_CHARACTERS = 200
ROWS = (1024, 8192)
"""Sequence lengths for which the packing ratio is foretold."""


@dataclass(frozen=True)
class ShardReport:
    """A shard set that is whole."""

    directory: Path
    manifest: Manifest
    lengths: NDArray[np.int64]
    """[documents] tokens of each, without special tokens."""
    samples: tuple[tuple[str, str], ...]
    """Key and the beginning of the decoded text of some documents; none where the tokenizer is not to be had."""

    @property
    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, below, documents) for lengths by powers of two."""
        bins = np.maximum(np.log2(np.maximum(self.lengths, 1)).astype(int), 0)
        return [(2**b, 2 ** (b + 1), int(count)) for b, count in zip(*np.unique(bins, return_counts=True), strict=True)]

    def packing_ratio(self, row: int) -> float:
        """Share of real tokens to expect in rows of `row` tokens, special tokens counted."""
        parts = np.split(self.lengths, np.cumsum([shard.documents for shard in self.manifest.shards])[:-1])
        # As a stream reads them: shard by shard, since documents of a shard may be alike.
        lengths = np.concatenate([part[permutation(len(part), "inspect")] for part in parts])
        return packing_ratio((lengths[:PACKED] + 2).tolist(), row)

    def __str__(self) -> str:
        manifest, lengths = self.manifest, self.lengths
        most = max(count for *_, count in self.histogram)
        lines = [
            f"{self.directory}: {len(manifest.shards)} shards, {manifest.documents:,} documents, "
            f"{format_count(manifest.tokens)} tokens; every sha256, count and id is right",
            f"  tokenizer   {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} entries",
            f"  lengths     {lengths.mean():,.0f} tokens on average, median {np.median(lengths):,.0f}, "
            f"longest {lengths.max():,}",
            *(
                f"    {low:>9,} - {high - 1:<9,} {'#' * max(1, 40 * count // most)} {count:,}"
                for low, high, count in self.histogram
            ),
            "  packing     "
            + ", ".join(f"{self.packing_ratio(row):.1%} of rows of {row:,} tokens filled" for row in ROWS),
        ]
        lines += source_lines(manifest)
        return "\n".join([*lines, *(f"  {key}   {text!r}" for key, text in self.samples)])


def source_lines(manifest: Manifest) -> list[str]:
    """Of each source, for people: what it holds, and how many of its documents were left out, by reason."""
    lines = []
    for name, counts in manifest.sources.items():
        left_out = ", ".join(f"{n:,} {why}" for why, n in counts.items() if why not in ("documents", "tokens"))
        tokens = counts.get("tokens", 0)
        share = tokens / max(1, manifest.tokens)
        lines.append(
            f"  source      {name}: {counts.get('documents', 0):,} documents, {format_count(tokens)} tokens "
            f"({share:.1%})" + (f"; left out: {left_out}" if left_out else "")
        )
    return lines


def inspect_shards(directory: Path) -> ShardReport:
    """Read every byte of a shard set. Raises InputError naming everything in which it differs from its manifest."""
    manifest = read_manifest(directory)
    if not manifest.documents:
        raise InputError(f"{directory} holds no documents; prepare it again from text that has some")
    problems = verify(directory)
    if not problems:
        lengths, problems = _read(directory, manifest)
    if problems:
        raise InputError("\n".join([f"{directory} is damaged", *problems]) + "\ncopy it again, or prepare it anew")
    return ShardReport(directory, manifest, lengths, _samples(directory, manifest))


def _read(directory: Path, manifest: Manifest) -> tuple[NDArray[np.int64], list[str]]:
    """Tokens of every document, and every document that cannot be used."""
    lengths: list[int] = []
    problems: list[str] = []
    for shard in manifest.shards:
        path = directory / shard.name
        reader = ShardReader(path.open("rb", buffering=0), str(path))
        index = read_index(path.with_suffix(".idx"), shard)
        if index is not None and not np.array_equal(index, reader.spans):
            problems.append(f"{path.with_suffix('.idx')}: not where the documents of {path.name} lie; delete it")
        tokens = 0
        for document in range(len(reader)):
            try:
                ids = reader.ids(document)
            except DamagedError as error:
                problems.append(str(error))
                continue
            lengths.append(len(ids))
            tokens += len(ids)
            if len(ids) and int(ids.max()) >= manifest.tokenizer.vocab_size:
                problems.append(f"{reader.name}, document {document}: id {ids.max()} is beyond the vocabulary")
        found = (len(reader), tokens)
        if found != (shard.documents, shard.tokens):
            problems.append(f"{reader.name}: {found} documents and tokens, not {(shard.documents, shard.tokens)}")
        reader.close()
    return np.array(lengths, np.int64), problems


def _samples(directory: Path, manifest: Manifest) -> tuple[tuple[str, str], ...]:
    try:
        tokenizer = load_tokenizer(manifest.tokenizer.name)
    except InputError:
        return ()
    if tokenizer.sha256 != manifest.tokenizer.sha256:  # another one by now lies where the name points to
        return ()
    samples: list[tuple[str, str]] = []
    filled: Sequence[int] = [number for number, shard in enumerate(manifest.shards) if shard.documents]
    for shard in (filled[i] for i in permutation(len(filled), "inspect")[:SAMPLES]):
        path = directory / manifest.shards[shard].name
        reader = ShardReader(path.open("rb", buffering=0), str(path))
        document = len(reader) // 2
        text = tokenizer.backend.decode(reader.ids(document)[:SAMPLE_CHARACTERS].tolist())
        samples.append((f"{path.name}[{document}]", text[:SAMPLE_CHARACTERS]))
        reader.close()
    return tuple(samples)
