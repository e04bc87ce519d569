"""What launches of the Triton scans have in common: the sizes of a call, a kernel's configuration, segments of a row.

A program walks the chunks of one row and head in order, because each state needs the one before. Where just the rows and
heads leave multiprocessors idle, a row is cut into segments that are walked at the same time, each from a zero state;
a second walk starts from what truly enters each.

States handed from segment to segment of a row, as one kernel: PyTorch takes three launches a segment for it.

A scan that is cut walks every segment from zero first; what truly enters each follows from these local states and from what a
segment leaves of the state before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, SIM108
import triton.language as tl
from torch import Tensor

from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import count_programs, dot_dtype
from amfm.kernels.runtime.tuning import Config, config_for

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


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd will want gradients of an operation on these tensors.

    Asked in front of a custom operation: inside, autograd is off and no tensor requires gradients.
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def cut_segments(chunks: int, segment_chunks: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Choose (segments of a row, chunks of a segment).

    `segment_chunks` > 0 decides; 0 cuts `chunks` only where `programs`, those of an uncut launch, do not fill the GPU.

    Cutting costs a second walk, so a full GPU is never cut.
    """
    if segment_chunks == 0:
        wanted = max(1, count_programs(device, 1) // programs) if device.type == "cuda" else 1
        segment_chunks = triton.cdiv(chunks, min(wanted, chunks))
    return triton.cdiv(chunks, segment_chunks), segment_chunks


def padded(size: int) -> int:
    """Round a size up to what a product in a kernel takes: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


@dataclass(frozen=True)
class ScanLaunch:
    """Sizes of one call of a scan, shared by its kernels; operations with more sizes inherit from it.

    B sequences of T tokens, H heads with states of K x V. A program takes Q tokens at a time; of each chunk there is one
    state. `segments` of `segment_chunks` chunks are walked at the same time.
    """

    B: int
    T: int
    H: int
    K: int
    V: int
    Q: int
    chunks: int
    segments: int = 1
    segment_chunks: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Scalars of the walks, in their order."""
        return self.T, self.H, self.K, self.V, self.chunks

    @property
    def tuned_for(self) -> tuple[int, ...]:
        """Sizes that a kernel's configuration depends on."""
        return self.Q, self.K, self.V

    @property
    def levels(self) -> int:
        """How often Q tokens can be halved."""
        return self.Q.bit_length() - 1

    def constants(self, v: Tensor) -> dict[str, Any]:
        """What all kernels are compiled for."""
        return {"Q": self.Q, "DOT": dot_dtype(v.dtype)}

    def config(self, kernel: str, candidates: tuple[Config, ...], v: Tensor) -> dict[str, Any]:
        """The kernel's configuration for these sizes, with blocks no larger than K and V, and the constants."""
        config = config_for(kernel, (v.dtype, *self.tuned_for), candidates, v.device)
        limits = {"PART": padded(self.K), "BLOCK_K": padded(self.K), "BLOCK_V": padded(self.V)}
        return self.constants(v) | {name: min(value, limits.get(name, value)) for name, value in config.items()}

    def walk(self, kernel: str, candidates: tuple[Config, ...], v: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
        """Grid and constants of a walk: a program takes a row, a head, a block of V and all of K, in one segment."""
        config = self.config(kernel, candidates, v)
        grid = (self.B * self.H * triton.cdiv(self.V, config["BLOCK_V"]), self.segments)
        return grid, config | {"BLOCK_K": padded(self.K)}

    def over_segments(
        self,
        walk: Callable[[Tensor | None, bool], tuple[Tensor, Tensor]],
        start: Tensor | None,
        *,
        backward: bool = False,
    ) -> Tensor:
        """Walk the segments of each row, and return the state that leaves the last (backward: the first) [B, H, K, V].

        `walk(states, store)` starts each segment from its own state of `states` [B, segments, H, K, V] (None: zero),
        writes its results only where `store` says so, and returns `segment_ends`. start [B, H, K, V]: what enters the row.
        """
        if self.segments == 1:
            return walk(start, True)[0][:, 0]
        # Two walks: the first finds what each segment makes of zero, the second starts from what truly enters it.
        states, last = pass_states(start, *walk(None, False), backward=backward)
        walk(states, True)
        return last

    def ends(
        self, walk: Callable[[Tensor | None, bool], tuple[Tensor, Tensor]], *, backward: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What each row makes of a zero state, [B, H, K, V], and by which factor it passes any other on; no results are written.

        For a row whose state comes from elsewhere while it is walked: by linearity these two say what leaves it then.
        """
        states, factors = walk(None, False)
        if self.segments == 1:
            return states[:, 0], factors[:, 0]
        return pass_states(None, states, factors, backward=backward)[1], factors.prod(1)

    def segment_ends(self, like: Tensor, *gate: int) -> tuple[Tensor, Tensor]:
        """Room for one state a segment and for its decay, a factor for each head or, given K, for each key channel."""
        shapes = (self.K, self.V), gate
        state, decay = (like.new_empty(self.B, self.segments, self.H, *last, dtype=torch.float32) for last in shapes)
        return state, decay

    def chunk_states(self, like: Tensor) -> Tensor:
        """Room for one state a chunk, in the dtype of `like`."""
        return like.new_empty(self.B, self.chunks, self.H, self.K, self.V)
