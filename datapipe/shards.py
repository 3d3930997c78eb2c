"""One shard: a WebDataset tar of token ids, read by document number.

In format 1 a sample is a document: `KEY.ids.npy`, a 1-D uint16 or uint32 array without special tokens, and `KEY.json`,
its metadata. In format 2, which `ShardWriter` writes, a sample holds many documents: the ids of one after the other,
`KEY.lengths.npy` with the tokens of each, and `KEY.crc32.npy` with the checksum of each. Where tokens are marked
(`datapipe.identifiers`), `KEY.marked.npy` has a bit per token, the highest bit of a byte first.
`webdataset.WebDataset` reads both: `detour inspect` does so. Training reads them by `ShardReader` instead, because
WebDataset's tar iteration cannot do three things:

- Seek. An exact, resumable order needs any document by its number; WebDataset reads a tar from its start.
- Refuse code. WebDataset unpickles `.pkl` and `.pth` members and runs `pipe:` URLs; a shard may come from anywhere.
- Survive hostile or damaged headers. Each fault here is found, named with its document, and either stops the run or is
  skipped.
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from datapipe.decoding import COMPRESSED, DAMAGE, decompress
from datapipe.manifest import Shard
from datapipe.packed_index import CHECKSUMS, LENGTHS, NPY, PackedIndex, any_npy, packed_index
from datapipe.tar_members import DamagedError, Member, pread, tar_members

PICKLED = (b".pkl", b".pickle", b".pyd", b".pt", b".pth")
"""Extensions that WebDataset unpickles. Unpickling runs code of the file, so such shards are refused."""
REMEDY = "copy it again, or run `detour prepare` into a new directory"
"""End of the message about a shard that is not what its manifest says."""
PREPARE_SPANS = "`detour prepare` marks them, and raw text is trained on as it is"
"""Remedy for raw text that names its identifiers."""
_COMPRESSED = {suffix.encode() for suffix in COMPRESSED}
_CRC = re.compile(rb'"crc32": (\d+)')
Span = tuple[int, int, int]
"""Offset of a document and its bytes, -1 for a duplicate. Last, for ids the bytes until the end of their metadata, for
text JSON_TEXT and COMPRESSED_TEXT."""
JSON_TEXT, COMPRESSED_TEXT = 1, 2
"""Bits of a span of raw text."""


class ShardReader:
    """Reads documents of one tar by number, in the order of the tar. Not thread-safe.

    Opening walks through the headers of the tar, or takes its index. A document is then one `pread`, not a slice of a
    memory map, because a file truncated under a map kills the process.

    Args:
        file: The tar, opened unbuffered; the reader closes it.
        name: Path or URL, for messages.
        index: Spans of the documents, if they are known.

    Raises:
        InputError: The shard has pickled members, or the machine cannot read it.
    """

    def __init__(self, file: IO[bytes], name: str, index: NDArray[np.int64] | None = None) -> None:
        self.name = name
        self._file = file
        self.bytes = os.fstat(file.fileno()).st_size
        self.problem: DamagedError | None = None
        """The reason why the tar cannot be read to its end, if there is one."""
        self.raw = False
        """Whether its documents are text and not ids."""
        self._packed: PackedIndex | None = None
        self._names: list[bytes] = []
        """Members of the documents of raw text."""
        self.spans = self._walk() if index is None else index
        """`[documents, 3] int64`, one `Span` per document; empty in format 2."""

    def _walk(self) -> NDArray[np.int64]:
        members, self.problem = tar_members(self._file, self.name)
        _require_no_pickles(members, self.name)
        if any(member.name.endswith((LENGTHS, CHECKSUMS)) for member in members):
            self._packed, problem = packed_index(self._file, members, self.name)
            self.problem = problem or self.problem
            return np.empty((0, 3), np.int64)
        spans, texts, self._names = _documents(members)
        self.raw = not spans and bool(texts)
        if self.raw and any(member.name.endswith(b".ann") for member in members):
            raise InputError(f"shard {self.name} has brat .ann files; {PREPARE_SPANS}", code="spans-in-raw-text")
        return np.array(texts if self.raw else spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.spans) if self._packed is None else len(self._packed.offsets)

    def ids(self, document: int) -> NDArray[Any]:
        """Token ids of a document, `[tokens]` uint16 or uint32.

        Raises:
            DamagedError: The document is missing, damaged, or no 1-D array of unsigned integers.
        """
        return self.document(document)[0]

    def document(self, document: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Token ids of a document, and `[tokens]`, those that are marked; None where no token of its sample is.

        Raises:
            DamagedError: The document is missing, damaged, or no 1-D array of unsigned integers.
        """
        if self._packed is not None:
            return self._packed_document(self._packed, document)
        content, size = self._read(document)
        label = f"shard {self.name}, document {document}"
        header = NPY.match(content)
        if header is None or header.end() + int(header[3]) * int(header[2]) != size:
            array = any_npy(content[:size], label)
        else:
            array = np.frombuffer(content, f"<u{int(header[2])}", int(header[3]), header.end())
        checksum = _CRC.search(content, size) if len(content) > size else None
        if checksum and int(checksum[1]) != zlib.crc32(array.data):
            raise DamagedError(f"{label}: the ids do not match their checksum", code="checksum-mismatch")
        return array, None

    def _packed_document(self, index: PackedIndex, document: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        self._require_document(document)
        size = int(index.sizes[document])
        content = pread(self._file, size, int(index.offsets[document]), self.name) if size else b""
        label = f"shard {self.name}, document {document}"
        if len(content) < size:
            raise DamagedError(f"{label}: the file ends inside it", code="shard-truncated")
        ids, marked = np.frombuffer(content, index.dtype), None
        if index.bits is not None and index.bits[document] >= 0:
            first, skipped = divmod(int(index.bits[document]), 8)
            bits = pread(self._file, (skipped + len(ids) + 7) // 8, first, self.name)
            marked = np.unpackbits(np.frombuffer(bits, np.uint8))[skipped : skipped + len(ids)].astype(bool)
        if checksum(ids, marked) != index.checksums[document]:
            raise DamagedError(f"{label}: the ids do not match their checksum", code="checksum-mismatch")
        return ids, marked

    def text(self, document: int) -> str:
        """A document of raw text.

        Raises:
            DamagedError: The document is missing, damaged, or neither text nor JSON with a `text`.
        """
        content, _ = self._read(document)
        member = self._names[document].decode(errors="backslashreplace")
        label = f"shard {self.name}, document {document} ({member})"
        kind = int(self.spans[document, 2])
        try:
            if kind & COMPRESSED_TEXT:
                with decompress(io.BytesIO(content), member)[0] as stream:
                    content = stream.read()
            record = json.loads(content) if kind & JSON_TEXT else {"text": content.removeprefix(BOM_UTF8).decode()}
            text, spans = record["text"], record.get("spans")
        except (*DAMAGE, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedError(
                f'{label}: neither UTF-8 text nor JSON with a "text"; `detour prepare` reads other encodings',
                code="not-text",
            ) from None
        if not isinstance(text, str):
            raise DamagedError(f'{label}: "text" is not a string', code="not-text")
        if spans:
            raise DamagedError(f'{label}: it has "spans" of identifiers; {PREPARE_SPANS}', code="spans-in-raw-text")
        return text

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _require_document(self, document: int) -> None:
        if document >= len(self):
            if self.problem is not None:
                raise self.problem.copy()
            raise DamagedError(
                f"shard {self.name} holds {len(self)} documents, not {document + 1}", code="document-missing"
            )

    def _read(self, document: int) -> tuple[bytes, int]:
        """Bytes of a document with its metadata, and how many of them are the document's own."""
        self._require_document(document)
        offset, size, span = self.spans[document].tolist()
        label = f"shard {self.name}, document {document}"
        if size < 0:
            raise DamagedError(f"{label}: its key appears twice", code="duplicate-key")
        inside = offset + max(size, span) <= self.bytes
        content = pread(self._file, max(size, span), offset, self.name) if inside else b""
        if not inside or len(content) < max(size, span):
            raise DamagedError(f"{label}: the file ends inside it", code="shard-truncated")
        return content, size


def checksum(ids: NDArray[Any], marked: NDArray[np.bool_] | None) -> int:
    """CRC-32 of the ids, continued over their marks where the sample has marks, because a lost mark is a leak."""
    of_ids = zlib.crc32(ids.data)
    return of_ids if marked is None else zlib.crc32(np.packbits(marked).tobytes(), of_ids)


def _require_no_pickles(members: list[Member], name: str) -> None:
    for member in members:
        if member.name.endswith(PICKLED):
            raise InputError(
                f"shard {name} holds the pickled member {member.name.decode(errors='replace')!r}: "
                "reading it could run code, so it is refused; take it out of the shard",
                code="pickled-member",
            )


def _documents(members: list[Member]) -> tuple[list[Span], list[Span], list[bytes]]:
    """Spans of the documents of ids, and spans of the documents of raw text with the names of their members."""
    spans: list[Span] = []
    texts: list[Span] = []
    names: list[bytes] = []
    text_numbers: dict[bytes, int] = {}
    keys: set[bytes] = set()
    key = b""
    for member in members:
        stem, _, extension = member.name.rpartition(b".")
        if extension == b"npy" and stem.endswith(b".ids"):
            key = stem.removesuffix(b".ids")
            # A second document of a key is a sample to some readers and an error to others.
            spans.append((member.offset, -1 if key in keys else member.size, 0))
            keys.add(key)
        elif extension == b"json" and spans and stem == key:
            offset, size, _ = spans[-1]
            spans[-1] = (offset, size, member.offset + member.size - offset if size >= 0 else 0)
        elif not spans and not member.name.rpartition(b"/")[2].startswith(b"."):
            kind = 0
            if b"." + extension.lower() in _COMPRESSED:
                stem, _, extension = stem.rpartition(b".")
                kind = COMPRESSED_TEXT
            if extension.lower() not in (b"txt", b"json"):
                continue
            is_json = extension.lower() == b"json"
            kind |= JSON_TEXT * is_json
            number = text_numbers.setdefault(stem, len(texts))
            if number < len(texts) and bool(texts[number][2] & JSON_TEXT) != is_json:
                if not is_json:  # the .json before it is its metadata
                    texts[number], names[number] = (member.offset, member.size, kind), member.name
                continue
            # A second text of a key is a sample to some readers and an error to others.
            texts.append((member.offset, member.size if number == len(texts) else -1, kind))
            names.append(member.name)
    return spans, texts, names


def read_index(path: Path, shard: Shard) -> NDArray[np.int64] | None:
    """Spans of the documents of a shard, `[documents, 3]`; None if `path` is no index of exactly this shard."""
    try:
        with path.open("rb") as file:
            spans = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError):
        return None
    if spans.dtype != np.int64 or spans.shape != (shard.documents, 3):
        return None
    inside = not len(spans) or (spans.min() >= 0 and (spans[:, 0] + spans[:, 1:].max(axis=1)).max() <= shard.bytes)
    return spans if inside else None


def webdataset_samples(path: Path) -> Iterator[dict[str, bytes]]:
    """Read a local tar in order by WebDataset's own tar iteration: the members of each sample, by extension.

    Call it for a tar that `ShardReader` has found whole and free of pickles.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch

    with path.open("rb") as stream:
        yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
