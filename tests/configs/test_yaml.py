"""The YAML of recipes, plans and overrides."""

from __future__ import annotations

import pytest

from configs.errors import InputError
from configs.load import read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("null", None),
        ("", None),
        ("[1, a, {b: 1e3}]", [1, "a", {"b": 1000.0}]),
        ("a: ${b}\n3: x=y\n", {"a": "${b}", 3: "x=y"}),
        ("day: 2020-01-01", {"day": "2020-01-01"}),
    ],
)
def test_values(text: str, value: object) -> None:
    found = read_yaml(text, "recipe")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["a: 1\na: 2", "b: {a: 1, a: 2}", "a: [1", "null: 1", "a: !!python/name:os.system"])
def test_what_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="recipe"):
        read_yaml(text, "recipe")
