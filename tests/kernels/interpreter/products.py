"""Products of Triton's interpreter in an order of additions that no library chooses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton
from triton.runtime import interpreter

from amfm.kernels.runtime.backend import INTERPRETED

scaled_products = pytest.mark.skipif(
    INTERPRETED and triton.__version__.startswith("3.6."),
    reason="the interpreter of Triton 3.6 has no tl.dot_scaled, and its sums of int32 do not wrap",
)


@contextmanager
def multiply_term_by_term() -> Iterator[None]:
    """Inside, each number of `tl.dot` is the sum of its terms in their order, wherever in its tile it is."""

    def product(left: Any, right: Any, added: Any, *_: Any) -> Any:
        total = added.data.copy()
        for k in range(left.data.shape[-1]):
            total += left.data[..., k, None] * right.data[..., k, None, :]
        return interpreter.TensorHandle(total, added.dtype.scalar)

    interpreter.interpreter_builder.create_dot = product
    try:
        yield
    finally:
        del interpreter.interpreter_builder.create_dot
