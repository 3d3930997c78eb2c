"""The files that are text: found in folders, by globs, behind URLs or on standard input, each read once."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from glob import has_magic, iglob
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any

from configs.errors import InputError
from configs.schema import Reading
from datapipe.decoding import COMPRESSED, DAMAGE, decompress
from datapipe.disk import disk_errors_as_input_errors
from datapipe.input_file import ARCHIVES, InputFile, annotations_of, format_of, formats, printable, without_secrets
from datapipe.listing import Entry, LocalEntry, RemoteEntry
from datapipe.manifest import NAME as MANIFEST
from datapipe.notes import Notes
from datapipe.paths import PREFIX, local_path
from datapipe.splits import Splits

JOURNAL = ".prepare.jsonl"
"""File in an unfinished output of `detour prepare`."""
DESCRIBING = ("state.json", "dataset_dict.json", MANIFEST)
"""Files that tell which files beside them are read."""
STDIN = "-"
MANY = 10
"""Files named one by one of the same folder from which the folder is their source."""
TABLE_LOGS = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table"}
"""Folders in tables that tell which of the files beside them are current."""
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"{": "json", b"[": "json", b"PK\x03\x04": "zip"}


def find_inputs(
    references: Sequence[str], reading: Reading, notes: Notes, exclude: Path | None = None
) -> list[InputFile]:
    """The text files that references name, in order and each once.

    Args:
        references: Files, folders, globs, URLs, `package://` samples, or `-` for standard input.
        reading: Split and format of the files.
        notes: Receives what is not read, and why.
        exclude: Folder that is no input.

    Raises:
        InputError: There is no such file, or no text file in a folder.
    """
    finder = _Finder(references, reading, notes, exclude)
    finder.find(references)
    return finder.files


def find_members(archive: Entry, reading: Reading, notes: Notes) -> list[InputFile]:
    """The text files in an archive that is seen as a folder; none if it holds no text.

    Raises:
        InputError: None of its splits is the one to read, or a dataset in it is incomplete.
    """
    finder = _Finder((), reading, notes, None)
    finder.find_members(archive)
    return finder.files


def find_files(reference: str) -> list[InputFile]:
    """The text files that a reference names, by the default settings."""
    return find_inputs([reference], Reading(), Notes())


class _Finder:
    def __init__(self, references: Sequence[str], reading: Reading, notes: Notes, exclude: Path | None) -> None:
        self._reading, self._notes = reading, notes
        self._exclude = exclude.resolve() if exclude is not None else None
        self._seen: dict[object, str] = {}
        self._splits = Splits(reading.split, notes)
        self._tables: set[PurePath] = set()
        self.files: list[InputFile] = []
        self._met = 0
        self._sources = _source_names(references)

    def find_members(self, archive: Entry) -> None:
        """Find the files in an archive."""
        self._walk(archive, "")
        if self._splits.are_several:  # others may be in another archive
            self._splits.require_found()

    def find(self, references: Sequence[str]) -> None:
        """Find the files that references name."""
        for reference in references:
            self._met = 0
            self._find(reference)
            if not self._met:
                self._splits.require_found()
                self._refuse_empty(reference)
        if not any(file.format in ARCHIVES for file in self.files):  # whose members may have splits
            self._splits.require_found()
        kinds = Counter(file.format for file in self.files)
        if len(self.files) > 1:
            self._notes.add(f"read: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())} files", "", "")

    def _refuse_empty(self, reference: str) -> None:
        unread = "\n".join(["", *self._notes.lines()])
        raise InputError(
            f"{printable(reference)}: no text files in there; Detour reads {formats()}{unread}", code="no-text-files"
        )

    def _find(self, reference: str) -> None:
        if reference == STDIN:
            self._spool(sys.stdin.buffer, "standard input", "stdin")
        elif "://" in reference and not reference.startswith(PREFIX):
            self._find_remote(reference)
        else:
            self._find_local(reference)

    def _find_local(self, reference: str) -> None:
        path = local_path(reference)
        source = self._sources[reference]
        if path.is_dir():
            self._walk(LocalEntry(path), source)
        elif not path.exists() and has_magic(str(path)):
            matches = [LocalEntry(Path(match)) for match in sorted(iglob(str(path), recursive=True))]  # noqa: PTH207
            if not matches:
                raise InputError(f"{path}: no file matches", code="no-such-file")
            self._take_all(matches, source)
        elif not path.exists():
            raise InputError(f"{printable(path)}: no such file or directory", code="no-such-file")
        elif not path.is_file():
            try:
                with path.open("rb", buffering=0) as pipe:
                    self._spool(pipe, printable(path), source)
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}", code="not-readable") from None
        else:
            self._add_named(LocalEntry(path), source)

    def _format(self, path: PurePath) -> str | None:
        """Tell the format by the name, or by that of the folder: Spark writes x.jsonl/part-00000.

        `--format` tells it where no name does, and what a table called .txt is.
        """
        kind = format_of(path.name) or (format_of(path.parent.name) if not path.suffix else None)
        return self._reading.format or kind if kind in (None, "txt") else kind

    def _add_named(self, file: Entry, source: str) -> None:
        """Add a file that was named itself: it may be hidden, and must be text."""
        kind = self._format(file.path)
        if kind is None:
            raise InputError(
                f"{file.shown}: not a text format that Detour reads; it reads {formats()}; "
                "--format tells the format of another name",
                code="unknown-format",
            )
        if kind in ("json", "csv", "tsv") and self._reading.format not in (None, kind):
            raise InputError(
                f"{file.shown}: its name says {kind}, and --format says {self._reading.format}; rename the file, or "
                "leave out --format",
                key="--format",
                code="unknown-format",
            )
        self._add(file, kind, source)

    def _add(self, file: Entry, kind: str, source: str) -> None:
        self._met += 1
        if kind == "parquet" and (folder := _table_folder(file.path)) not in self._tables:
            self._tables.add(folder)
            self._refuse_table(file.entries_of(folder))
        if self._is_first(file):
            self.files.append(file.input_file(source, kind))

    def _is_first(self, entry: Entry) -> bool:
        name = entry.shown
        first = self._seen.setdefault(entry.identity(), name)
        if first is not name:
            self._notes.add("named twice, read once", f"{name}, the same file as {first}")
        return first is name

    def _walk(self, folder: Entry, source: str) -> None:
        entries = _entries(folder)
        members = {entry.path.name: entry for entry in entries}
        if folder.identity() == self._exclude or JOURNAL in members or _json_list(members, MANIFEST, "shards"):
            self._notes.unread("a folder of shards", "made by Detour", folder.shown)
            return
        if not self._is_first(folder):
            return
        named = _json_list(members, "state.json", "_data_files")
        splits = [str(split) for split in _json_list(members, "dataset_dict.json", "splits")]
        if named:
            self._read_dataset(folder, members, [str(file["filename"]) for file in named], source)
        elif splits:
            for split in self._splits.choose(splits, folder.shown) or splits:
                if split not in members:
                    raise _incomplete(folder, split, "dataset_dict.json")
                self._walk(members[split], source)
        else:
            self._take_all(entries, source)

    def _read_dataset(self, folder: Entry, members: dict[str, Entry], names: list[str], source: str) -> None:
        """The files that a saved Hugging Face dataset names, because files beside them are caches."""
        for name in names:
            if name not in members:
                raise _incomplete(folder, name, "state.json")
            self._add(members[name], "arrow", source)
        for name, entry in members.items():
            if name not in (*names, "state.json", "dataset_info.json"):
                self._notes.unread(_kind(name), "beside a saved dataset, a cache", entry.shown)

    def _take_all(self, entries: Sequence[Entry], source: str) -> None:
        self._refuse_table(entries)
        may_hold_text = [entry.path for entry in entries if self._format(entry.path) or entry.is_folder()]
        left_out = self._splits.left_out(may_hold_text)
        annotated = {annotations_of(entry.path.name) for entry in entries if self._format(entry.path) == "txt"}
        for entry in entries:
            name, shown = entry.path.name, entry.shown
            if name in annotated and entry.path.suffix == ".ann":
                continue
            if _is_hidden(name):
                self._notes.unread("hidden", "its name begins with . or _", shown)
            elif entry.path in left_out:
                self._notes.unread(f"split {left_out[entry.path]}", "another split is read", shown)
            elif entry.is_folder():
                self._walk(entry, source)
            elif flaw := entry.flaw():
                self._notes.unread(*flaw, shown)
            elif name.startswith("cache-") and entry.path.suffix == ".arrow":
                self._notes.unread("cache-*.arrow", "a cache of Hugging Face datasets", shown)
            elif name in DESCRIPTIONS:
                self._notes.unread("description", "it describes a Hugging Face dataset", shown)
            elif (kind := self._format(entry.path)) is None:
                self._notes.unread(_kind(name), "no format that Detour reads", shown)
            else:
                self._add(entry, kind, source)

    @staticmethod
    def _refuse_table(entries: Sequence[Entry]) -> None:
        """Raise InputError if entries of a folder say that files beside or below are of older versions of a table."""
        for entry in entries:
            log: Entry | None = entry
            table = TABLE_LOGS.get(entry.path.name)
            if entry.path.name == "metadata" and entry.is_folder():
                inner = _entries(entry) or entry.entries_of(entry.path)
                log = next((file for file in inner if file.path.name.endswith(".metadata.json")), None)
                table = "an Iceberg table"
            if log and table:
                raise InputError(
                    f"{log.shown}: {table}, whose folder also holds rows that were deleted or replaced; write its "
                    "current version as parquet into another folder",
                    code="table-with-versions",
                )

    def _find_remote(self, url: str) -> None:
        import fsspec

        shown = without_secrets(url)
        is_web = url.startswith(("http:", "https:"))
        if is_web and has_magic(url.partition("?")[0].partition("://")[2].partition("/")[2]):
            raise InputError(f"{shown}: a web server lists no files; name each of them", code="no-listing")
        if url.startswith(("pipe:", "gopen", "file+")) or "::" in url:
            raise InputError(f"{shown}: Detour reads text from files, s3://, gs:// and https://", code="unknown-scheme")
        try:
            system, root = fsspec.core.url_to_fs(url)
            matches = not is_web and has_magic(root)
            found = system.glob(root, detail=True) if matches else {root: system.info(root)}
            entries = [_remote_entry(system, path, info) for path, info in sorted(found.items())]
        except (ImportError, ValueError) as error:
            raise InputError(f"{shown}: {error}; pip install 'detour-train[remote]'", code="unknown-scheme") from None
        except FileNotFoundError as error:
            cause = error.__cause__  # fsspec says so too of a server that cannot be reached or refuses the user
            if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410):
                raise InputError(f"{shown}: no such file", code="no-such-file") from None
            raise _unreadable(shown, cause) from None
        except Exception as error:  # every store's client has its own family of errors
            raise _unreadable(shown, error) from None
        source = self._sources[url]
        if not entries:
            raise InputError(f"{shown}: no file matches", code="no-such-file")
        if matches:
            self._take_all(entries, source)
        elif entries[0].is_folder():
            self._walk(entries[0], source)
        else:
            self._add_named(entries[0], source)

    def _spool(self, stream: IO[bytes], name: str, source: str) -> None:
        """Copy a pipe into a temporary file, because a pipe is read once and its text more often."""
        with disk_errors_as_input_errors(Path(tempfile.gettempdir())):
            spool = tempfile.NamedTemporaryFile(prefix="detour-stdin-")  # noqa: SIM115
            shutil.copyfileobj(stream, spool, 2**20)
            spool.flush()
        try:
            with Path(spool.name).open("rb", buffering=0) as file:
                head = decompress(file, "")[1].removeprefix(b"\xef\xbb\xbf").lstrip()
        except DAMAGE as error:
            raise InputError(f"{name} cannot be read: {error}", code="not-readable") from None
        kind: str | None = self._reading.format
        kind = kind or next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
        if kind is None and head:
            raise InputError(
                f"{name}: its format is not clear; name it, such as --format csv", key="--format", code="unknown-format"
            )
        self._met += 1
        self.files.append(InputFile(source, name, kind or "txt", os.fstat(spool.fileno()).st_size, spool=spool))


def _source_names(references: Sequence[str]) -> dict[str, str]:
    """Name of the source per reference: that of the file or folder, or of the folder of many files."""
    plain = [reference for reference in references if reference != STDIN]
    folders = Counter(_parent(reference) for reference in plain)
    return {
        reference: "stdin"
        if reference == STDIN
        else _name(_parent(reference) if folders[_parent(reference)] >= MANY else reference)
        for reference in references
    }


def _parent(reference: str) -> str:
    return reference.rstrip("/").rpartition("/")[0] or "."


def _name(reference: str) -> str:
    """The name of the file or directory, also if it is given as `.` or by a glob."""
    if "://" in reference:
        parts = reference.partition("?")[0].split("/")
        return next(part for part in reversed(parts) if part and not has_magic(part))
    path = local_path(reference)
    while has_magic(path.name) and not path.exists():
        path = path.parent
    return printable(path.name if path.name.strip(".") else path.resolve().name) or "root"


def _remote_entry(system: Any, path: str, info: dict[str, Any]) -> RemoteEntry:
    is_folder = info["type"] == "directory"
    return (
        RemoteEntry(system, path, {}, system.find(path, detail=True)) if is_folder else RemoteEntry(system, path, info)
    )


def _entries(folder: Entry) -> list[Entry]:
    """Return the files and folders in a folder, sorted by name.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return folder.entries()
    except OSError as error:
        raise InputError(f"{folder.shown} cannot be read: {error.strerror}", code="not-readable") from None


