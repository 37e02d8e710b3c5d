"""`where:` of a source: a condition over a row's columns -> keep the row or not.

The condition is written in Python's syntax and never run as Python: its syntax tree is translated node by node, and
unsupported nodes are refused.

    rating >= 5 and in_gsm8k_train == false
    0.2 < margin <= 0.9 or source in ["arc", "gsm8k"]
    len(chosen[-1].content) > 0 and not lower(column("model-name")) == "gpt-4"

Names that are no identifiers of Python, or its keywords (`from`, `is`), are written `column("from")`.

Values are those of JSON: numbers, strings, `true`, `false`, `null`, lists. A comparison with a missing or null value is
false; `x == null` and `x != null` ask for it. Comparing values of two types fails for that row instead of being
false: `rating >= 5` says something about a number, and the `"7"` of a CSV file is none (`number(rating)` makes it one).
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prefold.errors import UserError, did_you_mean, json_type

Row = Mapping[str, Any]
Evaluate = Callable[[Row], Any]


class WhereError(ValueError):
    """The condition itself cannot be read."""


class Mismatch(Exception):
    """The condition cannot be evaluated for a row."""


class Where:
    """A condition, ready to be called with rows.

    Raises:
        WhereError: the text is no condition; the message says at which character.
    """

    def __init__(self, text: str):
        self._text = text.strip().replace("\n", " ")
        self._columns: list[_Column] = []
        try:
            self._condition = self._translate(_parsed(self._text))
        except RecursionError:
            raise WhereError("nested too deeply") from None

    def __call__(self, row: Row) -> bool:
        """Whether to keep the row.

        Raises:
            Mismatch: it cannot be evaluated for this row.
        """
        return _truth(self._condition(row), self._text)

    def require_known_columns(self, source: str) -> None:
        """Check, after the condition was called with all rows, that no column was missing from every one of them.

        Raises:
            UserError: for the first that was, with the nearest name.
        """
        for column in self._columns:
            if column.seen or not column.beside:
                continue
            beside = sorted(column.beside)
            advice = did_you_mean(column.parts[-1], beside)
            advice = advice or f"there are {', '.join(f'`{name}`' for name in beside[:8])}"
            raise UserError(f"no row has the column `{column}` of `where: {self._text}`", where=source, advice=advice)

    def _translate(self, node: ast.expr) -> Evaluate:
        if parts := _path(node):
            column = _Column(parts)
            self._columns.append(column)
            return column
        match node:
            case ast.Constant() | ast.Name() | ast.List() | ast.Tuple() | ast.UnaryOp(op=ast.USub()):
                value = self._literal(node)
                return lambda row: value
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
                inner = self._translate(argument)
                return lambda row: _called(name, inner(row), ast.unparse(argument))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self._translate(operand)
                return lambda row: not _truth(inner(row), ast.unparse(operand))
            case ast.BoolOp(op=op, values=values):
                operands = [(self._translate(value), value) for value in values]
                decide = all if isinstance(op, ast.And) else any
                return lambda row: decide(_truth(inner(row), ast.unparse(value)) for inner, value in operands)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                return self._comparison([left, *comparators], ops)
        raise self._refused(node)

    def _comparison(self, nodes: Sequence[ast.expr], ops: Sequence[ast.cmpop]) -> Evaluate:
        """`a < b <= c` holds if both `a < b` and `b <= c` do."""
        values = [self._translate(node) for node in nodes]
        links = []
        for index, op in enumerate(map(type, ops)):
            pair = nodes[index : index + 2]
            with_null = any(ast.unparse(node) in ("None", "null") for node in pair)
            if op not in _NULL_TESTS and (with_null or op in (ast.Is, ast.IsNot)):
                raise self._refused(nodes[index + 1])
            compare = _NULL_TESTS[op] if with_null else partial(_compared, op, " and ".join(map(ast.unparse, pair)))
            links.append((compare, values[index], values[index + 1]))
        return lambda row: all(compare(left(row), right(row)) for compare, left, right in links)

    def _literal(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str() | int() | float() | None as value):
                return value
            case ast.Name(id=name) if name in _WORDS:
                return _WORDS[name]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._literal(item) for item in items]
        raise self._refused(node)

    def _refused(self, node: ast.expr) -> WhereError:
        character = len(self._text.encode()[: node.col_offset].decode()) + 1
        return WhereError(
            f"`{ast.unparse(node)}` at character {character} cannot be used in a condition; there are columns "
            '(`a`, `a.b`, `column("a-b")`), numbers, strings, true, false, null, lists of those, comparisons, '
            f"`and`, `or`, `not`, `in`, and {', '.join(f'{name}()' for name in _FUNCTIONS)}"
        )


def _parsed(text: str) -> ast.expr:
    try:
        # Python warns of odd escapes in strings; the text is not a program.
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        # Python gives no offset for what is missing at the end.
        raise WhereError(f"cannot be read at character {error.offset or len(text) + 1}: {error.msg}") from None
    except (ValueError, MemoryError) as error:
        raise WhereError(f"cannot be read: {error or 'nested too deeply'}") from None


@dataclass
class _Column:
    """The names and indices that lead to a value. `seen`: whether any row had it; `beside`: the names that rows had
    where one of the path's was missing."""

    parts: tuple[str | int, ...]
    seen: bool = False
    beside: set[str] = field(default_factory=set)

    def __call__(self, row: Row) -> Any:
        here: Any = row
        for part in self.parts:
            if here is None:
                return None
            if isinstance(part, int) and isinstance(here, list):
                here = here[part] if -len(here) <= part < len(here) else None
            elif isinstance(part, str) and isinstance(here, Mapping):
                if part not in here:
                    self.beside |= here.keys()
                    return None
                here = here[part]
            else:
                raise Mismatch(f"`{self}`: {json_type(here)} has no `{part}`")
        self.seen = True
        return here

    def __str__(self) -> str:
        return ".".join(map(str, self.parts))


