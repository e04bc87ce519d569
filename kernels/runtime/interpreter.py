"""Settings that differ between Triton's interpreter and a GPU.

The interpreter multiplies the bit patterns of bfloat16 operands, so operands of `tl.dot` are float32 there. Kernels
load, convert to float32, compute, and cast to the constexpr DOT_DTYPE right before a dot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton.language as tl

from amfm.kernels.runtime.backend import INTERPRETED

# Not empty inside `amfm.kernels.proof.check.emulate_rounding`, where the interpreter multiplies bfloat16.
EMULATIONS: list[None] = []
_DOT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operand dtype of `tl.dot` for inputs of `dtype` (float32, bfloat16 or float16): float32 in the plain interpreter.

    Raises ValueError for other dtypes: the kernels have no float64, so calling this is also how launchers
    reject it.
    """
    if dtype not in _DOT_DTYPES:
        raise ValueError(f'backend "triton" supports float32, bfloat16 or float16; got {dtype}; use "torch"')
    return tl.float32 if INTERPRETED and not EMULATIONS else _DOT_DTYPES[dtype]


def count_programs(device: torch.device, per_processor: int = 2) -> int:
    """Programs that fill a GPU: multiprocessors times `per_processor`; 4 in the interpreter, which runs one at a time."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count * per_processor


@contextmanager
def replace_methods(owner: Any, methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, `owner` has these methods; afterwards those of before. Such blocks may nest."""
    before = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    for name, method in methods.items():
        setattr(owner, name, method)
    try:
        yield
    finally:
        for name in methods:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)
