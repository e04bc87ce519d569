"""Kernels give bitwise identical results, and the same messages for wrong shapes, with and without `quick_interpreter`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels.quick.interpreter import quick_interpreter


@pytest.fixture(autouse=True, scope="module")
def quick() -> None:
    """In place of the folder's: each test here runs kernels both ways."""


def both_ways(run: Callable[[], object]) -> list[object]:
    """Results with the interpreter as it is installed, with the quick one, and as installed once more."""
    found = [run()]
    with quick_interpreter():
        found.append(run())
    return [*found, run()]


@triton.jit
def _mixed(x, y, out, n, B: tl.constexpr, C: tl.constexpr):
    """Masks, broadcasts, integers of both widths, casts down and up, a product, a sum and a scan."""
    rows, columns = tl.arange(0, B), tl.arange(0, C)
    at = rows[:, None] * C + columns[None, :]
    inside = (rows < n)[:, None] & (columns != 3)[None, :]
    a = tl.load(x + at, mask=inside, other=0.5)
    b = tl.load(y + at).to(tl.bfloat16).to(tl.float32)
    product = tl.dot(a, tl.trans(b))
    total = tl.sum(product, axis=1)[:, None] + tl.cumsum(a * b, 0) * 2 - columns[None, :]
    tl.store(out + at, tl.where(at % 5 == 0, -total, total / (1 + at)), mask=rows[:, None] < n + 1)


def test_kernels_give_the_bits_of_the_interpreter_as_it_is_installed() -> None:
    x, y = torch.randn(2, 16, 16)

    def run() -> torch.Tensor:
        out = torch.zeros(16, 16)
        _mixed[(1,)](x, y, out, 11, B=16, C=16)
        return out.view(torch.int32)

    before, quick, after = both_ways(run)
    assert before.count_nonzero() > 100 and quick.equal(before) and after.equal(before)


@triton.jit
def _wraps(x, out, B: tl.constexpr):
    at = tl.arange(0, B)
    value = tl.load(x + at)
    tl.store(out + at, value * value + value)


def test_integers_wrap_in_place_of_an_assertion() -> None:
    x = torch.full((4,), 2**31 - 3, dtype=torch.int32)

    def run() -> list[int]:
        out = torch.zeros_like(x)
        _wraps[(1,)](x, out, B=4)
        return out.tolist()

    assert both_ways(run) == [(x * x + x).tolist()] * 3


@triton.jit
def _numbers(x, n, out, B: tl.constexpr):
    """Numbers of the text on both sides of blocks and of scalars, of their type and of others; zeros of both signs."""
    at = tl.arange(0, B)
    a, i, j = tl.load(x + at), at - 3, (at + 2).to(tl.int64)
    tl.store(out + at, a * -0.0)
    tl.store(out + B + at, a * 0.0)
    tl.store(out + 2 * B + at, a * 0)
    tl.store(out + 3 * B + at, 1 - a * 1 + (1.0 - a * 1.0) + 2 * i + i / 2 + 0.5 * i + i // 2 + i % 3)
    tl.store(out + 4 * B + at, tl.where((i > 1) | (j < 2), tl.maximum(a, 0.25), n * 2 + 1 / (n + 1)) + j * 2 + 2.5 * n)
    tl.store(out + 5 * B + at, (a.to(tl.bfloat16) * 0.3).to(tl.float32) + (a.to(tl.bfloat16) / 3).to(tl.float32))
    tl.store(out + 6 * B + at, tl.minimum(a, float("nan")) + a * float("nan"))


def test_a_number_becomes_the_block_that_the_interpreter_makes() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0, 1e38, -1e38, 1e-40])

    def run() -> torch.Tensor:
        out = torch.zeros(7, 8)
        for _ in range(2):  # the second time numbers are blocks already
            _numbers[(1,)](x, 5, out, B=8)
        return out.view(torch.int32)

    before, quick, after = both_ways(run)
    assert len(before.unique()) > 20 and quick.equal(before) and after.equal(before)