def _path(node: ast.expr) -> tuple[str | int, ...]:
    """The parts of `a.b["c"][0]` or `column("a")`; empty for any other node."""
    match node:
        case ast.Name(id=name) if name not in _WORDS:
            return (name,)
        case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str() as name)], keywords=[]):
            return (name,)
        case ast.Attribute(value=inner, attr=name) if parts := _path(inner):
            return (*parts, name)
        case ast.Subscript(value=inner, slice=ast.Constant(value=str() | int() as part)) if parts := _path(inner):
            return (*parts, part)
        case ast.Subscript(
            value=inner, slice=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as part))
        ) if parts := _path(inner):
            return (*parts, -part)
    return ()


def _truth(value: Any, text: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise Mismatch(f"`{text}` is {json_type(value)}, not true or false")


def _compared(op: type[ast.cmpop], text: str, left: Any, right: Any) -> bool:
    if left is None or right is None:
        return False
    if op in (ast.In, ast.NotIn):
        return _contains(right, left, text) is (op is ast.In)
    if json_type(left) != json_type(right):
        raise Mismatch(f"{text}: {json_type(left)} beside {json_type(right)}")
    if op not in _NULL_TESTS and json_type(left) not in ("a number", "a string"):
        raise Mismatch(f"{text}: {json_type(left)} has no order")
    return bool(_COMPARISONS[op](left, right))


def _contains(values: Any, value: Any, text: str) -> bool:
    if isinstance(values, list):
        # In Python, True == 1.
        return any(json_type(value) == json_type(item) and value == item for item in values)
    if isinstance(value, str) and isinstance(values, str):
        return value in values
    raise Mismatch(f"{text}: {json_type(value)} cannot be in {json_type(values)}")


def _called(name: str, value: Any, text: str) -> Any:
    function, complaint = _FUNCTIONS[name]
    try:
        return None if value is None else function(value)
    except (TypeError, ValueError, OverflowError):
        raise Mismatch(f"{name}({text}): {json_type(value)} {complaint}") from None


_WORDS = {"true": True, "false": False, "null": None}
_FUNCTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "len": (len, "has no length"),
    "lower": (str.lower, "is not text"),
    "number": (float, "that is no number"),
}
"""Each with what the error says of a value that it does not take."""
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_NULL_TESTS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {ast.Eq: operator.is_, ast.NotEq: operator.is_not}
