"""Files and folders, of this machine and of remote stores, under one interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Protocol

from datapipe.input_file import InputFile, printable, without_secrets


class Entry(Protocol):
    """A file or folder."""

    @property
    def path(self) -> PurePath:
        """The path, of which a URL's query is no part."""

    @property
    def shown(self) -> str:
        """Path or URL for messages."""

    def is_folder(self) -> bool:
        """Whether it is a folder, or a link to one."""

    def flaw(self) -> tuple[str, str] | None:
        """Why no program can read it, as kind and reason; None for a usual file."""

    def identity(self) -> object:
        """Return what two names of the same file or folder have in common."""

    def entries(self) -> list[Entry]:
        """Return the files and folders in a folder, sorted by name.

        Raises:
            OSError: It cannot be read.
        """

    def entries_of(self, folder: PurePath) -> list[Entry]:
        """The files and folders in a folder; none if it cannot be listed."""

    def read(self) -> bytes:
        """The content of the file.

        Raises:
            OSError: It cannot be read.
        """

    def input_file(self, source: str, kind: str) -> InputFile:
        """The file as text of a source, in a format."""


@dataclass(frozen=True)
class LocalEntry:
    """A file or folder of this machine."""

    path: Path

    @property
    def shown(self) -> str:
        """Path for messages."""
        return printable(self.path)

    def is_folder(self) -> bool:
        """Whether it is a folder, or a link to one."""
        return self.path.is_dir()

    def flaw(self) -> tuple[str, str] | None:
        """Why no program can read it."""
        if self.path.is_symlink() and not self.path.exists():
            return "link", "it leads nowhere"
        return None if self.path.is_file() else ("special", "no regular file")

    def identity(self) -> object:
        """A folder's real path; a file's device and number there."""
        if self.is_folder():
            return self.path.resolve()
        info = self.path.stat()
        return info.st_dev, info.st_ino

    def entries(self) -> list[Entry]:
        """Return the files and folders in a folder, sorted by name."""
        return [LocalEntry(path) for path in sorted(self.path.iterdir())]

    def entries_of(self, folder: PurePath) -> list[Entry]:
        """The files and folders in a folder; none if it cannot be listed."""
        try:
            return LocalEntry(Path(folder)).entries()
        except OSError:
            return []

    def read(self) -> bytes:
        """The content of the file."""
        return self.path.read_bytes()

    def input_file(self, source: str, kind: str) -> InputFile:
        """The file as text of a source."""
        return InputFile(source, self.shown, kind, self.path.stat().st_size, self.path)


@dataclass(frozen=True, eq=False)
class RemoteEntry:
    """A file or folder of a store. Stores have files alone; folders are what the names have in common."""

    system: Any = field(repr=False)
    """fsspec's file system."""
    url: str
    """Path in it."""
    info: Mapping[str, Any] = field(repr=False)
    """All that the store tells of a file; empty for a folder."""
    files: Mapping[str, Mapping[str, Any]] | None = field(default=None, repr=False)
    """A folder's files at any depth: their `info` by path; None for a file."""

    @cached_property
    def path(self) -> PurePosixPath:
        """The path without the query of a signed URL."""
        return PurePosixPath(self.url.partition("?")[0])

    @property
    def shown(self) -> str:
        """URL for messages."""
        return without_secrets(self.system.unstrip_protocol(self.url))

    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.files is not None

    def flaw(self) -> tuple[str, str] | None:
        """Nothing: a store has usual files alone."""
        return None

    def identity(self) -> object:
        """Return the whole URL."""
        return self.system.unstrip_protocol(self.url), self.is_folder()

    def entries(self) -> list[Entry]:
        """Return the files and folders in a folder, sorted by name."""
        found: list[Entry] = []
        folders: dict[str, dict[str, Mapping[str, Any]]] = {}
        for path, info in (self.files or {}).items():
            name, _, rest = path.removeprefix(self.url).lstrip("/").partition("/")
            if rest:
                folders.setdefault(path.removesuffix(f"/{rest}"), {})[path] = info
            elif name:
                found.append(RemoteEntry(self.system, path, info))
        found += [RemoteEntry(self.system, path, {}, files) for path, files in folders.items()]
        return sorted(found, key=lambda entry: entry.path)

    def entries_of(self, folder: PurePath) -> list[Entry]:
        """The files and folders in a folder, whose own folders seem empty; none if it cannot be listed.

        A web server lists no folders.
        """
        if self.shown.startswith("http"):
            return []
        try:
            found = self.system.ls(str(folder), detail=True)
        except Exception:  # every store's client has its own family of errors
            return []
        return [
            RemoteEntry(self.system, info["name"], info, {} if info["type"] == "directory" else None) for info in found
        ]

    def read(self) -> bytes:
        """The content of the file."""
        content: bytes = self.system.cat_file(self.url)
        return content

    def input_file(self, source: str, kind: str) -> InputFile:
        """The file as text of a source."""
        size, version = self.info.get("size") or 0, str(self.info)
        return InputFile(source, self.shown, kind, size, system=self.system, url=self.url, version=version)
