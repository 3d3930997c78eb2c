"""Facts about the input that its owner should know: one line for each kind, however many files it concerns."""

from __future__ import annotations

from collections.abc import Callable

from configs.errors import InputError

Report = Callable[[str], None]
"""Receives a line that stays on the screen."""


class Notes:
    """Counts facts by kind and keeps the first example of each."""

    def __init__(self) -> None:
        self._facts: dict[tuple[str, str], list[int | str]] = {}
        self._unread: dict[str, str] = {}
        self._reported = 0

    def add(self, fact: str, example: str, noun: str = "files") -> None:
        """Count a fact.

        Args:
            fact: The fact, equal for everything that one line shall count.
            example: File, or place in a file.
            noun: Name of what is counted, in the plural.
        """
        counted = self._facts.setdefault((fact, noun), [0, example])
        counted[0] = int(counted[0]) + 1

    def unread(self, kind: str, why: str, example: str) -> None:
        """Count a file that is not read."""
        self._unread.setdefault(kind, example)
        self.add(f"not read: {kind} ({why})", example)

    def lines(self) -> list[str]:
        """One line per kind of fact, in the order in which they were met."""
        return [
            fact
            if not example
            else f"{fact}: {example}"
            if count == 1
            else f"{fact}: {count:,} {noun}, the first is {example}"
            for (fact, noun), (count, example) in self._facts.items()
        ]

    def report(self, report: Report | None) -> None:
        """Send all lines."""
        for line in self.lines() if report is not None else ():
            report(line)  # type: ignore[misc]

    def require_all_read(self) -> None:
        """Raise InputError if a file was not read, for `--strict`."""
        if self._unread:
            lines = "\n".join(line for line in self.lines() if line.startswith("not read: "))
            raise InputError(
                f"--strict, and not every file is read\n{lines}\nname the files to read, for instance by a glob",
                key="--strict",
                code="not-read",
            )
