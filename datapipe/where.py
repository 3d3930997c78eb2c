"""`--where`: a condition on the columns of a record, parsed and never run as code."""

from __future__ import annotations

import ast
import difflib
import operator
import re
from collections.abc import Callable, Iterable
from datetime import date, datetime
from decimal import Decimal
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
    ast.Is: operator.eq,
    ast.IsNot: operator.ne,
}
_CONSTANTS = {"true": True, "false": False, "null": None}
_BOOLEANS = dict.fromkeys(("true", "t", "yes", "y"), True) | dict.fromkeys(("false", "f", "no", "n", ""), False)
"""Texts by which pandas, R, PostgreSQL and people write booleans into a table, in small letters."""
_QUOTED = "quoted_"
"""Start of the identifier that stands for a name in backticks: the hexadecimal bytes of the name follow."""
_NAMES = re.compile(
    r""" "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*'           # texts stay as they are
    | `(?P<quoted>[^`]+)`
    | (?P<word>[^\W\d][\w\u0300-\u036f.]*)            # Python would rewrite letters such as \u00b5
    """,
    re.VERBOSE,
)
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

    Comparisons, `in`, `and`, `or`, `not`, constants and column names are allowed. A name that is no word stands in
    backticks. A number, a boolean or a date is compared with a text as a number, a boolean or a date. A missing value
    (null) is never smaller or larger than anything, and an empty text is one.

    Raises:
        InputError: It is no such condition.
    """
    try:
        tree = _parse(expression)
        condition = _boolean(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or "too deeply nested"
        raise InputError(
            f"--where {expression!r}: {reason}; write comparisons of columns, such as "
            '\'score >= 3 and lang in ("fr", "en")\'; a name such as `note type` stands in backticks',
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

    visit(_parse(expression))
    return [name for name in names if name not in _CONSTANTS]


def _parse(expression: str) -> ast.Expression:
    def identifier(match: re.Match[str]) -> str:
        name = match["quoted"] or match["word"]
        if name is None or (match["word"] and name.isascii()):
            return match[0]
        return _QUOTED + name.encode("utf-8", "surrogateescape").hex()

    return ast.parse(_NAMES.sub(identifier, expression.strip()), mode="eval")


def _shown(node: ast.AST) -> str:
    return re.sub(rf"{_QUOTED}[0-9a-f]+", lambda match: f"`{_unquoted(match[0])}`", ast.unparse(node))


def _unquoted(identifier: str) -> str:
    return bytes.fromhex(identifier.removeprefix(_QUOTED)).decode("utf-8", "surrogateescape")


def _boolean(node: ast.expr) -> Callable[[Any], bool]:
    if isinstance(node, ast.BoolOp):
        parts = [_boolean(value) for value in node.values]
        every = all if isinstance(node.op, ast.And) else any
        return lambda record: every(part(record) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _boolean(node.operand)
        return lambda record: not inner(record)
    if isinstance(node, ast.Compare):
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.Constant):
                raise ValueError(f"{_shown(right)} is no list; write ({_shown(right)},) with a comma")
        values = [_value(operand) for operand in (node.left, *node.comparators)]
        pairs = list(zip(map(_comparison, node.ops), values, values[1:], strict=False))
        return lambda record: all(compare(left(record), right(record)) for compare, left, right in pairs)
    if not isinstance(node, ast.Name | ast.Attribute):
        raise ValueError(f'{_shown(node)} is no condition; several values are written column in ("fr", "de")')
    value = _value(node)
    return lambda record: _truth(value(record))


def _truth(value: Any) -> bool:
    """A column as a condition; a table may hold false or 0 as text."""
    value = _as_text(value)
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _BOOLEANS:
            return _BOOLEANS[text]
        try:
            return float(text) != 0
        except ValueError:
            raise ValueError(f'--where: {value!r} is neither true nor false; compare it, as in column != ""') from None
    return bool(value)


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
            raise ValueError(f"{_shown(node)!r} is no number")
        return lambda record: -number
    if isinstance(node, ast.Tuple | ast.List):
        parts = [_value(part) for part in node.elts]
        return lambda record: [part(record) for part in parts]
    raise ValueError(f"{_shown(node)!r} is neither a column nor a constant")


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return _unquoted(node.id) if node.id.startswith(_QUOTED) else node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    raise ValueError(f"{_shown(node)!r} is no column")


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
    container = _as_text(container)
    if isinstance(container, str):
        return isinstance(value, str) and value in container
    if container is None:
        return False
    if not isinstance(container, Iterable):
        raise ValueError(f"--where looks for {value!r} in {type(container).__name__} {container!r}")
    return any(part == other for part, other in (_alike(part, value) for part in container))


def _as_text(value: Any) -> Any:
    """A column of bytes as text, which Impala and older Spark write into Parquet."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Both as numbers, booleans or dates if one is such and the other the text of one, as in a CSV file."""
    left, right = _as_text(left), _as_text(right)
    if isinstance(left, str) == isinstance(right, str):
        return _dates(left), _dates(right)
    return (
        (_converted(left, right), _dates(right)) if isinstance(left, str) else (_dates(left), _converted(right, left))
    )


def _converted(text: str, other: Any) -> Any:
    """A text as the kind of value that it is compared with; as it is if it is none."""
    if not text.strip() and (other is None or isinstance(other, int | float | Decimal | date)):
        return None  # an empty cell
    if isinstance(other, bool) and text.strip().lower() in _BOOLEANS:
        return _BOOLEANS[text.strip().lower()]
    try:
        if isinstance(other, int | float | Decimal):
            return float(text)
        if isinstance(other, date):
            found = datetime.fromisoformat(text.strip())
            return found if found.tzinfo else found.replace(tzinfo=getattr(other, "tzinfo", None))
    except ValueError:
        if isinstance(other, date):
            raise ValueError(f"--where compares the date {other.isoformat()} with the text {text!r}") from None
    return text


def _dates(value: Any) -> Any:
    """A date as its first moment, so that it can be compared with a moment."""
    is_day = isinstance(value, date) and not isinstance(value, datetime)
    return datetime(value.year, value.month, value.day) if is_day else value
