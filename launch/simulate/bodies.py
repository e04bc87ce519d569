"""Run the bodies of amfm's Triton operations on fake tensors, so that their allocations and launches are traced.

How it works: normally a fake tensor mode calls an operation's fake function, which only states shapes, and its
temporary buffers stay unseen. Here the Python body runs too, on fake tensors inside the tracer; kernel launches are
counted and do nothing. The fake function's answer is compared with the body's: if they disagree, torch.compile and this
simulation would see another program than the GPU runs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from amfm.kernels.common.custom_op import find_body


class BodyRunner:
    """Runs operations of the namespace `amfm` and collects in `mismatches` where fake function and body disagree."""

    def __init__(self) -> None:
        self.compared: Counter[str] = Counter()
        self.mismatches: dict[str, str] = {}

    def run(self, func: Any, args: Any, kwargs: dict[str, Any], mode: Any) -> Any:
        """Result of the body inside the dispatch mode; of the fake function where an operation has no Triton body."""
        body = find_body(func)
        expected = func(*args, **kwargs)
        if body is None:
            return expected
        with mode:
            given = body(*args, **kwargs)
        self.compare(str(func), expected, given)
        return given

    def compare(self, name: str, expected: Any, given: Any) -> None:
        """Compare shape, strides, dtype and device of every result; note the results that differ."""
        self.compared[name] += 1
        pairs = zip(as_tuple(expected), as_tuple(given), strict=True)
        for place, (said, found) in enumerate(pairs):
            if describe(said) != describe(found):
                self.mismatches[f"{name}[{place}]"] = f"fake function {describe(said)}, body {describe(found)}"


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Results of an operation as a tuple, a single one too."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def describe(value: Any) -> str:
    """What a fake function must get right about a tensor: shape, strides, dtype and device."""
    if not isinstance(value, Tensor):
        return str(value)
    return f"{tuple(value.shape)} strides {value.stride()} {value.dtype} on {value.device}"
