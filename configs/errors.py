"""The two ways a command ends badly, and the hint of their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Bad input: configuration, data or checkpoint. The message names the key or file and the remedy; exit code 2.

    The message is for people and may be reworded. Programs and tests look at the two attributes.

    Args:
        message: One message for a person.
        key: Dotted configuration key or command option at fault, such as `batch.micro` or `--output`.
        code: Stable name of the kind of fault in kebab case, such as `checkpoint-damaged`.
    """

    def __init__(self, message: str, *, key: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.code = code


class RunFailedError(Exception):
    """The run started and failed for a reason that is not its input; exit code 3."""


def nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return a hint for an unknown word: the known word that is most like it, else `otherwise` and all known words."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise} {', '.join(words)}"
