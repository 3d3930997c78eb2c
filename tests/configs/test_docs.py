"""The configuration page is the schema's."""

from __future__ import annotations

from configs.docs import PAGE, render
from configs.schema import RunConfig


def test_configuration_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run `make docs`"


def test_every_key_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in render().splitlines() if line.startswith("| `")]
    assert not [row[0] for row in rows if not row[-1].rstrip(" |")]
    assert {f"| `{key}`" for key in RunConfig.model_fields} <= {row[0] for row in rows}
    assert any(row[0] == "| `data.sources.upsample`" for row in rows), "sections of sections have rows"
