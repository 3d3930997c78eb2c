"""From the bytes of a file to characters: compression and encoding, given or detected."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import IO, Any

import zstandard

from configs.errors import InputError

COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""First bytes of compressed files, by suffix."""
LFS = b"version https://git-lfs"
"""First bytes of the file that Git LFS leaves in place of a large one."""
LFS_FAULT = "it is the pointer of Git LFS to a file; git lfs pull fetches it"
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
_DAMAGED = 5
"""Whole UTF-8 characters per byte that is none, from which a text is damaged UTF-8. Legacy encodings stay below 2."""
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
    start = read_fully(file, 8)
    stream: Any = Forward(file, start)
    named = next((suffix for suffix in COMPRESSED if name.lower().endswith(suffix)), None)
    kind = next((suffix for suffix, magic in COMPRESSED.items() if start.startswith(magic)), None)
    if named not in (None, kind) and start:
        raise OSError(f"it is no {named} file")
    if kind == ".gz":
        stream = gzip.GzipFile(fileobj=io.BufferedReader(stream))
    elif kind == ".bz2":
        stream = _Parts(stream, bz2.BZ2Decompressor, "bz2")
    elif kind == ".xz":
        stream = _Parts(stream, lzma.LZMADecompressor, "xz")
    elif kind == ".zst":
        stream = _Parts(stream, _frame, "zstandard")
    head = read_fully(stream, HEAD)
    return io.BufferedReader(Forward(stream, head), 2**18), head


def read_fully(stream: Any, size: int) -> bytes:
    """Up to `size` bytes; fewer only at the end."""
    parts, got = [], 0
    while got < size and (part := stream.read(size - got)):
        parts.append(part)
        got += len(part)
    return b"".join(parts)


class Forward(io.RawIOBase):
    """A stream that is read from its start to its end only, whatever it says of itself.

    Args:
        stream: The stream.
        start: Bytes that have been read from it already.
    """

    def __init__(self, stream: Any, start: bytes = b"") -> None:
        self._start, self._stream = memoryview(start), stream
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes read so far."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read up to as many bytes as the buffer has."""
        content = self._start[: len(buffer)] if self._start else self._stream.read(len(buffer))
        self._start = self._start[len(content) :]
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


class _Parts(io.RawIOBase):
    """The content of all compressed streams in a file, which tells a file that ends inside one, and what is none.

    The standard library's readers of bz2 and xz take bytes after a stream that begin no other one for its end. Zero
    bytes may fill up a file, or the space between two streams of xz.

    Args:
        stream: The file.
        new: Returns a decompressor of one stream.
        kind: Name of the compression.
    """

    def __init__(self, stream: Any, new: Callable[[], Any], kind: str) -> None:
        self._stream, self._new, self._kind = stream, new, kind
        self._part: Any = None
        self._rest = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            compressed = self._rest or self._stream.read(2**14)
            self._rest = b""
            if not compressed:
                if self._part is not None:
                    raise EOFError(f"the file ends inside a stream of {self._kind}")
                return 0
            if self._part is None:
                compressed = compressed.lstrip(b"\0")
                if not compressed:
                    continue
                self._part = self._new()
            self._content = memoryview(self._part.decompress(compressed))
            if self._part.eof:
                self._rest, self._part = self._part.unused_data, None
        content, self._content = self._content[: len(buffer)], self._content[len(buffer) :]
        buffer[: len(content)] = content
        return len(content)


def _frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


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
    return "utf-8" if is_utf8(head) else likely_codec(head)


def is_utf8(head: bytes) -> bool:
    """Whether text is UTF-8, of which a few characters may be damaged; the last one may be cut off at HEAD bytes."""
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head, final=len(head) < HEAD)
    if text.isascii():
        return True
    whole = text.encode("utf-8", "ignore").decode()
    bad = len(text) - len(whole)
    return len(whole) - len(whole.encode("ascii", "ignore")) >= _DAMAGED * bad


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
    matches = from_bytes(content[: 2**16] if beyond_ascii > 2**12 else content)
    best = matches.best()
    if best is None:
        return western
    # Some guesses are equally good: Spanish is as likely Central European (cp1250).
    ties = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    if western and any(western in (match.encoding, *match.could_be_from_charset) for match in ties):
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
