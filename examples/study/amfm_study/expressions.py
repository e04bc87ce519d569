"""Sizes that follow from others: `hidden_size // 16`, computed from numbers and names by a parser, never by Python's eval."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "max": max,
    "min": min,
    "round": round,
    "sqrt": math.sqrt,
    "log2": math.log2,
}
MOST_CHARACTERS, MOST_EXPONENT, MOST = 200, 64, 1e18
ALLOWED = f"numbers, names of settings, + - * / // % **, parentheses, and {', '.join(FUNCTIONS)}"


def evaluate(text: str, value_of: Callable[[str], object]) -> float:
    """Compute an expression; `value_of` looks up a dotted name. An int where all of it is whole.

    Raises ValueError for anything else than `ALLOWED`, for a name of anything but a number, and for what has no finite value.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"has {len(text)} characters; use at most {MOST_CHARACTERS}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"is not an expression; use {ALLOWED}") from error
    try:
        found = _value(tree.body, value_of)
    except (ZeroDivisionError, OverflowError, TypeError) as error:
        raise ValueError(f"has no value: {error}") from error
    if isinstance(found, complex) or not abs(found) <= MOST:
        raise ValueError(f"is {found}; use sizes of at most {MOST:g}")
    return found


def _value(node: ast.expr, value_of: Callable[[str], object]) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(float(node.value) if isinstance(node.value, float) else int(str(node.value)))
    if isinstance(node, ast.Name | ast.Attribute):
        name = _dotted(node)
        found = value_of(name)
        if type(found) not in (int, float):
            raise ValueError(f"reads {name}, which is {found!r} and no number")
        return _bounded(found)  # type: ignore[arg-type]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left, value_of), _value(node.right, value_of)
        if isinstance(node.op, ast.Pow) and abs(right) > MOST_EXPONENT:
            raise ValueError(f"has the exponent {right}; use at most {MOST_EXPONENT}")
        return _bounded(OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, value_of)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in FUNCTIONS
        and not node.keywords
    ):
        return _bounded(FUNCTIONS[node.func.id](*(_value(each, value_of) for each in node.args)))
    raise ValueError(f"has more than a size needs; use {ALLOWED}")


def _bounded(value: float) -> float:
    """The value, unless later products of it could become long to compute."""
    if isinstance(value, complex) or not abs(value) <= MOST:
        raise ValueError(f"passes {MOST:g} on the way; use smaller numbers")
    return value


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError(f"has more than a size needs; use {ALLOWED}")
