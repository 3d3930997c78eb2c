"""One shard: a WebDataset tar of token ids, written to the same bytes each time and read at random."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from datapipe.manifest import Shard

BLOCK = 512
"""Bytes of a tar header; members start at multiples of it."""
PICKLED = (b".pkl", b".pickle", b".pyd", b".pt", b".pth")
"""Extensions WebDataset unpickles. Unpickling runs whatever code the file holds, so such shards are refused."""
# What numpy writes for a 1-D uint16 or uint32 array; anything else is read, or refused, by numpy's own reader.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '<u([24])', 'fortran_order': False, 'shape': \((\d+),\), \} *\n", re.S
)
_OCTAL = re.compile(rb"[0-7]{11}[ \0]")
_CRC = re.compile(rb'"crc32": (\d+)')


class DamagedError(InputError):
    """A shard, or a document in it, cannot be used."""


class Member(NamedTuple):
    """Where one file of a tar lies."""

    name: bytes
    offset: int
    size: int


class ShardReader:
    """Documents of one tar by number, in the order of the tar. Not thread-safe.

    Opening walks through the tar's headers, or takes its index; a document is then one `pread`. Members are plain
    reads rather than a memory map: a file truncated under a map kills the process. Raises InputError for a shard with
    pickled members.
    """

    def __init__(self, file: IO[bytes], name: str, index: NDArray[np.int64] | None = None) -> None:
        self.name = name
        self._file = file
        self.bytes = os.fstat(file.fileno()).st_size
        self.problem: str | None = None
        """Why the tar could not be read to its end, if it could not."""
        self.raw = False
        """Whether its documents are text rather than ids."""
        self.spans = self._walk() if index is None else index
        """[documents, 3] as `Span`."""

    def _walk(self) -> NDArray[np.int64]:
        members, self.problem = _members(self._file, self.name)
        spans, texts = _documents(members, self.name)
        self.raw = not spans and bool(texts)
        return np.array(texts if self.raw else spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.spans)

    def ids(self, document: int) -> NDArray[Any]:
        """uint16 or uint32 [tokens]. Raises DamagedError for a document that is not there, is damaged, or is no 1-D
        array of unsigned integers.
        """
        content, size = self._read(document)
        where = f"shard {self.name}, document {document}"
        header = _NPY.match(content)
        if header is None or header.end() + int(header[3]) * int(header[2]) != size:
            array = _any_npy(content[:size], where)
        else:
            array = np.frombuffer(content, f"<u{int(header[2])}", int(header[3]), header.end())
        checksum = _CRC.search(content, size) if len(content) > size else None
        if checksum and int(checksum[1]) != zlib.crc32(array.data):
            raise DamagedError(f"{where}: the ids do not match their checksum")
        return array

    def text(self, document: int) -> str:
        """A document of raw text. Raises DamagedError."""
        content, _ = self._read(document)
        where = f"shard {self.name}, document {document}"
        try:
            text = json.loads(content)["text"] if self.spans[document, 2] else content.decode()
        except (ValueError, KeyError, TypeError):
            raise DamagedError(f'{where}: neither UTF-8 text nor JSON with a "text"') from None
        if not isinstance(text, str):
            raise DamagedError(f'{where}: "text" is not a string')
        return text

    def close(self) -> None:
        self._file.close()

    def _read(self, document: int) -> tuple[bytes, int]:
        """The document's bytes with those of its metadata, and how many are its own."""
        if document >= len(self.spans):
            raise DamagedError(self.problem or f"shard {self.name} holds {len(self)} documents, not {document + 1}")
        offset, size, span = self.spans[document].tolist()
        if size < 0:
            raise DamagedError(f"shard {self.name}, document {document}: its key appears twice")
        inside = offset + max(size, span) <= self.bytes
        content = _pread(self._file, max(size, span), offset, self.name) if inside else b""
        if not inside or len(content) < max(size, span):
            raise DamagedError(f"shard {self.name}, document {document}: the file ends inside it")
        return content, size


