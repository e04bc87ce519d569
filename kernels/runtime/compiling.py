"""Marks for torch.compile that import it no sooner than someone compiles.

`torch.compiler.disable` and `assume_constant_result` import the whole compiler where they decorate, and what PyTorch marks so
itself (optimizers, recomputation, custom operations, operations on meta tensors) does at the first call: 1,800 modules that take
as long as PyTorch, of which a run that compiles nothing needs none. All of them wait here until the compiler is there.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_waiting: set[CodeType] = set()
_mark: Any = torch._disable_dynamo  # type: ignore[attr-defined]


def assume_constant(function: Callable[P, R]) -> Callable[P, R]:
    """What `torch.compiler.assume_constant_result` does: torch.compile calls the function once and keeps its answer."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def disable_compile(function: Any = None, recursive: bool = True) -> Any:
    """What `torch.compiler.disable` does: torch.compile leaves out the function and all that it calls."""
    marked = _mark(function, recursive)
    if function is not None:
        _wait_for_compiler(marked)
    return marked


def _wait_for_compiler(marked: Any) -> None:
    """Let what `torch._disable_dynamo` has marked call its function directly until the compiler is there.

    Its wrapper looks for `__dynamo_disable` at the function, and imports the compiler if there is none. `__wrapped__` may
    have been copied from a function further inside.
    """
    if "fn" not in marked.__code__.co_freevars:
        return  # the wrapper of another PyTorch, which imports the compiler at the first call
    function = marked.__closure__[marked.__code__.co_freevars.index("fn")].cell_contents

    def call(*args: Any, **settings: Any) -> Any:
        if not is_compiler_there():
            return function(*args, **settings)
        del function.__dynamo_disable
        return marked(*args, **settings)

    function.__dynamo_disable = call
    _waiting.add(call.__code__)


def is_compiler_there() -> bool:
    """Whether someone has imported the compiler."""
    return "torch._dynamo" in sys.modules


def prepare_to_compile() -> None:
    """Import the compiler, and let it know which algorithms were asked for before, and what of ours it must not trace."""
    from torch._dynamo.eval_frame import skip_code

    for code in _waiting:
        skip_code(code)
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=warns)


def use_deterministic_algorithms(mode: bool, *, warn_only: bool) -> None:
    """`torch.use_deterministic_algorithms`, which imports the compiler to set it too: where it is there, or later."""
    if is_compiler_there():
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    else:
        torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)


@contextmanager
def nothing_compiled(*absent: str) -> Iterator[None]:
    """Inside the block `torch.compile` decorates nothing, and modules `absent` cannot be imported, unless they are already.

    For libraries that compile functions where they define them, of which we call none, and that do without these modules.
    """

    def leave(function: Any = None, *_: Any, **__: Any) -> Any:
        return (lambda later: later) if function is None else function

    kept, hidden = torch.compile, [name for name in absent if name not in sys.modules]
    torch.compile = leave  # type: ignore[assignment]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: an ImportError
    try:
        yield
    finally:
        torch.compile = kept
        for name in hidden:
            del sys.modules[name]


# What is marked already, 290 functions that share the wrapper's code, and what will be.
for _marked in gc.get_referrers(_mark(lambda: None).__code__):
    if isinstance(_marked, FunctionType) and _marked.__closure__:
        _wait_for_compiler(_marked)
torch._disable_dynamo = disable_compile  # type: ignore[attr-defined, assignment]
