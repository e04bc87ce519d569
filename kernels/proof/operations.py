"""All cases, by the name of their operation: what a command that speaks of every kernel goes through.

They are the `OperationCase`s of each file `case.py` or `*_case.py` in an operation's folder, so that a new operation is part of
every such command by having one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from amfm.kernels.cases import OperationCase

_KERNELS = Path(__file__).parents[1]


def _find_cases() -> Iterator[OperationCase]:
    """The cases of all operations, in the order of their folders."""
    for path in sorted(_KERNELS.glob("*/*case.py")):
        module = ".".join(path.relative_to(_KERNELS).with_suffix("").parts)
        values = vars(importlib.import_module(f"amfm.kernels.{module}")).values()
        yield from (value for value in values if isinstance(value, OperationCase))


OPERATIONS: dict[str, OperationCase] = {case.name: case for case in _find_cases()}


def check_names(names: list[str] | None, known: Mapping[str, object]) -> None:
    """Raise ValueError for a name that `--op` cannot mean."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"--op {name}: there is no such operation; use {', '.join(known)}")
