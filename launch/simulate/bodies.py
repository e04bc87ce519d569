"""Runs the bodies of our custom operations on fake tensors, so that what they allocate and launch is seen.

Beside it the operation's fake function answers; both must agree, or torch.compile and this simulation would see another
program than the card runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from launch.simulate.place import current_line


class BodyRunner:
    """Calls operations of the namespace `amfm`. `mismatches`: what a fake function says that the body doesn't give."""

    def __init__(self) -> None:
        self.bodies: dict[Any, Callable[..., Any] | None] = {}
        self.compared: Counter[str] = Counter()
        self.mismatches: dict[str, str] = {}

    def run(self, func: Any, args: Any, kwargs: dict[str, Any], mode: Any) -> Any:
        """What the body gives inside the dispatch mode; for PyTorch's implementations what the fake function says."""
        if func not in self.bodies:
            self.bodies[func] = find_body(func)
        body = self.bodies[func]
        try:
            expected = func(*args, **kwargs)
        except (UnsupportedOperatorException, NotImplementedError) as error:
            raise ValueError(
                f"--trace: the operation {func} ({current_line()}) has no fake function: register one with "
                "`register_fake`, as operations in kernels/ do, or plan without --trace"
            ) from error
        if body is None:
            return expected
        with mode:
            given = body(*args, **kwargs)
        self.compare(str(func), expected, given)
        return given

    def compare(self, name: str, expected: Any, given: Any) -> None:
        """Shape, strides, dtype and device of every result."""
        self.compared[name] += 1
        pairs = zip(as_tuple(expected), as_tuple(given), strict=True)
        for place, (said, found) in enumerate(pairs):
            if describe(said) != describe(found):
                self.mismatches[f"{name}[{place}]"] = f"fake function {describe(said)}, body {describe(found)}"


def find_body(func: Any) -> Callable[..., Any] | None:
    """The Python function behind a custom operation made of Triton kernels."""
    definition = OPDEFS.get(f"{func.namespace}::{func._opname}")
    return definition._init_fn if definition is not None and "triton" in func._opname else None


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Results as a tuple."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def describe(value: Any) -> str:
    """What a fake function must say of a tensor."""
    if not isinstance(value, Tensor):
        return str(value)
    return f"{tuple(value.shape)} strides {value.stride()} {value.dtype} on {value.device}"