Span = tuple[int, int, int]
"""Offset, bytes (-1: a duplicate), and for ids the bytes until the end of their metadata, for text 1 if it is JSON."""


def _pread(file: IO[bytes], size: int, offset: int, name: str) -> bytes:
    try:
        return os.pread(file.fileno(), size, offset)
    except OSError as error:  # the machine's fault, not the shard's, so nothing is skipped for it
        raise InputError(f"shard {name} cannot be read: {error.strerror}") from None


def _documents(members: list[Member], name: str) -> tuple[list[Span], list[Span]]:
    """Where the documents of ids lie, and where those of raw text do."""
    spans: list[Span] = []
    texts: list[Span] = []
    places: dict[bytes, int] = {}
    keys: set[bytes] = set()
    key = b""
    for member in members:
        if member.name.endswith(PICKLED):
            raise InputError(
                f"shard {name} holds the pickled member {member.name.decode(errors='replace')!r}: "
                "reading it could run code, so it is refused; take it out of the shard"
            )
        stem, _, extension = member.name.rpartition(b".")
        if extension == b"npy" and stem.endswith(b".ids"):
            key = stem.removesuffix(b".ids")
            # A second document of a key is a second sample to some readers and an error to others.
            spans.append((member.offset, -1 if key in keys else member.size, 0))
            keys.add(key)
        elif extension == b"json" and spans and stem == key:
            offset, size, _ = spans[-1]
            spans[-1] = (offset, size, member.offset + member.size - offset if size >= 0 else 0)
        elif extension in (b"txt", b"json"):
            kind = int(extension == b"json")
            place = places.setdefault(stem, len(texts))
            if place == len(texts):
                texts.append((member.offset, member.size, kind))
            elif texts[place][2] == kind:
                texts.append((member.offset, -1, kind))
            elif extension == b"txt":  # the .json before it is its metadata
                texts[place] = (member.offset, member.size, kind)
    return spans, texts


def _any_npy(content: bytes, where: str) -> NDArray[Any]:
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy raises ValueError, SyntaxError, TokenError and more on bytes that are no array
        raise DamagedError(f"{where}: not a readable .npy array ({str(error).splitlines()[0]})") from None
    if array.ndim != 1 or array.dtype.kind != "u" or array.dtype.itemsize not in (2, 4):
        raise DamagedError(f"{where}: ids are {array.dtype} {list(array.shape)}, not uint16 or uint32 [tokens]")
    return array.astype(array.dtype.newbyteorder("="))


