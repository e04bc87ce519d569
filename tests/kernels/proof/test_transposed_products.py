"""A product that takes another's transposed result is found in what Triton makes of a kernel, wherever it comes from."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl

from amfm.kernels.proof.ahead_of_time import compile_ahead
from amfm.kernels.runtime.backend import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@triton.jit
def two_products(a, b, out, count, FORM: tl.constexpr):
    lane = tl.arange(0, 16)
    place = lane[:, None] * 16 + lane[None, :]
    x, y = tl.load(a + place), tl.load(b + place)
    first = tl.dot(x, tl.trans(y), input_precision="ieee")
    if FORM == "operand":
        result = tl.dot(tl.trans((first * 2.0).to(tl.bfloat16)), y, input_precision="ieee")
    elif FORM == "loop":
        total = tl.zeros((16, 16), tl.float32)
        for step in range(count):
            if step > 1:
                total += first
        result = tl.dot(x, tl.trans(total).to(tl.bfloat16), input_precision="ieee")
    elif FORM == "sum":
        result = tl.trans(first) + tl.dot(x, y, input_precision="ieee")
    else:  # as it is, added after a mask, or summed before it is transposed
        result = tl.dot(first.to(tl.bfloat16), tl.trans(y), input_precision="ieee")
        result = tl.trans(result) + tl.where(place > 3, tl.dot(x, y, input_precision="ieee"), 0.0)
        row = tl.sum(first, axis=1)[None, :] + tl.zeros((16, 16), tl.float32)
        result += tl.where(place > 5, tl.dot(tl.trans(row).to(tl.bfloat16), y, input_precision="ieee"), 0.0)
    tl.store(out + place, result)


@pytest.mark.parametrize(("form", "found"), [("operand", 1), ("loop", 1), ("sum", 1), ("none", 0)])
def test_a_planted_transposed_product_is_found(form: str, found: int) -> None:
    signature = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "count": "i32"}
    compiled = compile_ahead(two_products, signature, {"FORM": form}, 80, num_warps=1)
    assert len(compiled.transposed_products) == found
