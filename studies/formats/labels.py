"""The labels of an example: classes, several classes, ids, 0 and 1 per class, or a number."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from configs.errors import InputError
from studies.tasks import Task

_UNLABELLED = "; if the examples have no labels, leave them out, or set files.test=null"
_WHOLE = re.compile(r"(-?\d+)\.0+")
_ID = re.compile(r"\d+(\.0+)?")
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
_COMMA = re.compile(r"[-+]?\d+,\d+")
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PYTHON_LIST = re.compile(rf"[\[({{]\s*{_QUOTED}(?:\s*,\s*{_QUOTED})*\s*,?\s*[\])}}]", re.DOTALL)
"""List, tuple or set of quoted labels, as pandas writes it."""
_MISSING = ("nan", "na", "n/a", "none", "null", "<na>", "nat")
"""How R, pandas, SQL and Python write a missing value, in lower case."""


def labels_of(value: Any, task: Task, location: str) -> tuple[str, ...]:
    """Read the classes or the number of one example."""
    if task.kind == "regression":
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            has_comma = isinstance(value, str) and _COMMA.fullmatch(value.strip())
            hint = "; write its decimal comma as a point" if has_comma else _UNLABELLED
            raise InputError(f"{location}: the label {value!r} is no number{hint}", code="bad-label")
        return (repr(number),)
    if not isinstance(value, list):
        value = [value]
    if task.kind == "single" and len(value) != 1:
        raise InputError(
            f"{location}: {len(value)} labels where kind single has one; set kind: multi", code="bad-label"
        )
    return tuple(dict.fromkeys(name_of(label, task, location) for label in value))


def list_of_labels(value: Any, task: Task, location: str) -> list[Any]:
    """Read the labels of a `multi` example: a list, also as JSON or as pandas writes it, or one string."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else [value]
    if not value.strip().startswith("[") and not _PYTHON_LIST.fullmatch(value.strip()):
        return [part for part in value.split(task.separator) if part.strip()]
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = _python_list(value.strip())
    if not isinstance(found, list):
        raise InputError(
            f"{location}: the label {value!r} is no list in JSON or Python; give the labels with the separator "
            f"{task.separator!r}",
            code="bad-label",
        )
    return found


def _python_list(text: str) -> list[str] | None:
    """Read a list, tuple or set of quoted labels; None for anything else, such as a numpy array without commas."""
    try:
        found: Any = ast.literal_eval(text) if _PYTHON_LIST.fullmatch(text) else None
    except (ValueError, SyntaxError):
        return None
    return sorted(found) if isinstance(found, set) else [found] if isinstance(found, str) else found and list(found)


def are_indicators(labels: Sequence[tuple[str, list[Any]]], names: Sequence[str]) -> bool:
    """Return whether the lists of a file state 0 or 1 for each class, and not ids or names.

    Of a list such as [0, 1] alone nobody can tell, so the file decides: all its lists are so, or none may look so.

    Args:
        labels: Location and list of each example.
        names: The task's `names`.

    Raises:
        InputError: The classes have no names, or only some lists state 0 or 1 for each of them.
    """
    looks_so = [(location, value) for location, value in labels if _states_each_class(value, names)]
    if not names:
        lengths = {len(value) for _, value in labels}
        if len(lengths) == 1 and max(lengths) > 1 and all(bits_of(value, names) for _, value in labels):
            looks_so = list(labels)
        if looks_so:
            location, value = looks_so[0]
            raise InputError(
                f"{location}: {value} states 0 or 1 for each of {len(value)} classes; give these classes in the "
                "task's `names`",
                key="names",
                code="indicators-without-names",
            )
    elif labels and all(len(value) == len(names) and bits_of(value, names) for _, value in labels):
        return True
    if not looks_so:
        return False
    for location, value in labels:
        has_no_label = not value and len(names) > 2  # fewer names leave it open what the other lists are
        if not has_no_label and (len(value) != len(names) or bits_of(value, names) is None):
            raise InputError(
                f"{location}: the label {value} does not state 0 or 1 for each of the {len(names)} `names`, as "
                f"{looks_so[0][1]} ({looks_so[0][0]}) seems to; give one name per class, or write the names of the "
                "labels instead of numbers",
                key="names",
                code="bad-label",
            )
    return True


def _states_each_class(value: list[Any], names: Sequence[str]) -> bool:
    """Return whether a list looks like 0 or 1 per class. Ids of classes differ from each other and are no floats."""
    bits = bits_of(value, names)
    if not bits:
        return False
    is_no_ids = len(set(bits)) < len(bits) or not all(isinstance(part, str) or type(part) is int for part in value)
    are_ids_of_a_table = all(isinstance(part, str) for part in value)
    return is_no_ids or (len(bits) == len(names) and not are_ids_of_a_table)


def bits_of(value: list[Any], names: Sequence[str]) -> list[int] | None:
    """Return a list of 0 and 1 as integers; None for any other list. What `names` lists is a name."""
    parts = [part.strip() if isinstance(part, str) else part for part in value]
    is_bits = all(part in (0, 1, "0", "1") and part not in names for part in parts)
    return [int(part) for part in parts] if is_bits else None


@lru_cache
def _have_ids(names: tuple[str, ...]) -> bool:
    """Return whether a number can be an id: no name is a number other than its own id."""
    return all(float(name) == number for number, name in enumerate(names) if _NUMBER.fullmatch(name))


def name_of(label: Any, task: Task, location: str) -> str:
    """Return the name of a class, or a tag. What `names` lists is a class, whatever it looks like."""
    if isinstance(label, str) and label.strip() in task.names:
        return label.strip()
    written = label
    if isinstance(label, str) and task.names and task.kind != "tokens" and _ID.fullmatch(label.strip()):
        label = float(label)  # a table's ids are strings
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool):
        if task.names and not _have_ids(task.names):
            if str(label) in task.names:
                return str(label)
            raise InputError(
                f"{location}: the label {written} is none of the task's `names`; these are numbers themselves, so it "
                "is not read as an id; list it in `names`, or give names that are no numbers",
                key="names",
                code="bad-label",
            )
        if task.names:
            if not 0 <= label < len(task.names):
                raise InputError(f"{location}: label {label} has no name among {len(task.names)} `names`", key="names")
            return task.names[label]
        if task.kind == "tokens":
            raise InputError(
                f"{location}: the tag {label} is an id; give the tags in the task's `names`, in the order of ids",
                key="names",
                code="tags-without-names",
            )
    name = str(label).strip()
    if isinstance(label, str) and name.lower() in _MISSING:
        raise InputError(
            f"{location}: the label {name} reads as a missing value{_UNLABELLED}; if it is a class, list all "
            "classes in the task's `names`",
            code="bad-label",
        )
    if not isinstance(label, str | int) or not name:
        hint = (
            "; set kind: regression for numbers" if isinstance(label, float) and math.isfinite(label) else _UNLABELLED
        )
        raise InputError(f"{location}: {label!r} is no label{hint}", code="bad-label")
    if task.kind == "single" and _is_fraction(name):
        raise InputError(
            f"{location}: the label {name} is a number; set kind: regression, or list the codes in the task's `names`",
            code="bad-label",
        )
    whole = _WHOLE.fullmatch(name) if task.kind == "single" else None
    return whole[1] if whole else name  # 0.0 is the class 0, which a table with gaps writes as a float


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except (ValueError, OverflowError):
        return False
