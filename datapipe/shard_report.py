"""The content of a shard set, and the check of it against its manifest."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.units import format_count
from datapipe.canaries import PLANTED
from datapipe.manifest import KEPT, Manifest, read_manifest, verify
from datapipe.manifest import NAME as MANIFEST
from datapipe.order import permutation
from datapipe.packing import packing_ratio
from datapipe.selection import HELD_OUT
from datapipe.shards import ShardReader, read_index, webdataset_samples
from datapipe.tar_members import DamagedError
from datapipe.tokenizer import Tokenizer, load_tokenizer

PACKED = 20_000
"""Documents from which the packing ratio is estimated."""
SAMPLES = 3
"""Shards from which a document is shown."""
SAMPLE_CHARACTERS = 200
SOURCES_SHOWN = 10
"""Largest sources of which each has a line."""
ROWS = (1024, 8192)
"""Sequence lengths for which the packing ratio is estimated."""


@dataclass(frozen=True)
class ShardReport:
    """The content of a shard set without damage."""

    directory: Path
    manifest: Manifest
    lengths: NDArray[np.int64]
    """`[documents] int64`, tokens per document, special tokens not counted."""
    samples: tuple[tuple[str, str], ...]
    """Key and beginning of the text of some documents; empty if their tokenizer is not available."""
    tokenizer: Tokenizer | None
    """The shards' tokenizer; None if it is not available, or another has its name by now."""

    @property
    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, below, documents) per power of two of the lengths."""
        bins = np.maximum(np.log2(np.maximum(self.lengths, 1)).astype(int), 0)
        return [(2**b, 2 ** (b + 1), int(count)) for b, count in zip(*np.unique(bins, return_counts=True), strict=True)]

    def packing_ratio(self, row: int) -> float:
        """Share of tokens that are not padding to expect in rows of `row` tokens, special tokens included."""
        parts = np.split(self.lengths, np.cumsum([shard.documents for shard in self.manifest.shards])[:-1])
        # In the order of a stream, shard by shard, because documents of a shard may be alike.
        lengths = np.concatenate([part[permutation(len(part), "inspect")] for part in parts])
        framing = 2 if self.tokenizer is None else self.tokenizer.framing_length
        return packing_ratio((lengths[:PACKED] + framing).tolist(), row)

    def __str__(self) -> str:
        manifest, lengths = self.manifest, self.lengths
        largest = max(count for *_, count in self.histogram)
        lines = [
            f"{size_line(self.directory, manifest)}; every sha256, count and id is right",
            f"  tokenizer   {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} entries",
            framing_line(manifest, self.tokenizer),
            f"  lengths     {lengths.mean():,.0f} tokens on average, median {np.median(lengths):,.0f}, "
            f"longest {lengths.max():,}",
            *(
                f"    {low:>9,} - {high - 1:<9,} {'#' * max(1, 40 * count // largest)} {count:,}"
                for low, high, count in self.histogram
            ),
            "  packing     "
            + ", ".join(f"{self.packing_ratio(row):.1%} of rows of {row:,} tokens filled" for row in ROWS),
        ]
        lines += [*source_lines(manifest), *overlap_lines(manifest)]
        if (self.directory / HELD_OUT / MANIFEST).exists():
            held_out = self.directory / HELD_OUT
            lines.append(f"  held out    {read_manifest(held_out).documents:,} documents; `detour inspect {held_out}`")
        return "\n".join([*lines, *(f"  {key}   {text!r}" for key, text in self.samples)])


def size_line(directory: Path, manifest: Manifest) -> str:
    """Describe a shard set in a line for people."""
    size = format_count(sum(shard.bytes for shard in manifest.shards))
    counts = f"{manifest.documents:,} documents, {format_count(manifest.tokens)} tokens"
    return f"{directory}: {counts} in {len(manifest.shards)} shards, {size}B on disk"


def framing_line(manifest: Manifest, tokenizer: Tokenizer | None) -> str:
    """Tell how documents are framed by special tokens."""
    if tokenizer is None:
        return f"  framing     unknown here, because {manifest.tokenizer.name} is not at hand or another by now"
    framed = format_count(manifest.tokens + tokenizer.framing_length * manifest.documents)
    return f"  framing     {tokenizer.framing}: {framed} tokens with the special tokens of each document"


def overlap_lines(manifest: Manifest) -> list[str]:
    """Count near-duplicates between training and held-out text, if any was held out."""
    compared, near = (
        sum(counts.get(key, 0) for counts in manifest.sources.values()) for key in ("compared", "near held-out")
    )
    if not compared:
        return []
    return [f"  overlap     {near:,} of {compared:,} training documents compared are near-duplicates of held-out ones"]


def source_lines(manifest: Manifest) -> list[str]:
    """Lines about the sources for people, the largest first: what is kept, and what is left out, by reason."""
    lines = []
    of_text = [item for item in manifest.sources.items() if item[0] != PLANTED]
    by_size = sorted(of_text, key=lambda item: -item[1].get("tokens", 0))
    for name, counts in by_size[:SOURCES_SHOWN]:
        left_out = ", ".join(f"{count:,} {why}" for why, count in counts.items() if why not in KEPT)
        tokens = counts.get("tokens", 0)
        share = tokens / max(1, manifest.tokens)
        facts = [f"{counts.get('documents', 0):,} documents", f"{format_count(tokens)} tokens ({share:.1%})"]
        if counts.get("longest"):
            facts.append(f"longest {counts['longest']:,} tokens")
        if counts.get("bytes") and tokens:
            facts.append(f"{counts['bytes'] / tokens:.2f} bytes per token")
        if counts.get("spans"):
            marked = f"{counts.get('marked', 0):,} marked tokens ({counts.get('marked', 0) / max(1, tokens):.1%})"
            facts.append(f"{counts['spans']:,} identifiers, {marked}")
        lines.append(f"  source      {name}: {', '.join(facts)}" + (f"; left out: {left_out}" if left_out else ""))
    if len(by_size) > SOURCES_SHOWN:
        rest = sum(counts.get("tokens", 0) for _, counts in by_size[SOURCES_SHOWN:])
        lines.append(f"  source      {len(by_size) - SOURCES_SHOWN:,} more: {format_count(rest)} tokens")
    if planted := manifest.sources.get(PLANTED):
        share = planted["tokens"] / max(1, manifest.tokens)
        copies = f"{planted['documents']:,} planted documents with random secrets, {share:.2%} of the tokens"
        lines.append(f"  canaries    {copies}; `detour audit RUN` measures what a model memorised")
    return lines + [
        f"  skipped     {count:,} faulty records; the first: {first}" for count, first in manifest.faults.values()
    ]


def inspect_shards(directory: Path) -> ShardReport:
    """Read every byte of a shard set.

    Raises:
        InputError: The set differs from its manifest; the message names every difference.
    """
    manifest = read_manifest(directory)
    if not manifest.documents:
        raise InputError(
            f"{directory} holds no documents; prepare it again from text that has some", code="no-documents"
        )
    problems = verify(directory)
    if not problems:
        lengths, problems = _read(directory, manifest)
    if problems:
        raise _damaged(directory, problems)
    tokenizer = _tokenizer(manifest)
    return ShardReport(directory, manifest, lengths, _samples(directory, manifest, tokenizer), tokenizer)


def _damaged(directory: Path, problems: Sequence[str]) -> InputError:
    message = "\n".join([f"{directory} is damaged", *problems, "copy it again, or prepare it anew"])
    return InputError(message, code="shards-damaged")


def _read(directory: Path, manifest: Manifest) -> tuple[NDArray[np.int64], list[str]]:
    """Tokens per document, and a line per problem."""
    lengths: list[int] = []
    problems: list[str] = []
    marks = 0
    for shard in manifest.shards:
        path = directory / shard.name
        reader = ShardReader(path.open("rb", buffering=0), str(path))
        index = read_index(path.with_suffix(".idx"), shard)
        if index is not None and not np.array_equal(index, reader.spans):
            problems.append(
                f"{path.with_suffix('.idx')}: it points to other documents than those of {path.name}; delete it"
            )
        tokens = 0
        for document in range(len(reader)):
            try:
                ids, marked = reader.document(document)
            except DamagedError as error:
                problems.append(str(error))
                continue
            lengths.append(len(ids))
            tokens += len(ids)
            marks += 0 if marked is None else int(marked.sum())
            if len(ids) and int(ids.max()) >= manifest.tokenizer.vocab_size:
                problems.append(f"{reader.name}, document {document}: id {ids.max()} is beyond the vocabulary")
        if (len(reader), tokens) != (shard.documents, shard.tokens):
            problems.append(
                f"{reader.name}: {len(reader):,} documents and {tokens:,} tokens, "
                f"not {shard.documents:,} and {shard.tokens:,}"
            )
        reader.close()
    counted = sum(counts.get("marked", 0) for counts in manifest.sources.values())
    if not problems and marks != counted:
        problems.append(f"{directory}: {marks:,} tokens of identifiers are marked, not {counted:,}")
    return np.array(lengths, np.int64), problems


def _samples(directory: Path, manifest: Manifest, tokenizer: Tokenizer | None) -> tuple[tuple[str, str], ...]:
    """A document from the middle of some shards, which WebDataset must read as `ShardReader` does."""
    samples: list[tuple[str, str]] = []
    filled: Sequence[int] = [number for number, shard in enumerate(manifest.shards) if shard.documents]
    for shard in (filled[i] for i in permutation(len(filled), "inspect")[:SAMPLES]):
        path = directory / manifest.shards[shard].name
        with closing(ShardReader(path.open("rb", buffering=0), str(path))) as reader:
            _require_same_by_webdataset(directory, path, reader)
            document = len(reader) // 2
            if tokenizer is not None:
                ids, marked = reader.document(document)
                shown = ids if marked is None else np.where(marked, tokenizer.mask_id, ids)
                text = tokenizer.backend.decode(shown[:SAMPLE_CHARACTERS].tolist(), skip_special_tokens=False)
                samples.append((f"{path.name}[{document}]", text[:SAMPLE_CHARACTERS]))
    return tuple(samples)


def _tokenizer(manifest: Manifest) -> Tokenizer | None:
    try:
        tokenizer = load_tokenizer(manifest.tokenizer.name)
    except InputError:
        return None
    return tokenizer if manifest.tokenizer.is_of(tokenizer) else None


def _require_same_by_webdataset(directory: Path, path: Path, reader: ShardReader) -> None:
    """Raise InputError unless WebDataset reads the same documents from a shard, so that other programs can."""
    document = -1
    try:
        for document, ids in enumerate(_webdataset_documents(path)):
            if not np.array_equal(ids, reader.ids(document)):
                raise ValueError("other ids")
    except (KeyError, ValueError, tarfile.TarError, DamagedError) as error:
        raise _damaged(directory, [f"{path}: WebDataset does not read document {document} ({error})"]) from None
    if document + 1 != len(reader):
        fault = f"{path}: WebDataset reads {document + 1:,} documents, not {len(reader):,}"
        raise _damaged(directory, [fault])


def _webdataset_documents(path: Path) -> Iterator[NDArray[np.uint16]]:
    for sample in webdataset_samples(path):
        arrays = {
            name: np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            for name, content in sample.items()
            if name in ("ids.npy", "lengths.npy")
        }
        if "lengths.npy" in arrays:
            yield from np.split(arrays["ids.npy"], np.cumsum(arrays["lengths.npy"], dtype=np.int64)[:-1])
        else:
            yield arrays["ids.npy"]
