"""Rows as codes in one buffer of bytes: what an exchange sends in place of bfloat16, one byte per element plus a scale byte per 128.

A row has its e4m3 codes, the e8m0 byte of each run of 128 (fp8_block's scales, powers of two), and nothing more up to a multiple of
16 bytes. Scales are powers of two, so rounding twice is rounding once: by fp8_block products along rows give the bits that they give of
rows that came wide, and those along the tokens too, but for numbers that are subnormal in one of both runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.low_precision.formats import RUN, Quantized, packed_width, quantize, to_e8m0
from amfm.kernels.runtime.backend import INTERPRETED, resolve_backend


def pack_rows(x_SD: Tensor, backend: str = "torch") -> Tensor:
    """Rows [S, D] as bytes [S, packed_width(D)] uint8."""
    if _is_triton(x_SD, backend):
        from amfm.kernels.low_precision import triton_impl

        packed: Tensor = triton_impl.pack_rows(x_SD)
        return packed
    made, width = quantize(x_SD, "fp8_block"), x_SD.shape[1]
    packed = made.codes.new_zeros(len(x_SD), packed_width(width))
    packed[:, :width] = made.codes
    packed[:, width : width + made.scales.shape[1]] = to_e8m0(made.scales)
    return packed


def unpack_rows(packed: Tensor, x_SD: Tensor, backend: str = "torch") -> None:
    """Write the rows that bytes stand for into `x_SD`, in its dtype."""
    if _is_triton(x_SD, backend):
        from amfm.kernels.low_precision import triton_impl

        triton_impl.unpack_rows(packed, x_SD)
        return
    width = x_SD.shape[1]
    scales = (packed[:, width : width - (-width // RUN["fp8_block"])].int() << 23).view(torch.float32)
    x_SD.copy_(Quantized.of_rows("fp8_block", packed[:, :width], scales).values())


def _is_triton(x: Tensor, backend: str) -> bool:
    """Whether kernels do it: a CPU without the interpreter has none, a plan's tensors are as those of a GPU."""
    on_gpu = x.device.type in ("cuda", "meta") or INTERPRETED
    return on_gpu and resolve_backend(backend, x.device, "moe") == "triton"
