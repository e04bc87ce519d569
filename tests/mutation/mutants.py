"""Small wrong versions of a source file: one operator, constant, condition or call changed in each.

Changed text stands where the old one stood, so that lines keep their numbers. Left alone is what no test could or should
see: annotations, docstrings, the words of messages, decorators, imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: bytes from `start` to `stop` of the source become `after`; `line` counts from 1."""

    line: int
    start: int
    stop: int
    before: str
    after: str

    def apply(self, source: str) -> str:
        """The whole source with the change."""
        content = source.encode()
        return (content[: self.start] + self.after.encode() + content[self.stop :]).decode()


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a module, in the order of their places."""
    offsets = [0]
    for line in source.encode().splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))

    def change(node: ast.expr | ast.stmt, after: str) -> Mutant:
        start = offsets[node.lineno - 1] + node.col_offset
        stop = offsets[node.end_lineno - 1] + node.end_col_offset
        return Mutant(node.lineno, start, stop, source.encode()[start:stop].decode(), after)

    found = {}
    for node in _places(ast.parse(source)):
        for place, after in _changes(node):
            mutant = change(place, after)
            try:
                compile(mutant.apply(source), "mutant", "exec")
            except SyntaxError:  # a walrus or a star where our parentheses may not stand
                continue
            found[mutant.start, mutant.stop, after] = mutant
    return [found[key] for key in sorted(found)]


def _places(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Expressions and statements that tests may see, from the outside in."""
    skipped: list[ast.AST | None] = []
    if isinstance(tree, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return
    if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        skipped += tree.decorator_list
    if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        skipped.append(tree.returns)
    if isinstance(tree, ast.AnnAssign | ast.arg):
        skipped.append(tree.annotation)
    if isinstance(tree, ast.keyword) and tree.arg == "strict":
        return  # of zip: an assertion
    if isinstance(tree, ast.Assert):
        skipped.append(tree.msg)
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    if isinstance(tree, ast.expr | ast.stmt):
        yield tree
    for child in ast.iter_child_nodes(tree):
        if child not in skipped:
            yield from _places(child)


def _changes(node: ast.expr | ast.stmt) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """What to put instead of a node, or of a part of it."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            yield node, f"({ast.unparse(ast.Compare(left, [COMPARISONS[type(op)]()], [right]))})"
        case ast.BoolOp(op=op, values=values):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield node, f"({ast.unparse(ast.BoolOp(other, values))})"
            for index in range(len(values)):
                rest = values[:index] + values[index + 1 :]
                yield node, f"({ast.unparse(rest[0] if len(rest) == 1 else ast.BoolOp(op, rest))})"
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC and not _is_text(left, right):
            yield node, f"({ast.unparse(ast.BinOp(left, ARITHMETIC[type(op)](), right))})"
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield node, str(value + 1)
        case ast.IfExp(body=body, orelse=other):
            yield node, f"({ast.unparse(body)})"
            yield node, f"({ast.unparse(other)})"
        case ast.If(test=test):
            yield test, "(False)"
            yield test, "(True)"
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield node, "pass"


def _is_text(*nodes: ast.expr) -> bool:
    return any(isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str) for node in nodes)
