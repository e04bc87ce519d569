"""Operations for the tests of the acceptance: one right, one with a wrong gradient, one that kills its process, one that hangs.

The right one runs a Triton kernel of this file, so that a child that interprets is verified to interpret.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.cases import Inputs, OperationCase, Problem, Sized


@triton.jit
def _triple_kernel(x, y, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tripled = 3.0 * tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(y + place, tripled.to(y.dtype.element_ty), mask=place < size)


@triton.jit
def _broken_kernel(x, y, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(y + place, tl.dot(tl.load(x + place), tl.load(x + place), missing=1))  # no such argument: does not compile


@torch.library.custom_op("amfm::planted_triple_triton", mutates_args=())
def triple(x: Tensor, wrong: bool) -> Tensor:
    """3 x by the kernel; its gradient is off by one value where `wrong`."""
    y = torch.empty_like(x)
    _triple_kernel[(triton.cdiv(x.numel(), 16),)](x, y, x.numel(), BLOCK=16)
    return y


@triple.register_fake
def _(x: Tensor, wrong: bool) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx, inputs, output) -> None:
    ctx.wrong = inputs[1]


def _differentiate(ctx, d_y: Tensor) -> tuple[Tensor, None]:
    d_x = 3 * d_y
    if ctx.wrong:
        d_x[-1] = 0
    return d_x, None


triple.register_autograd(_differentiate, setup_context=_keep)


def build(fate: str, inputs: Inputs) -> Problem:
    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        if backend != "triton":
            return {"y": 3 * given["x"]}
        if fate == "crash" and given["x"].is_meta:  # where launches are recorded
            _broken_kernel[(1,)](given["x"], torch.empty_like(given["x"]), BLOCK=64, num_warps=8)
        elif fate == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fate == "hang" and not given["x"].is_meta:
            time.sleep(600)
        return {"y": triple(given["x"], fate == "wrong")}

    return Problem({"x": inputs.normal(40)}, run, exact="torch")


def _trials(name: str) -> Iterator[Sized]:
    """A right trial first, so that what was found before a crash is seen to stand."""
    yield Sized("a right one", "first", partial(build, "right"))
    yield Sized(f"the {name} one", "first", partial(build, name))


FATES = ("right", "wrong", "crash", "hang")
OPERATIONS = {fate: OperationCase(fate, lambda: iter(()), partial(_trials, fate)) for fate in FATES}
