"""States handed from segment to segment of a row, as one kernel: PyTorch takes three launches a segment for it.

A scan that is cut walks every segment from zero first; what truly enters each follows from these local states and from what a
segment leaves of the state before it.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, SIM108

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.runtime.backend import INTERPRETED

BLOCK = 256 if INTERPRETED else 1024


@triton.jit
def pass_states_kernel(
    initial, local, decay, entering, final, segments, numbers, span,
    INITIAL: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """entering [B, segments, N] and final [B, N] of local [B, segments, N], where `span` numbers of N share a factor of decay.

    From the first segment to the last, or BACKWARD. Grid: (blocks of N, B).
    """
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    inside = number < numbers
    state = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        state = tl.load(initial + batch * numbers + number, mask=inside, other=0.0).to(tl.float32)
    for step in range(segments):
        if BACKWARD:
            segment = batch * segments + (segments - 1 - step)
        else:
            segment = batch * segments + step
        at = segment * numbers + number
        tl.store(entering + at, state, mask=inside)
        share = tl.load(decay + segment * (numbers // span) + number // span, mask=inside, other=0.0)
        state = share * state + tl.load(local + at, mask=inside, other=0.0)
    tl.store(final + batch * numbers + number, state, mask=inside)


def pass_states(initial: Tensor | None, local: Tensor, decay: Tensor, *, backward: bool) -> tuple[Tensor, Tensor]:
    """Hand states from segment to segment: those entering each, in the shape of `local`, and the one after the last.

    local [B, segments, ...]: the state of each segment from zero. decay: as local but for its last dims, which share it. Both
    packed and float32, as the results are. Runs over segments in order, backward from the last.
    """
    rows, segments = local.shape[:2]
    numbers = local[0, 0].numel()
    entering = torch.empty_like(local)
    final = local.new_empty(rows, *local.shape[2:])
    pass_states_kernel[(triton.cdiv(numbers, BLOCK), rows)](
        None if initial is None else initial.contiguous(), local, decay, entering, final,
        segments, numbers, numbers // decay[0, 0].numel(), INITIAL=initial is not None, BACKWARD=backward, BLOCK=BLOCK,
    )  # fmt: skip
    return entering, final
