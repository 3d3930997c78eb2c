"""`--where`: a condition on the columns of a record, parsed and never run as code."""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Iterable
from typing import Any

from configs.errors import InputError

Value = Callable[[Any], Any]
"""Takes a record and returns a value of it."""
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_CONSTANTS = {"true": True, "false": False, "null": None}
_ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


class NoFieldError(Exception):
    """A record has no column of this name; the message lists the columns that it has."""


def field(record: Any, path: str) -> Any:
    """The value of a column, where `a.b` is the key b of the object in column a; None where `a` is null.

    Raises:
        NoFieldError: There is no such column.
    """
    if isinstance(record, dict) and path in record:
        return record[path]
    value = record
    for key in path.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or key not in value:
            raise NoFieldError(describe_missing(path, field_names(record)))
        value = value[key]
    return value


def field_names(record: Any) -> list[str]:
    """Names of the columns of a record, those of objects inside it in the form `a.b`."""
    names = []
    for key, value in record.items() if isinstance(record, dict) else ():
        names += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) and value else [str(key)]
    return names


def describe_missing(path: str, names: Iterable[str]) -> str:
    """A message that lists the columns there are, and the one most like `path`."""
    names = list(names)
    near = difflib.get_close_matches(path.lower(), [name.lower() for name in names], 1, 0.5)
    guess = next((name for name in names if near and name.lower() == near[0]), None)
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
    hint = f"; did you mean `{guess}`?" if guess else ""
    return f"no column `{path}`; it has {listed or 'no columns'}{hint}"


def parse_where(expression: str) -> Callable[[Any], bool]:
    """Turn a condition such as `score >= 3 and lang == "fr"` into a function of a record.

    Comparisons, `in`, `and`, `or`, `not`, constants and column names are allowed. A number is compared with a text as
    a number. A missing value (null) is never smaller or larger than anything.

    Raises:
        InputError: It is no such condition.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        condition = _boolean(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or "too deeply nested"
        raise InputError(
            f"--where {expression!r}: {reason}; write comparisons of columns, such as "
            '\'score >= 3 and lang in ("fr", "en")\'',
            key="--where",
            code="where-invalid",
        ) from None
    return condition


def columns_of(expression: str) -> list[str]:
    """Names of the columns that a valid condition reads."""
    names = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Name | ast.Attribute):
            names.append(_name(node))
        else:
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(expression.strip(), mode="eval"))
    return [name for name in names if name not in _CONSTANTS]


def _boolean(node: ast.expr) -> Callable[[Any], bool]:
    if isinstance(node, ast.BoolOp):
        parts = [_boolean(value) for value in node.values]
        every = all if isinstance(node.op, ast.And) else any
        return lambda record: every(part(record) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _boolean(node.operand)
        return lambda record: not inner(record)
    if isinstance(node, ast.Compare):
        values = [_value(operand) for operand in (node.left, *node.comparators)]
        pairs = list(zip(map(_comparison, node.ops), values, values[1:], strict=False))
        return lambda record: all(compare(left(record), right(record)) for compare, left, right in pairs)
    value = _value(node)
    return lambda record: bool(value(record))


def _value(node: ast.expr) -> Value:
    if isinstance(node, ast.Name | ast.Attribute):
        path = _name(node)
        if path in _CONSTANTS:
            return lambda record: _CONSTANTS[path]
        return lambda record: field(record, path)
    if isinstance(node, ast.Constant):
        return lambda record: node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number = node.operand.value
        if not isinstance(number, int | float):
            raise ValueError(f"{ast.unparse(node)!r} is no number")
        return lambda record: -number
    if isinstance(node, ast.Tuple | ast.List):
        parts = [_value(part) for part in node.elts]
        return lambda record: [part(record) for part in parts]
    raise ValueError(f"{ast.unparse(node)!r} is neither a column nor a constant")


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    raise ValueError(f"{ast.unparse(node)!r} is no column")


def _comparison(op: ast.cmpop) -> Callable[[Any, Any], bool]:
    if isinstance(op, ast.In | ast.NotIn):
        wanted = isinstance(op, ast.In)
        return lambda left, right: _contains(right, left) is wanted
    compare = _COMPARISONS[type(op)]
    ordered = isinstance(op, _ORDER)

    def run(left: Any, right: Any) -> bool:
        left, right = _alike(left, right)
        if ordered and (left is None or right is None):
            return False
        try:
            return bool(compare(left, right))
        except TypeError:
            kinds = f"{type(left).__name__} {left!r} with {type(right).__name__} {right!r}"
            raise ValueError(f"--where compares {kinds}") from None

    return run


def _contains(container: Any, value: Any) -> bool:
    if isinstance(container, str):
        return isinstance(value, str) and value in container
    if container is None:
        return False
    return any(part == other for part, other in (_alike(part, value) for part in container))


def _alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Both as numbers if one is a number and the other the text of one, as in a CSV file."""
    for number, text in ((left, right), (right, left)):
        if isinstance(number, int | float) and isinstance(text, str):
            try:
                converted: float | None = float(text)
            except ValueError:
                if text.strip():
                    return left, right
                converted = None  # an empty cell
            return (number, converted) if number is left else (converted, number)
    return left, right
