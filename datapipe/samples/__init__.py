"""The sample corpus and tokenizer that come with Detour; their origin and licences are in SOURCE.md."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InputError

PREFIX = "package://"


def local_path(reference: str) -> Path:
    """A path as given, or the shipped file that `package://corpus/medquad.jsonl.gz` names. Raises InputError."""
    if not reference.startswith(PREFIX):
        return Path(reference).expanduser()
    folder = Path(__file__).parent
    path = folder / reference.removeprefix(PREFIX)
    if not path.exists() or folder not in path.resolve().parents:
        shipped = sorted(str(p.relative_to(folder)) for p in folder.glob("*/*"))
        raise InputError(f"{reference}: no such sample; shipped are {', '.join(PREFIX + name for name in shipped)}")
    return path
