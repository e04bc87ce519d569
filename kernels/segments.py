"""Sizes of a scan's launch that all Triton scans choose alike: segments of a row, and blocks of a state.

A program walks the chunks of one row and head in order, because each state needs the one before. Where rows and heads
alone leave multiprocessors idle, a row is cut into segments that are walked at the same time, each from a zero state;
what enters a segment is added afterwards.
"""

from __future__ import annotations

import torch
import triton

from kernels.interpreter import count_programs
from kernels.tuning import Config


def cut_segments(chunks: int, segment_chunks: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Choose (segments of a row, chunks of a segment).

    `segment_chunks` > 0 decides; 0 cuts `chunks` only where `programs`, those of an uncut launch, don't fill the card.

    Cutting costs a second walk, so a full card is never cut.
    """
    if segment_chunks == 0:
        wanted = max(1, count_programs(device, 1) // programs) if device.type == "cuda" else 1
        segment_chunks = triton.cdiv(chunks, min(wanted, chunks))
    return triton.cdiv(chunks, segment_chunks), segment_chunks


def padded(size: int) -> int:
    """Round a size up to what a product in a kernel takes: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


def fit_blocks(config: Config, **sizes: int) -> dict[str, int]:
    """Shrink the blocks of a configuration to the sizes that they cut, given by the block's name."""
    return {name: min(value, padded(sizes[name])) if name in sizes else value for name, value in config.items()}
