"""From the bytes of a file to characters: compression and encoding, given or detected."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from typing import IO, Any

import zstandard

from configs.errors import InputError

COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""First bytes of compressed files, by suffix."""
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""Errors by which the decompressors tell that a file is damaged or cut off."""
HEAD = 2**20
"""Bytes from which the encoding is detected."""
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FEW = 64
"""Bytes beyond ASCII below which a detector only guesses."""
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r")) + b"\x7f"
_C1 = re.compile(rb"\xc2[\x80-\x84\x86-\x9f]")  # all but NEL, which is a line break


def decompress(file: IO[bytes], name: str) -> tuple[IO[bytes], bytes]:
    """The content of a file, decompressed if its first bytes say that it is compressed.

    Args:
        file: The file at its start.
        name: File name; a compression that its suffix names must be there.

    Returns:
        The stream, and up to HEAD bytes of its start, which the stream gives as well.

    Raises:
        OSError: It is damaged, or not compressed as its name says; other errors of DAMAGE too.
    """
    start = _read(file, 8)
    stream: Any = _Prefixed(start, file)
    named = next((suffix for suffix in COMPRESSED if name.lower().endswith(suffix)), None)
    kind = next((suffix for suffix, magic in COMPRESSED.items() if start.startswith(magic)), None)
    if named not in (None, kind) and start:
        raise OSError(f"it is no {named} file")
    if kind == ".gz":
        stream = gzip.GzipFile(fileobj=io.BufferedReader(stream))
    elif kind == ".bz2":
        stream = bz2.BZ2File(io.BufferedReader(stream))
    elif kind == ".xz":
        stream = lzma.LZMAFile(io.BufferedReader(stream))  # noqa: SIM115
    elif kind == ".zst":
        stream = _Zstandard(stream)
    head = _read(stream, HEAD)
    return io.BufferedReader(_Prefixed(head, stream), 2**18), head


def _read(stream: Any, size: int) -> bytes:
    """Up to `size` bytes; fewer only at the end."""
    parts, got = [], 0
    while got < size and (part := stream.read(size - got)):
        parts.append(part)
        got += len(part)
    return b"".join(parts)


class _Prefixed(io.RawIOBase):
    """A stream whose first bytes have been read already."""

    def __init__(self, start: bytes, stream: Any) -> None:
        self._start, self._stream = memoryview(start), stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._start[: len(buffer)] if self._start else self._stream.read(len(buffer))
        self._start = self._start[len(content) :]
        buffer[: len(content)] = content
        return len(content)


class _Zstandard(io.RawIOBase):
    """Frames of zstandard; unlike the library's own reader it tells a file that ends inside a frame."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._frame: Any = None
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        rest = b""
        while not self._content:
            compressed = rest or self._stream.read(2**16)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstandard frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._content = memoryview(self._frame.decompress(compressed))
            rest = b""
            if self._frame.eof:
                rest, self._frame = self._frame.unused_data, None
                if rest:
                    self._stream = _Prefixed(rest, self._stream)
                    rest = b""
        content, self._content = self._content[: len(buffer)], self._content[len(buffer) :]
        buffer[: len(content)] = content
        return len(content)


def detect_encoding(head: bytes) -> str | None:
    """The encoding of a file by its first bytes; None if they are no text in any known one.

    UTF-8, UTF-16 and UTF-32 are recognised with and without a byte order mark; others are the likeliest guess.
    """
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    wide = _wide(head)
    if wide is not None:
        return wide
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD)
        return "utf-8"
    except UnicodeDecodeError:
        return likely_codec(head)


def _wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark, by the places of the zero bytes among text of few scripts."""
    sample = head[: min(4096, len(head) // 4 * 4)]
    if len(sample) < 8 or (len(head) % 2 and len(head) < HEAD):
        return None
    zeros = [sample[i::4].count(0) / (len(sample) / 4) for i in range(4)]
    if zeros[2] > 0.9 and zeros[3] > 0.9 and zeros[0] < 0.1:
        return "utf-32-le"
    if zeros[0] > 0.9 and zeros[1] > 0.9 and zeros[3] < 0.1:
        return "utf-32-be"
    if min(zeros[1], zeros[3]) > 0.5 and max(zeros[0], zeros[2]) < 0.1:
        return "utf-16-le"
    if min(zeros[0], zeros[2]) > 0.5 and max(zeros[1], zeros[3]) < 0.1:
        return "utf-16-be"
    return None


def likely_codec(content: bytes) -> str | None:
    """The likeliest codec of text that is not UTF-8; Windows-1252 where few bytes leave it open."""
    from charset_normalizer import from_bytes

    try:
        western: str | None = content.decode("cp1252") and "cp1252"
    except UnicodeDecodeError:
        western = None
    beyond_ascii = len(content) - len(content.translate(None, bytes(range(128, 256))))
    if western and beyond_ascii < _FEW and beyond_ascii < len(content) / 3:
        return western
    best = from_bytes(content[: 2**16] if beyond_ascii > 2**12 else content).best()
    if best is None:
        return western
    if western and western in best.could_be_from_charset:
        return western
    return best.encoding


def require_codec(name: str) -> str:
    """Return the name of an encoding that Python knows.

    Raises:
        InputError: There is no such text encoding.
    """
    try:
        if codecs.lookup(name)._is_text_encoding:  # noqa: SLF001
            return name
    except LookupError:
        pass
    raise InputError(
        f"--encoding {name}: no such encoding; known are utf-8, utf-16, utf-32, cp1252, latin-1 and Python's others",
        key="--encoding",
        code="unknown-encoding",
    )


def has_control_characters(text: bytes) -> bool:
    """Whether UTF-8 text holds NUL or other control characters, line breaks and tabs aside."""
    return len(text.translate(None, _CONTROL)) != len(text) or _C1.search(text) is not None