def _table_folder(path: PurePath) -> PurePath:
    """The folder of the table whose data file this would be: partitions, and Iceberg's `data`, are below it."""
    folder = path.parent
    while "=" in folder.name or folder.name == "data":
        folder = folder.parent
    return folder


def _incomplete(folder: Entry, name: str, named_by: str) -> InputError:
    return InputError(
        f"{folder.shown}/{name} is missing, and {named_by} beside it names it; copy the dataset again",
        code="dataset-incomplete",
    )


def _unreadable(shown: str, error: BaseException) -> InputError:
    reason = without_secrets(f"{type(error).__name__}: {error}")
    return InputError(f"{shown} cannot be read: {reason}", code="not-readable")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and not PurePosixPath(name).suffix)


def _kind(name: str) -> str:
    suffixes = PurePosixPath(name).suffixes[-2:]
    if suffixes and suffixes[-1].lower() in COMPRESSED:
        return printable("".join(suffixes))
    return printable(suffixes[-1]) if suffixes else "no suffix"


def _json_list(members: dict[str, Entry], name: str, key: str) -> list[Any]:
    """A list in a JSON file of a folder; empty if there is no such file or key.

    Raises:
        InputError: The file cannot be read.
    """
    if name not in members:
        return []
    try:
        return list(json.loads(members[name].read())[key])
    except (ValueError, KeyError, TypeError):
        return []
    except OSError as error:
        raise _unreadable(members[name].shown, error) from None
