"""The members of a tar and where they begin, whatever wrote it and however damaged it is."""

from __future__ import annotations

import os
import re
import tarfile
from typing import IO, NamedTuple

from configs.errors import InputError

BLOCK = 512
"""Bytes of a tar header; members start at multiples of it."""
_OCTAL = re.compile(rb"[0-7]{11}[ \0]")


class DamagedError(InputError):
    """A shard, or a document in it, that cannot be used; `on_error: skip` leaves it out."""

    def __init__(self, message: str, *, code: str | None = "shard-damaged") -> None:
        super().__init__(message, code=code)

    def copy(self) -> DamagedError:
        """The same error without a traceback, to raise again a fault that is remembered."""
        return DamagedError(str(self), code=self.code)


class Member(NamedTuple):
    """A regular file of a tar."""

    name: bytes
    offset: int
    """Byte at which its content begins."""
    size: int
    """Bytes of its content."""


def pread(file: IO[bytes], size: int, offset: int, name: str) -> bytes:
    """Read bytes at an offset.

    Raises:
        InputError: The machine cannot read the file.
    """
    try:
        return os.pread(file.fileno(), size, offset)
    except OSError as error:  # a fault of the machine, not of the shard, so that no document is skipped for it
        raise InputError(f"shard {name} cannot be read: {error.strerror}", code="not-readable") from None


def tar_members(file: IO[bytes], name: str) -> tuple[list[Member], DamagedError | None]:
    """Regular files of a tar in order, and the fault that stopped the walk early, if there is one.

    Plain ustar headers are read here, because tarfile takes far longer per member. At any other header, such as a pax
    or GNU one or a damaged one, tarfile reads the whole tar instead.
    """
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return [], DamagedError(f"shard {name} is empty", code="shard-empty")
    members: list[Member] = []
    window, start, position = b"", 0, 0
    while position + BLOCK <= size:
        at = position - start
        if at + BLOCK > len(window):
            window, start, at = pread(file, 1 << 18, position, name), position, 0
        header = window[at : at + BLOCK]
        if not any(header):
            return members, None
        if header[257:263] != b"ustar\0" or header[156:157] not in (b"0", b"\0") or header[345:346] != b"\0":
            return _members_by_tarfile(file, name)
        if not _OCTAL.fullmatch(header, 124, 136):  # `int` would take a sign as well, and the walk would never end
            return _members_by_tarfile(file, name)
        length = int(header[124:135], 8)
        members.append(Member(header[: header.index(b"\0")], position + BLOCK, length))
        position += BLOCK + -(-length // BLOCK) * BLOCK
    return members, DamagedError(
        f"shard {name} is truncated: {size:,} bytes end before the tar's end mark", code="shard-truncated"
    )


def _members_by_tarfile(file: IO[bytes], name: str) -> tuple[list[Member], DamagedError | None]:
    members = []
    last = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.size < 0 or info.offset <= last:  # tarfile would read the same member for ever
                    raise tarfile.ReadError(f"file {info.name!r} has a size of {info.size}")
                last = info.offset
                if info.isfile():
                    members.append(Member(info.name.encode(errors="surrogateescape"), info.offset_data, info.size))
    except OSError as error:
        raise InputError(f"shard {name} cannot be read: {error.strerror}", code="not-readable") from None
    except (tarfile.TarError, ValueError, OverflowError) as error:
        return members, DamagedError(f"shard {name} is damaged after {len(members)} files: {error}")
    return members, None
