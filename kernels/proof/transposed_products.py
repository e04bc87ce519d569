"""Finds products of a compiled kernel that take the transpose of another product's result.

Triton 3.4 to 3.7.0 makes wrong numbers of that form on Hopper, so no kernel of ours has it. It is searched in Triton's
own representation of the kernel, after inlining and simplification, because there a sum may have become part of a
product that the source shows apart.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

_NAME = r"%[\w$.-]+(?:#\d+)?"
_RESULT = re.compile(r"^(%[\w$.-]+)(?::\d+)? = (\S+)(.*)$")
# What becomes of a matrix of products here is no such matrix any more: sums over one of its dimensions, or nothing of it.
_ENDS = ("tt.load", '"tt.reduce"', "tt.reduce", "tt.call", "arith.cmpf", "arith.cmpi")
_CLEAN, _PRODUCT, _TRANSPOSED = range(3)


def find_transposed_products(ttir: str) -> list[str]:
    """List the results of `tt.dot` in a kernel's TTIR that take, as operand or sum, a transposed product's result.

    A value counts as a product's result until it is reduced or stored; elementwise operations, selections, layouts and
    loops pass it on.
    """
    flows, transposes, products = _read_flows(ttir)
    state: dict[str, int] = defaultdict(int)
    for name in products:
        state[name] = _PRODUCT
    moved = True
    while moved:
        moved = False
        for result, operands in flows.items():
            reached = max((state[operand] for operand in operands), default=_CLEAN)
            if result in transposes and reached == _PRODUCT:
                reached = _TRANSPOSED
            if reached > state[result]:
                state[result], moved = reached, True
    return sorted(name for name, operands in products.items() if any(state[each] == _TRANSPOSED for each in operands))


def _read_flows(ttir: str) -> tuple[dict[str, set[str]], set[str], dict[str, list[str]]]:
    """Read which values each value is made of, which values are transposes, and the operands of each product."""
    flows: dict[str, set[str]] = defaultdict(set)
    transposes: set[str] = set()
    products: dict[str, list[str]] = {}
    blocks: list[tuple[str, list[str]]] = []  # of the loops and branches around a line: result, and what it carries
    for line in _lines(ttir):
        found = _RESULT.match(line)
        name, operation, rest = found.groups() if found else ("", line.split(" ", 1)[0], line)
        if operation == "tt.dot":
            products[name] = re.findall(_NAME, rest)[:3]
        elif operation == "scf.for":
            carried = re.findall(rf"({_NAME}) = ({_NAME})", rest.partition("iter_args(")[2].partition(")")[0])
            for index, (argument, initial) in enumerate(carried):
                flows[argument].add(initial)
                flows[_result(name, index, len(carried))].add(argument)
            blocks.append((name, [argument for argument, _ in carried]))
            continue
        elif operation == "scf.yield" and blocks:
            name, carried_names = blocks[-1]
            values = re.findall(_NAME, rest.partition(" : ")[0])
            for index, value in enumerate(values):
                flows[_result(name, index, len(values))].add(value)
                if carried_names:
                    flows[carried_names[index]].add(value)
        elif name and operation not in _ENDS:
            flows[name].update(re.findall(_NAME, rest))
            if operation == "tt.trans":
                transposes.add(name)
        if line.startswith("}") and not line.endswith("{"):  # `} else {` continues with the branch's block
            blocks.pop()
        elif line.endswith("{") and not line.startswith("}"):
            blocks.append((name, []))
    return flows, transposes, products


def _result(name: str, index: int, count: int) -> str:
    """Name of one of the values that a loop or branch returns."""
    return name if count == 1 else f"{name}#{index}"


def _lines(ttir: str) -> Iterator[str]:
    """Lines of the text without locations, comments and labels."""
    for line in ttir.splitlines():
        bare = re.sub(r"\s+loc\(.*\)$", "", line).strip()
        if bare and not bare.startswith(("#", "//", "^")):
            yield bare
