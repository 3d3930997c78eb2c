"""References to local files: plain paths, and `package://` for the shipped samples."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InputError

PREFIX = "package://"
_SAMPLES = Path(__file__).parent / "samples"


def local_path(reference: str) -> Path:
    """The path that a reference names.

    Args:
        reference: A path, where `~` is the home directory, or a shipped file: `package://corpus/medquad.jsonl.gz`.

    Raises:
        InputError: No such file is shipped.
    """
    if not reference.startswith(PREFIX):
        return Path(reference).expanduser()
    path = _SAMPLES / reference.removeprefix(PREFIX)
    if not path.exists() or _SAMPLES not in path.resolve().parents:
        shipped = sorted(str(p.relative_to(_SAMPLES)) for p in _SAMPLES.glob("*/*"))
        raise InputError(
            f"{reference}: no such sample; shipped are {', '.join(PREFIX + name for name in shipped)}",
            code="unknown-sample",
        )
    return path
