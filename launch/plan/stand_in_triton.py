"""A stand-in for Triton where it is not installed, as on macOS, so that a plan for GPUs can be made there too.

Measuring a block runs the Python bodies of Triton operations and launches nothing. For that a kernel need not be
compiled: its file has to be imported, and its launches counted. So while blocks are measured, and only where Triton is
missing, an importer at the end of the list answers for `triton` and all modules below it. A name that it is asked for is
a class that takes what it is given; what host code computes with is real (`cdiv`, `next_power_of_2`), and a kernel is an
object whose launches can be counted. Nothing runs on a device through it, and it is gone again afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from amfm.kernels.runtime import backend


class JITFunction:
    """A kernel that is launched and computes nothing; `measured.py` counts its launches."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn, self.__name__ = function, function.__name__

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Make a kernel of a function, as a decorator with or without options."""
    return JITFunction if function is None else JITFunction(function)


def cdiv(number: int, divisor: int) -> int:
    """Divide, rounding up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Find the least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


class _AnyName(type):
    """Of a class that any name is: `tl.float32`, `tl.constexpr`, an error that is caught."""

    def __getattr__(cls, name: str) -> Any:
        return _make_name(name)


def _make_name(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyName(name, (Exception,), {"__init__": lambda self, *_, **__: None})


class _Module(ModuleType):
    """A module of the stand-in: real where host code computes with it, else any name."""

    def __getattr__(self, name: str) -> Any:
        known = {"jit": jit, "cdiv": cdiv, "next_power_of_2": next_power_of_2, "JITFunction": JITFunction}
        return known[name] if name in known else _make_name(name)


class _Importer(MetaPathFinder, Loader):
    """Finds `triton` and all modules below it, if nothing else has found them."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Answer for Triton alone."""
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] == "triton" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make a module of any names."""
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: there is no code."""


@contextmanager
def triton_at_hand() -> Iterator[None]:
    """Let kernels' files be imported inside of the block, whether Triton is installed or not."""
    if find_spec("triton") is not None:
        yield
        return
    importer, refuse = _Importer(), backend.refuse_triton
    sys.meta_path.append(importer)
    backend.refuse_triton = lambda device: None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.meta_path.remove(importer)
        backend.refuse_triton = refuse
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
            del sys.modules[name]