def _members(file: IO[bytes], name: str) -> tuple[list[Member], str | None]:
    """Regular files of a tar in order, and what stopped the reading early if something did.

    Walks the headers itself (a microsecond a member, 30 times less than tarfile) while they are plain ustar, and
    leaves anything else (pax and GNU headers, old formats, damage) to tarfile.
    """
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return [], f"shard {name} is empty"
    members: list[Member] = []
    window, start, position = b"", 0, 0
    while position + BLOCK <= size:
        at = position - start
        if at + BLOCK > len(window):
            window, start, at = _pread(file, 1 << 18, position, name), position, 0
        header = window[at : at + BLOCK]
        if not any(header):
            return members, None
        if header[257:263] != b"ustar\0" or header[156:157] not in (b"0", b"\0") or header[345:346] != b"\0":
            return _members_by_tarfile(file, name)
        if not _OCTAL.fullmatch(header, 124, 136):  # `int` would also take a sign, and never come to an end
            return _members_by_tarfile(file, name)
        length = int(header[124:135], 8)
        members.append(Member(header[: header.index(b"\0")], position + BLOCK, length))
        position += BLOCK + -(-length // BLOCK) * BLOCK
    return members, f"shard {name} is truncated: {size:,} bytes end before the tar's end mark"


def _members_by_tarfile(file: IO[bytes], name: str) -> tuple[list[Member], str | None]:
    members = []
    last = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.size < 0 or info.offset <= last:  # tarfile would read it again and again
                    raise tarfile.ReadError(f"file {info.name!r} has a size of {info.size}")
                last = info.offset
                if info.isfile():
                    members.append(Member(info.name.encode(errors="surrogateescape"), info.offset_data, info.size))
    except OSError as error:
        raise InputError(f"shard {name} cannot be read: {error.strerror}") from None
    except (tarfile.TarError, ValueError, OverflowError) as error:
        return members, f"shard {name} is damaged after {len(members)} files: {error}"
    return members, None


def npy_bytes(ids: NDArray[Any]) -> bytes:
    """A 1-D array as the bytes of a .npy file, as numpy.save writes it."""
    header = f"{{'descr': '{ids.dtype.str}', 'fortran_order': False, 'shape': ({len(ids)},), }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + ids.tobytes()


def tar_member(name: str, content: bytes) -> bytes:
    """One regular file of a ustar archive with fixed owner, mode and time, so that equal content gives equal bytes."""
    if len(name) > 100:
        raise ValueError(f"member name {name!r} is longer than the 100 characters of a ustar header")
    owner_mode = b"0000644\0" + 2 * b"0000000\0"
    size_time = f"{len(content):011o}\0{0:011o}\0".encode()
    header = name.encode().ljust(100, b"\0") + owner_mode + size_time + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000"
    header = header.ljust(BLOCK, b"\0")
    checksum = f"{sum(header):06o}\0 ".encode()
    return header[:148] + checksum + header[156:] + content + bytes(-len(content) % BLOCK)


TAR_END = bytes(2 * BLOCK)


class ShardWriter:
    """Writes one tar of documents, and beside it the index that spares its readers the walk through the headers.

    Both appear only when `close` is called. Equal documents give equal bytes. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_suffix(".partial")
        self._file = self._partial.open("wb")
        self._digest = hashlib.sha256()
        self._spans: list[Span] = []
        self._bytes = self._tokens = 0

    def add(self, ids: NDArray[Any], metadata: dict[str, Any]) -> None:
        """ids: uint16 or uint32 [tokens], without special tokens."""
        key = f"{self._path.stem}-{len(self._spans):06d}"
        array = npy_bytes(ids)
        described = json.dumps({**metadata, "crc32": zlib.crc32(ids.data)}, ensure_ascii=False).encode(
            "utf-8", "replace"
        )
        first = tar_member(f"{key}.ids.npy", array)
        self._spans.append((self._bytes + BLOCK, len(array), len(first) + len(described)))
        self._tokens += len(ids)
        self._write(first + tar_member(f"{key}.json", described))

    def close(self) -> Shard:
        self._write(TAR_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = self._path.with_suffix(".idx.partial")
        with index.open("wb") as file:
            np.lib.format.write_array(file, np.array(self._spans, np.int64).reshape(-1, 3), allow_pickle=False)
        index.replace(self._path.with_suffix(".idx"))
        self._partial.replace(self._path)
        return Shard(self._path.name, self._bytes, len(self._spans), self._tokens, self._digest.hexdigest())

    def discard(self) -> None:
        """Leave nothing behind."""
        self._partial.unlink(missing_ok=True)
        self._path.with_suffix(".idx.partial").unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._bytes += len(content)


def read_index(path: Path, shard: Shard) -> NDArray[np.int64] | None:
    """[documents, 3] where the documents of a shard lie; None where there is no index of exactly this shard."""
    try:
        with path.open("rb") as file:
            spans = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError):
        return None
    if spans.dtype != np.int64 or spans.shape != (shard.documents, 3):
        return None
    inside = not len(spans) or (spans.min() >= 0 and (spans[:, 0] + spans[:, 1:].max(axis=1)).max() <= shard.bytes)
    return spans if inside else None