@triton.jit
def _every_operator(x, y, n, out, B: tl.constexpr):
    """Each operator on columns and rows, blocks and scalars, floats, integers of both widths, truth values, and mixed."""
    at = tl.arange(0, B)
    f, g = tl.load(x + at)[:, None], tl.load(x + B + at)[None, :]
    i, j = at[:, None] - 2, at[None, :] + 1
    wide, one, small = i.to(tl.int64), tl.load(x), at.to(tl.uint8)[None, :]
    there = out + at[:, None] * B + at[None, :]
    tl.store(there, f + g - f * g / (g + n))
    tl.store(there + 16, (i * j + wide - j // 2 + wide % j).to(tl.float32))
    tl.store(there + 32, (f < g).to(tl.float32) + 2 * (f <= g) + 4 * (i > j) + 8 * (wide >= j) + 16 * (f == g))
    tl.store(there + 48, ((f > one) & (i < j) | (wide == n)).to(tl.int32).to(tl.float32) + (i & j) + (i | j))
    tl.store(there + 64, (1 - f) + (2.5 - g) + (n - i) + 3 / g + f % g + one * f + (g - one) + n * j + small)
    tl.store(there + tl.full((1, 1), 80, tl.int64), f * i + g / j - one / n + (i - j).to(tl.float32) * wide)
    tl.store(out + 96 + at, tl.load(y + (at + n - n)) + one)
    tl.store(out + 100, n + one * n - one / 3 + (n // 2) * (n % 2))


def test_every_operator_gives_the_bits_of_the_interpreter_as_it_is_installed() -> None:
    x, y = torch.tensor([0.0, -0.0, 1.5, -2.5, 1.5, 3.0, -1e38, 1e-40]), torch.randn(4)

    def run() -> torch.Tensor:
        out = torch.zeros(101)
        for _ in range(2):
            _every_operator[(1,)](x, y, 5, out, B=4)
        return out.view(torch.int32)

    before, quick, after = both_ways(run)
    assert len(before.unique()) > 40 and quick.equal(before) and after.equal(before)


@triton.jit
def _below_zero(out, B: tl.constexpr):
    tl.store(out + tl.arange(0, B), tl.arange(0, B).to(tl.uint8) + -1)


@triton.jit
def _unequal(out, B: tl.constexpr, C: tl.constexpr):
    tl.store(out + tl.arange(0, B), tl.arange(0, B) + tl.arange(0, C))


@triton.jit
def _not_a_power(out, B: tl.constexpr):
    tl.store(out + tl.arange(0, 4), tl.sum(tl.zeros((4, B), tl.float32), 1))


@pytest.mark.parametrize(
    ("kernel", "sizes"), [(_unequal, {"B": 4, "C": 8}), (_not_a_power, {"B": 3}), (_below_zero, {"B": 4})]
)
def test_shapes_and_numbers_that_do_not_fit_are_refused_with_the_same_message(
    kernel: object, sizes: dict[str, int]
) -> None:
    def run() -> str:
        with pytest.raises(interpreter.InterpreterError) as error:
            kernel[(1,)](torch.zeros(8), **sizes)
        return str(error.value)

    messages = both_ways(run)
    assert len(set(messages)) == 1 and messages[0]


def test_less_is_computed() -> None:
    """Blocks of one shape share what follows from it, and overflow is not computed for an assertion that is left out."""
    installed = tl.block_type(tl.int32, [4, 8])
    with quick_interpreter():
        one, other = (tl.block_type(dtype, [4, 8]) for dtype in (tl.int32, tl.float32))
        assert one.shape is other.shape and (one, str(one)) == (installed, str(installed))
        assert not interpreter.interpreter_builder.options.sanitize_overflow
    assert tl.block_type(tl.int32, [4, 8]).shape is not one.shape
