"""What every Triton kernel of ours keeps to, because Triton's interpreter forgives what a GPU does not."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from amfm.kernels.proof.recorded import record
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.first_use import DEFAULT_CASES
from benchmarks.kernels.operations import OPERATIONS

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "kernels", ROOT / "examples/mixers/amfm_mixers")
FILES = sorted(
    path for folder in FOLDERS for path in folder.rglob("*.py") if "import triton.language as tl" in path.read_text()
)


@cache
def _parse(path: Path) -> ast.Module:
    """A file's tree, which several tests look at."""
    return ast.parse(path.read_text())


def _calls(path: Path, name: str) -> Iterator[tuple[int, set[str]]]:
    """Line and named arguments of each `tl.NAME(...)` in a file."""
    for node in ast.walk(_parse(path)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == name
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "tl"
        ):
            yield node.lineno, {keyword.arg for keyword in node.keywords if keyword.arg is not None}


def test_all_kernels_are_looked_at() -> None:
    assert {path.parent.name for path in FILES} >= {
        "attention", "causal_conv1d", "decay_scan", "delta_scan", "diag_scan", "linear_cross_entropy", "moe", "norm",
        "rope", "sparse_attention", "swiglu",
    }  # fmt: skip
    assert sum(1 for path in FILES for _ in _calls(path, "load")) > 100


@pytest.mark.skipif(INTERPRETED, reason="its tiles are others")
def test_every_kernel_is_compiled_ahead_of_time() -> None:
    """What the trials leave out no acceptance run would see, and an operation runs where all of it does."""
    launches = {name: record(case).values() for name, case in OPERATIONS.items()}
    kernels = {
        node.name
        for path in FILES
        for node in _parse(path).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list and node.name.endswith("_kernel")
    }
    assert kernels == {launch.kernel.__name__ for found in launches.values() for launch in found}
    for name, found in launches.items():
        oldest = max((launch.first_architecture for launch in found), default=80)
        assert OPERATIONS[name].first_architecture == oldest, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_masked_loads_say_what_hidden_lanes_hold(path: Path) -> None:
    """On a GPU they hold anything, in the interpreter zero."""
    assert [line for line, named in _calls(path, "load") if "mask" in named and "other" not in named] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_products_say_their_precision(path: Path) -> None:
    """On a GPU float32 operands are cut to tf32 unless told, in the interpreter never."""
    assert [line for line, named in _calls(path, "dot") if "input_precision" not in named] == []


def _kernels(path: Path) -> list[ast.FunctionDef]:
    """Functions of a file that Triton compiles."""
    return [
        node
        for node in ast.walk(_parse(path))
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list)
    ]


def _names(nodes: Iterable[ast.AST], *, stored: bool) -> set[str]:
    """Names that are assigned in these nodes, or read."""
    kind = ast.Store if stored else ast.Load
    found = (name for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name))
    return {name.id for name in found if isinstance(name.ctx, kind)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_kernels_are_written_so_that_triton_3_5_compiles_them(path: Path) -> None:
    """It knows no `min` and `max` of constants, and a loop's variable must keep its type."""
    for kernel in _kernels(path):
        assert not {"min", "max"} & _names([kernel], stored=False), kernel.name
        loops = [node for node in ast.walk(kernel) if isinstance(node, ast.For)]
        assert [
            loop.lineno for loop in loops if _names([loop.target], stored=True) & _names(loop.body, stored=True)
        ] == []


# Numbers that are others in nearly every step where ranks exchange rows: of rows, pairs, tokens that came and tiles.
COUNTS = {
    "count_pairs_kernel": "pairs",
    "place_pairs_kernel": "pairs blocks",
    "limit_pairs_kernel": "pairs",
    "hash_choices_kernel": "seed pairs",
    "order_seats_kernel": "pairs capacity blocks strips",
    "list_tiles_kernel": "bound",
    "route_forward_kernel": "rows",
    "route_backward_kernel": "rows",
    "down_backward_kernel": "rows",
    "sum_choices_kernel": "tokens rows",
    "weigh_activation_kernel": "rows",
    "spread_rows_kernel": "tokens rows",
    "combine_backward_kernel": "tokens rows",
    "persistent_product_kernel": "works",
}


def test_experts_kernels_are_not_compiled_anew_for_another_number_of_rows() -> None:
    """Triton compiles a kernel again where an integer is 1, or 16 divides it or no longer does; a step of all ranks waits."""
    marks = {
        kernel.name: " ".join(map(ast.unparse, kernel.decorator_list))
        for path in FILES
        if "moe" in path.parts
        for kernel in _kernels(path)
    }
    for name, counts in COUNTS.items():
        assert f"do_not_specialize={counts.split()}" in marks[name], name


OPERATION_FILES = sorted(path for folder in FOLDERS for path in folder.glob("*/op.py"))


@pytest.mark.parametrize("path", OPERATION_FILES, ids=lambda path: path.parent.name)
def test_an_operation_names_itself_where_its_backend_is_chosen(path: Path) -> None:
    """By this name its kernels are checked at their first use on a GPU; without it no one would check them."""
    calls = [
        node
        for node in ast.walk(_parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "resolve_backend"
    ]
    for call in calls:
        named = {
            constant.value
            for constant in ast.walk(
                call.args[2] if len(call.args) > 2 else ast.Constant(f"line {call.lineno}: no name")
            )
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
        }
        cases = ast.literal_eval(call.args[3]) if len(call.args) > 3 else DEFAULT_CASES
        assert named <= import_module(cases).OPERATIONS.keys(), (cases, named)
