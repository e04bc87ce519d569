"""Rows and tokens that are further apart than 2^31 numbers are read where they are: products of offsets are 64 bits wide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from amfm.kernels.attention.op import attention
from amfm.kernels.causal_conv1d.op import causal_conv1d
from amfm.kernels.decay_scan.op import mamba2_scan
from amfm.kernels.norm.op import gated_rms_norm, rms_norm
from amfm.kernels.swiglu.op import swiglu

# Places and strides of rows and of tokens; each on its own fits 32 bits. Tokens of a tile may be 2^24 numbers apart, and no more.
PLACES, STRIDES = (3, 136), (2**30, 2**24)
DTYPE = torch.float16  # the narrowest that all take


@pytest.fixture(autouse=True)
def no_races() -> None:
    """In place of what watches each number of memory, which is far too much here."""


def far(values: Tensor, dim: int) -> Tensor:
    """The same values with this dim's places so far apart; memory that nothing touches costs none."""
    strides = list(values.stride())
    strides[dim] = STRIDES[dim]
    memory = torch.empty(PLACES[dim] * STRIDES[dim], dtype=values.dtype, device=values.device)
    spread = memory.as_strided(values.shape, strides)
    return spread.copy_(values)


def scan(x_BTHP: Tensor) -> Tensor:
    dt_BTH, A_H = x_BTHP[..., 0].contiguous(), torch.zeros(2)
    B_BTGN = x_BTHP[:, :, :1].contiguous()
    return mamba2_scan(x_BTHP, dt_BTH, A_H, B_BTGN, B_BTGN, A_H + 1, A_H, chunk_size=16, backend="triton").y_BTHP


def convolve(x_BTHP: Tensor) -> Tensor:
    return causal_conv1d(x_BTHP.flatten(2), torch.ones(8, 4, dtype=DTYPE), None, backend="triton")


def attend(x_BTHP: Tensor) -> Tensor:
    return attention(x_BTHP, x_BTHP, x_BTHP, backend="triton")


def norm(x_BTHP: Tensor) -> Tensor:
    return rms_norm(x_BTHP.flatten(2), torch.ones(8, dtype=DTYPE), 1e-5, backend="triton")


def gated_norm(x_BTHP: Tensor) -> Tensor:
    wide = x_BTHP.flatten(2)
    return gated_rms_norm(wide, wide, torch.ones(8, dtype=DTYPE), 1e-5, backend="triton")


def gate(x_BTHP: Tensor) -> Tensor:
    return swiglu(x_BTHP.flatten(2), backend="triton")


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "tokens"])
@pytest.mark.parametrize("operation", [scan, convolve, attend, norm, gated_norm, gate], ids=lambda each: each.__name__)
def test_what_lies_beyond_32_bits_is_read_where_it_lies(operation: Callable[[Tensor], Tensor], dim: int) -> None:
    shape = (PLACES[0], 2, 2, 4) if dim == 0 else (1, PLACES[1], 2, 4)
    x_BTHP = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    assert torch.equal(operation(far(x_BTHP, dim)), operation(x_BTHP))
