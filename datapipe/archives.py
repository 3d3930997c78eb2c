"""Documents of the members of zip and tar archives; nothing is unpacked onto the disk."""

from __future__ import annotations

import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from configs.errors import InputError
from datapipe.decoding import COMPRESSED, Forward, decompress, read_fully
from datapipe.identifiers import NO_SPANS
from datapipe.input_file import format_of, printable
from datapipe.records import Content, Record

Reader = Callable[[Content, str, IO[bytes]], Iterator[Record]]
"""Reads content of a format."""
_IN_MEMORY = 2**24


def read_zip(content: Content, read: Reader, raw: IO[bytes]) -> Iterator[Record]:
    """Yield the records of the members of a zip archive."""
    try:
        with zipfile.ZipFile(seekable(raw, content.name)) as archive:
            for info in archive.infolist():
                if info.filename.endswith(("/", "\\")):
                    continue
                try:
                    yield from _member(content, read, info.filename, lambda info=info: archive.open(info))  # type: ignore[misc]
                except (RuntimeError, NotImplementedError) as error:  # a password, or an unknown compression
                    reason = "it needs a password; unpack the archive" if info.flag_bits & 1 else error
                    yield content.fault(f"cannot be read: {reason}", "not-readable", printable(info.filename))
                except (zlib.error, lzma.LZMAError, EOFError) as error:
                    yield content.fault(f"damaged ({error})", "not-readable", printable(info.filename))
    except zipfile.BadZipFile as error:
        yield content.fault(f"no readable zip file ({error})", "not-readable")


def read_tar(content: Content, read: Reader, raw: IO[bytes]) -> Iterator[Record]:
    """Yield the records of the members of a tar archive, compressed or not."""
    stream, _ = decompress(raw, content.name if not content.name.lower().endswith((".tgz", ".tar")) else "")
    tail = _Tail(stream)
    try:
        with tarfile.open(fileobj=tail, mode="r|", errorlevel=2) as archive:  # type: ignore[call-overload]
            for info in archive:
                if info.isfile():
                    yield from _member(content, read, info.name, lambda info=info: Forward(archive.extractfile(info)))  # type: ignore[misc]
                elif not info.isdir():
                    content.notes.unread("link in a tar", "no regular file", f"{content.name}!{printable(info.name)}")
            while tail.read(2**16):  # to the end, so that a compressed file that is cut off is told
                pass
        if any(tail.last):
            yield content.fault("it ends before the end mark of a tar: it is cut off", "not-readable")
    except tarfile.TarError as error:
        yield content.fault(f"no readable tar file ({error})", "not-readable")


def _member(content: Content, read: Reader, member: str, open_member: Callable[[], Any]) -> Iterator[Record]:
    path, name = PurePosixPath(member.replace("\\", "/")), f"{content.name}!{printable(member)}"
    kind = format_of(path.name) or (format_of(path.parent.name) if not path.suffix else None) or content.reading.format
    if path.is_absolute() or ".." in path.parts:
        yield InputError(
            f"{name}: a member that leads out of its archive; make the archive again", code="unsafe-member"
        )
    elif any(part.startswith((".", "__MACOSX")) for part in path.parts):
        content.notes.unread("hidden in an archive", "its name begins with .", name)
    elif path.suffix.lower() == ".ann" and content.reading.spans != NO_SPANS:
        yield InputError(
            f"{name}: .ann files are read beside .txt files only; unpack the archive, or give --spans none",
            code="spans-in-archive",
        )
    elif kind is None:
        content.notes.unread(f"{path.suffix or 'no suffix'} in an archive", "no format that Detour reads", name)
    elif kind in ("zip", "tar"):
        content.notes.unread("an archive in an archive", "unpack it first", name)
    else:
        inner = Content(name, content.position, content.reading, content.notes, partition=content.partition)
        try:
            with open_member() as stream:
                yield from read(inner, kind, stream)
        except zipfile.BadZipFile as error:
            yield InputError(f"{name}: damaged ({error})", code="not-readable")


def seekable(stream: IO[bytes], name: str) -> IO[bytes]:
    """The stream, or a copy in a temporary file if it is compressed or cannot be read from any place.

    Args:
        stream: The stream at its start.
        name: File name; a compression that its suffix names must be there.

    Raises:
        OSError: It is damaged, or not compressed as its name says; other errors of DAMAGE too.
    """
    if stream.seekable():
        start = read_fully(stream, 8)
        stream.seek(0)
        if not start.startswith(tuple(COMPRESSED.values())) and not name.lower().endswith(tuple(COMPRESSED)):
            return stream
    stream, _ = decompress(stream, name)
    copy = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
    while content := stream.read(2**20):
        copy.write(content)
    copy.seek(0)
    return copy


class _Tail:
    """Reads a stream and remembers its last block."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self.last = (self.last + content[-512:])[-512:] if content else self.last
        return content
