"""Write `docs/configuration.md` from the schema and the shipped recipes: `python -m configs.docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.files import write_atomically
from configs.load import RECIPES, shipped
from configs.schema import RunConfig, Section
from configs.type_words import is_section, type_words

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

<!-- Generated from configs/schema by `make docs`. Do not edit. -->

A recipe describes a run. It is a YAML file or the name of a shipped recipe. The command line sets keys by dotted path,
list indices included: `detour-train demo phases.0.steps=20 batch.sequences=16`.

- A misspelt key is answered with the nearest right key. All errors of a file are reported together, before training.
- Durations read `500 steps`, `100M tokens` or `10 minutes`. A bare count is in tokens. Suffixes are k, M, B and T.
- Numbers are decimal, such as `2e-4`, `1_000` or `2M`. What YAML would read otherwise, such as `010`, is refused.
- `phases.0.steps=null` removes the value of an optional key. `${oc.env:NAME}` stands for an environment variable.
- `RUN/config.yaml` holds the resolved configuration. `detour schema` prints the JSON schema.
- A run resumes with the same configuration. Keys that do not decide what is computed may change: `cluster.*`,
  `parallel.*`, `checkpoint.*`, `monitoring.*`, `batch.micro` of the run and of a phase, `batch.recompute`, `shards` and
  `text` of a source, and of `data` the keys `on_error`, `backend`, `prefetch`, `cache`, `cache_gb`, `patience`.

## Shipped recipes

| recipe | trains |
|---|---|
"""


def render() -> str:
    """Return the page."""
    recipes = [f"| `{name}` | {text.splitlines()[0].removeprefix('# ')} |\n" for name, text in shipped(RECIPES).items()]
    return INTRODUCTION + "".join(recipes) + "".join(_tables(RunConfig, ""))


def main() -> None:
    """Write the page."""
    write_atomically(PAGE, render())


def _tables(section: type[Section], prefix: str) -> Iterator[str]:
    """Yield a table for a section, then the tables of its subsections."""
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    yield f"\n## {title}\n\n{_cell(section.__doc__)}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    subsections = []
    for key, field in section.model_fields.items():
        subsection = next((kind for kind in _parts(field.annotation) if is_section(kind)), None)
        if subsection is not None:
            subsections.append((subsection, f"{prefix}{key}."))
        yield f"| `{prefix}{key}` | {type_words(field.annotation)} | {_default(field)} | {_cell(field.description)} |\n"
    for subsection, path in subsections:
        yield from _tables(subsection, path)


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None or value == () or isinstance(value, Section):
        return ""
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
