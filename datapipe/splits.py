"""The split of a data set that is read, where the names of files and folders tell splits: train, validation, test."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from configs.errors import InputError
from datapipe.notes import Notes

_WORD = "(train|training|validation|valid|val|dev|test|testing|eval|evaluation)"
_FIRST = re.compile(rf"(?:split=)?{_WORD}(?=[-_. 0-9]|$)", re.IGNORECASE)
_INSIDE = re.compile(rf"(?:.*[-_. 0-9])?{_WORD}(?=[-_. 0-9]|$)", re.IGNORECASE)
_SAME = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
_SAME |= dict.fromkeys(("testing", "eval", "evaluation"), "test")


def splits_of(names: Sequence[str]) -> dict[str, str]:
    """The splits that the names of a folder's files and folders tell, as Hugging Face names them.

    A name tells one that begins with its word: `test-00000.parquet`, `split=test`. The word may also stand further
    inside (`corpus_test`) if every name of the folder tells a split. Notes may be called `blood-test`.
    """
    inside = {name: match[1].lower() for name in names if (match := _INSIDE.match(name.removeprefix("split=")))}
    if len(inside) == len(names):
        return inside
    return {name: match[1].lower() for name in names if (match := _FIRST.match(name))}


class Splits:
    """The choice between the splits that are met.

    Args:
        wanted: Name of the split to read; None for the training split where several are named.
        notes: Receives what is read and what is not.
    """

    def __init__(self, wanted: str | None, notes: Notes) -> None:
        self._wanted, self._notes = wanted, notes
        self._met: set[str] = set()
        self._found = False

    def left_out(self, entries: Sequence[PurePath]) -> dict[PurePath, str]:
        """The entries of folders that belong to a split which is not read, and that split.

        Args:
            entries: Folders, and files that hold text.

        Raises:
            InputError: None of the splits of a folder is the one to read.
        """
        result: dict[PurePath, str] = {}
        folders: dict[PurePath, list[PurePath]] = {}
        for entry in entries:
            folders.setdefault(entry.parent, []).append(entry)
        for folder, members in folders.items():
            splits = splits_of([entry.name for entry in members])
            names = sorted(set(splits.values()))
            chosen = self.choose(names, str(folder)) if len(names) > 1 or (names and self._wanted) else None
            if chosen is not None:
                result |= {
                    entry: splits[entry.name]
                    for entry in members
                    if entry.name in splits and splits[entry.name] not in chosen
                }
        return result

    def choose(self, splits: list[str], where: str) -> list[str] | None:
        """The splits to read of those of a folder; None for all of them.

        Raises:
            InputError: There are several, and none is the training split.
        """
        self._met |= set(splits)
        wanted = self._wanted or ("train" if len(splits) > 1 else None)
        if wanted is None:
            return None
        chosen = [split for split in splits if _SAME.get(split.lower(), split) == _SAME.get(wanted, wanted)]
        self._found |= bool(chosen)
        if not chosen and self._wanted is None:
            raise InputError(
                f"{where} has the splits {', '.join(splits)}, and none is the training split; choose by --split",
                key="--split",
                code="dataset-splits",
            )
        if chosen and len(chosen) < len(splits):
            others = ", ".join(split for split in splits if split not in chosen)
            self._notes.add(f"read: the split {chosen[0]}, not {others}", where, "folders")
        return chosen

    @property
    def are_several(self) -> bool:
        """Whether more than one split was met."""
        return len(self._met) > 1

    def require_found(self) -> None:
        """Raise InputError if a split was asked for and not met."""
        if self._wanted is not None and not self._found:
            raise InputError(
                f"--split {self._wanted}: no such split; there are {', '.join(sorted(self._met)) or 'none'}",
                key="--split",
                code="no-such-split",
            )
