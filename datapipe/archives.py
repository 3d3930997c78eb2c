"""Documents of the members of zip and tar archives; nothing is unpacked onto the disk."""

from __future__ import annotations

import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import IO, Any, cast

from configs.errors import InputError
from datapipe.decoding import COMPRESSED, DAMAGE, LFS, LFS_FAULT, Forward, decompress, read_fully
from datapipe.identifiers import NO_SPANS
from datapipe.input_file import ARCHIVES, InputFile, printable
from datapipe.inputs import DESCRIBING, find_members
from datapipe.listing import RemoteEntry
from datapipe.records import Content, Record

Reader = Callable[[Content, str, IO[bytes]], Iterator[Record]]
"""Reads content of a format."""
_IN_MEMORY = 2**24
_MAGIC = tuple(COMPRESSED.values())


def read_zip(content: Content, read: Reader, raw: IO[bytes]) -> Iterator[Record]:
    """Yield the records of the members of a zip archive."""
    try:
        with zipfile.ZipFile(seekable(raw, content.name)) as archive:
            names = [(info, _path(info.filename)) for info in archive.infolist()]
            members = {path: info for info, path in names if not info.filename.endswith(("/", "\\"))}
            try:
                chosen = _choose(content, members, lambda path: _read_zipped(archive, members[path]))
            except InputError as error:
                yield error
                return
            for info, path in names:
                if path not in members:
                    continue
                if members[path] is not info:
                    _note_replaced(content, path)
                    continue
                try:
                    yield from _member(content, read, path, chosen.get(path), lambda info=info: archive.open(info))  # type: ignore[misc]
                except (RuntimeError, NotImplementedError) as error:  # a password, or an unknown compression
                    reason = "it needs a password; unpack the archive" if info.flag_bits & 1 else error
                    yield content.fault(f"cannot be read: {reason}", "not-readable", printable(info.filename))
                except (zlib.error, lzma.LZMAError, EOFError) as error:
                    yield content.fault(f"damaged ({error})", "not-readable", printable(info.filename))
    except zipfile.BadZipFile as error:
        yield content.fault(f"no readable zip file ({error})", "not-readable")


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(info)
    except (RuntimeError, NotImplementedError, zipfile.BadZipFile, *DAMAGE) as error:
        raise OSError(str(error)) from None


def read_tar(content: Content, read: Reader, raw: IO[bytes]) -> Iterator[Record]:
    """Yield the records of the members of a tar archive, compressed or not."""
    suffixed = "" if content.name.lower().endswith((".tgz", ".tar")) else content.name
    if not raw.seekable():
        raw, suffixed = seekable(raw, suffixed), ""
    members, places = _list_tar(raw)
    try:
        chosen = _choose(content, members, lambda path: members[path])
    except InputError as error:
        yield error
        return
    stream, _ = decompress(raw, suffixed)
    tail = _Tail(stream)
    try:
        with tarfile.open(fileobj=tail, mode="r|", errorlevel=2) as archive:  # type: ignore[call-overload]
            for info in archive:
                if info.isfile():
                    path = _path(info.name)
                    if info.offset < places.get(path, 0):
                        _note_replaced(content, path)
                        continue
                    opened = cast("Any", lambda info=info: Forward(archive.extractfile(info)))
                    yield from _member(content, read, path, chosen.get(path), opened)
                elif not info.isdir():
                    content.notes.unread("link in a tar", "no regular file", f"{content.name}!{printable(info.name)}")
            while tail.read(2**16):  # to the end, so that a compressed file that is cut off is told
                pass
        if any(tail.last):
            yield content.fault("it ends before the end mark of a tar: it is cut off", "not-readable")
    except tarfile.TarError as error:
        yield content.fault(f"no readable tar file ({error})", "not-readable")


def _note_replaced(content: Content, path: PurePosixPath) -> None:
    """Tell of a member that unpacking would replace by a later one, which `tar --append` and `--update` add."""
    content.notes.unread("replaced", "a later member has the same name", f"{content.name}!{printable(str(path))}")


