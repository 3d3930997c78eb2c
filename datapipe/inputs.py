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
from pathlib import Path, PurePosixPath
from typing import IO, Any

from configs.errors import InputError
from configs.schema import Reading
from datapipe.decoding import COMPRESSED, DAMAGE, decompress
from datapipe.disk import disk_errors_as_input_errors
from datapipe.input_file import InputFile, annotations_of, format_of, formats, printable, without_secrets
from datapipe.manifest import NAME as MANIFEST
from datapipe.notes import Notes
from datapipe.paths import PREFIX, local_path
from datapipe.splits import P, Splits, split_of

JOURNAL = ".prepare.jsonl"
"""File in an unfinished output of `detour prepare`."""
STDIN = "-"
MANY = 10
"""Files named one by one of the same folder from which the folder is their source."""
DELTA_LOG = "_delta_log"
"""Folder in a Delta table that tells which of the files beside it are current."""
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
    return _Finder(references, reading, notes, exclude).files


def find_files(reference: str) -> list[InputFile]:
    """The text files that a reference names, by the default settings."""
    return find_inputs([reference], Reading(), Notes())


class _Finder:
    def __init__(self, references: Sequence[str], reading: Reading, notes: Notes, exclude: Path | None) -> None:
        self._reading, self._notes = reading, notes
        self._exclude = exclude.resolve() if exclude is not None else None
        self._seen: dict[object, str] = {}
        self._splits = Splits(reading.split, notes)
        self.files: list[InputFile] = []
        self._sources = _source_names(references)
        for reference in references:
            self._met = 0
            self._find(reference)
            if not self._met:
                self._splits.require_found()
                self._refuse_empty(reference)
        self._splits.require_found()
        kinds = Counter(file.format for file in self.files)
        if len(self.files) > 1:
            notes.add(f"read: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())} files", "", "")

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
            self._walk(path, source)
        elif not path.exists() and has_magic(str(path)):
            matches = [Path(match) for match in sorted(iglob(str(path), recursive=True))]  # noqa: PTH207
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
            kind = self._format(path)
            if kind is None:
                raise InputError(
                    f"{printable(path)}: not a text format that Detour reads; it reads {formats()}; "
                    "--format tells the format of another name",
                    code="unknown-format",
                )
            self._add_local(path, kind, source)

    def _format(self, path: Path | PurePosixPath) -> str | None:
        """Tell the format by the name, or by that of the folder: Spark writes x.jsonl/part-00000."""
        kind = format_of(path.name) or (format_of(path.parent.name) if not path.suffix else None)
        return kind or self._reading.format

    def _may_hold_text(self, entries: Sequence[P]) -> list[P]:
        """Text files, and what looks like a folder."""
        return [entry for entry in entries if self._format(entry) or not entry.suffix]

    def _add_local(self, path: Path, kind: str, source: str) -> None:
        info = path.stat()
        self._met += 1
        if self._is_first((info.st_dev, info.st_ino), printable(path)):
            self.files.append(InputFile(source, printable(path), kind, info.st_size, path))

    def _is_first(self, identity: object, name: str) -> bool:
        first = self._seen.setdefault(identity, name)
        if first is not name:
            self._notes.add("named twice, read once", f"{name}, the same file as {first}")
        return first is name

    def _walk(self, directory: Path, source: str) -> None:
        real = directory.resolve()
        if real == self._exclude or (directory / JOURNAL).exists() or _is_shard_set(directory):
            self._notes.unread("a folder of shards", "made by Detour", printable(directory))
            return
        if not self._is_first(real, printable(directory)):
            return
        named = _json_list(directory / "state.json", "_data_files")
        splits = _json_list(directory / "dataset_dict.json", "splits")
        try:
            if named:
                self._read_dataset(directory, [str(file["filename"]) for file in named], source)
            elif splits:
                chosen = self._splits.choose([str(split) for split in splits], printable(directory))
                for split in chosen or [str(split) for split in splits]:
                    self._walk(directory / split, source)
            else:
                self._take_all(sorted(directory.iterdir()), source)
        except OSError as error:
            raise InputError(f"{printable(directory)} cannot be read: {error.strerror}", code="not-readable") from None

    def _read_dataset(self, directory: Path, names: list[str], source: str) -> None:
        """The files that a saved Hugging Face dataset names, because files beside them are caches."""
        for name in names:
            if not (directory / name).is_file():
                raise InputError(
                    f"{directory / name} is missing, and {directory / 'state.json'} names it; copy the dataset again",
                    code="dataset-incomplete",
                )
            self._add_local(directory / name, "arrow", source)
        for entry in sorted(directory.iterdir()):
            if entry.name not in (*names, "state.json", "dataset_info.json"):
                self._notes.unread(_kind(entry.name), "beside a saved dataset, a cache", printable(entry))

    def _take_all(self, entries: list[Path], source: str) -> None:
        left_out = self._splits.left_out(self._may_hold_text(entries))
        annotated = {annotations_of(entry.name) for entry in entries if self._format(entry) == "txt"}
        for entry in entries:
            name = printable(entry)
            if entry.name in annotated and entry.suffix == ".ann":
                continue
            if entry.name == DELTA_LOG:
                raise _delta_table(name)
            if _is_hidden(entry.name):
                self._notes.unread("hidden", "its name begins with . or _", name)
            elif entry in left_out:
                self._notes.unread(f"split {split_of(entry.name)}", "another split is read", name)
            elif entry.is_dir():
                self._walk(entry, source)
            elif entry.is_symlink() and not entry.exists():
                self._notes.unread("link", "it leads nowhere", name)
            elif not entry.is_file():
                self._notes.unread("special", "no regular file", name)
            elif entry.name.startswith("cache-") and entry.suffix == ".arrow":
                self._notes.unread("cache-*.arrow", "a cache of Hugging Face datasets", name)
            elif (kind := self._format(entry)) is None:
                self._notes.unread(_kind(entry.name), "no format that Detour reads", name)
            else:
                self._add_local(entry, kind, source)

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
            is_folder = not is_web and not has_magic(root) and system.isdir(root)
            if is_web:
                paths = [root]
            elif has_magic(root):
                found = system.glob(root, detail=True).items()
                lists = (system.find(path) if info["type"] == "directory" else [path] for path, info in found)
                paths = list({path for paths in lists for path in paths})
            else:
                paths = system.find(root) if is_folder else [root]
            paths.sort(key=PurePosixPath)  # as a local folder is walked
            infos = {path: system.info(path) for path in paths}
        except (ImportError, ValueError) as error:
            raise InputError(f"{shown}: {error}; pip install 'detour-train[remote]'", code="unknown-scheme") from None
        except FileNotFoundError as error:
            cause = error.__cause__  # fsspec says so too of a server that cannot be reached or refuses the user
            if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410):
                raise InputError(f"{shown}: no such file", code="no-such-file") from None
            reason = without_secrets(f"{type(cause).__name__}: {cause}")
            raise InputError(f"{shown} cannot be read: {reason}", code="not-readable") from None
        except Exception as error:  # every store's client has its own family of errors
            reason = without_secrets(f"{type(error).__name__}: {error}")
            raise InputError(f"{shown} cannot be read: {reason}", code="not-readable") from None
        if not paths:
            raise InputError(f"{shown}: no file matches", code="no-such-file")
        self._take_remote(system, url, PurePosixPath(root) if is_folder else None, infos)

    def _take_remote(self, system: Any, url: str, top: PurePosixPath | None, infos: dict[str, Any]) -> None:
        """Take remote files as `_take_all` takes those of a folder; `top` is the folder, None for a file or a glob."""
        entries = [PurePosixPath(path) for path in infos]
        folders = {folder for entry in entries for folder in entry.parents if top in folder.parents}
        many = sorted({*entries, *folders}) if len(entries) > 1 else []
        left_out = self._splits.left_out(self._may_hold_text(many))
        annotated = {entry.with_name(annotations_of(entry.name)) for entry in entries if self._format(entry) == "txt"}
        datasets = {entry.parent for entry in entries if entry.name in ("state.json", "dataset_dict.json")}
        for entry, (path, info) in zip(entries, infos.items(), strict=True):
            place = system.unstrip_protocol(path)
            name = without_secrets(place)
            parts = [entry, *(folder for folder in entry.parents if folder in folders)]
            other = next((part for part in parts if part in left_out), None)
            if entry in annotated and entry.suffix == ".ann":
                continue
            if any(part.name == DELTA_LOG for part in parts):
                raise _delta_table(name)
            if len(entries) > 1 and any(_is_hidden(part.name) for part in parts):
                self._notes.unread("hidden", "its name begins with . or _", name)
            elif other is not None:
                self._notes.unread(f"split {split_of(other.name)}", "another split is read", name)
            elif entry.parent in datasets and not (entry.suffix == ".arrow" and not entry.name.startswith("cache-")):
                self._notes.unread(_kind(entry.name), "beside a saved dataset, a cache", name)
            elif (kind := self._format(PurePosixPath(path.partition("?")[0]))) is None:
                self._notes.unread(_kind(entry.name), "no format that Detour reads", name)
            elif self._is_first(place, name):
                self._met += 1
                size, version = info["size"] or 0, str(info)
                self.files.append(
                    InputFile(self._sources[url], name, kind, size, system=system, url=path, version=version)
                )

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


def _delta_table(log: str) -> InputError:
    return InputError(
        f"{log}: a Delta table, whose folder also holds rows that were deleted or replaced; write its current version "
        "as parquet into another folder",
        code="delta-table",
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and not PurePosixPath(name).suffix)


def _kind(name: str) -> str:
    suffixes = PurePosixPath(name).suffixes[-2:]
    if suffixes and suffixes[-1].lower() in COMPRESSED:
        return printable("".join(suffixes))
    return printable(suffixes[-1]) if suffixes else "no suffix"


def _is_shard_set(directory: Path) -> bool:
    try:
        return "shards" in json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _json_list(path: Path, key: str) -> list[Any]:
    """A list in a JSON file; empty if there is no such file or key."""
    try:
        return list(json.loads(path.read_bytes())[key])
    except (OSError, ValueError, KeyError, TypeError):
        return []