def _list_tar(raw: IO[bytes]) -> tuple[dict[PurePosixPath, bytes], dict[PurePosixPath, int]]:
    """The files of a tar up to where it is damaged: the content of those that describe others, and the last places.

    A tar has no list of its members, and the choice between splits needs all names.
    """
    members: dict[PurePosixPath, bytes] = {}
    places: dict[PurePosixPath, int] = {}
    is_compressed = read_fully(raw, 8).startswith(_MAGIC)
    raw.seek(0)
    with suppress(tarfile.TarError, *DAMAGE):
        stream: Any = decompress(raw, "")[0] if is_compressed else raw
        with tarfile.open(fileobj=stream, mode="r|" if is_compressed else "r:") as archive:
            last = -1
            for info in archive:
                if info.offset <= last:  # a negative size; tarfile would read the same member for ever
                    break
                last = info.offset
                if info.isfile():
                    path = _path(info.name)
                    file = archive.extractfile(info) if path.name in DESCRIBING else None
                    members[path] = file.read(_IN_MEMORY) if file else b""
                    places[path] = info.offset
    raw.seek(0)
    return members, places


def _path(member: str) -> PurePosixPath:
    """The path of a member; older tools of Windows write backslashes."""
    return PurePosixPath(member.replace("\\", "/"))


def _leads_out(path: PurePosixPath) -> bool:
    return path.is_absolute() or ".." in path.parts


class _Members:
    """Answers what a RemoteEntry asks of its file system, for the members of an archive."""

    def __init__(self, root: str, read: Callable[[PurePosixPath], bytes]) -> None:
        self._root, self._read = root, read

    def url(self, path: PurePosixPath) -> str:
        """The place of a member. A `?` would begin the query of a URL."""
        return f"{self._root}/{path}".replace("?", "%3F")

    def unstrip_protocol(self, url: str) -> str:
        """The place of a member as messages name it."""
        return printable(url.replace(f"{self._root}/", self._root, 1))

    def ls(self, folder: str, detail: bool) -> list[Any]:
        """Nothing, because an archive is read from its root on."""
        return []

    def cat_file(self, url: str) -> bytes:
        """The content of a member that describes others."""
        return self._read(PurePosixPath(url.removeprefix(f"{self._root}/")))


def _choose(
    content: Content, paths: Iterable[PurePosixPath], read: Callable[[PurePosixPath], bytes]
) -> Mapping[PurePosixPath, InputFile]:
    """The members that are read, by the rules of folders.

    Raises:
        InputError: None of the splits is the one to read, or a dataset is incomplete.
    """
    root = f"{content.name.partition('?')[0]}!"
    members = _Members(root, read)
    urls = {path: members.url(path) for path in paths if not _leads_out(path)}
    archive = RemoteEntry(members, root, {}, {url: {} for url in urls.values()})
    try:
        found = {file.url: file for file in find_members(archive, content.reading, content.notes)}
    except InputError as error:
        raise error if root in str(error) else InputError(f"{root} {error}", key=error.key, code=error.code) from None
    return {path: found[url] for path, url in urls.items() if url in found}


def _member(
    content: Content, read: Reader, path: PurePosixPath, file: InputFile | None, open_member: Callable[[], Any]
) -> Iterator[Record]:
    name = f"{content.name}!{printable(str(path))}"
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    if _leads_out(path):
        yield InputError(
            f"{name}: a member that leads out of its archive; make the archive again", code="unsafe-member"
        )
    elif path.suffix.lower() == ".ann" and content.reading.spans != NO_SPANS and not is_hidden:
        yield InputError(
            f"{name}: .ann files are read beside .txt files only; unpack the archive, or give --spans none",
            code="spans-in-archive",
        )
    elif file is not None and file.format in ARCHIVES:
        content.notes.unread("an archive in an archive", "unpack it first", name)
    elif file is not None:
        inner = Content(name, content.position, content.reading, content.notes, partition=file.partition)
        try:
            with open_member() as stream:
                yield from read(inner, file.format, stream)
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
        start = read_fully(stream, len(LFS))
        stream.seek(0)
        if start == LFS:
            raise OSError(LFS_FAULT)
        if not start.startswith(_MAGIC) and not name.lower().endswith(tuple(COMPRESSED)):
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
