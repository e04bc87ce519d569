"""Causal convolutions by Monarch products: a discrete Fourier transform of m^2 numbers as two block-diagonal ones.

With n = m n1 + n2 and k = k1 + m k2, w = e^(-2 pi i / m^2),

    X_k = sum_n2 w^(m n2 k2) w^(n2 k1) sum_n1 w^(m n1 k1) x_n

so m numbers at a time are multiplied by one m x m matrix, all are turned by w^(n2 k1), and m at a time are multiplied again
(Fu et al. 2023, arXiv 2310.12109, section 3.1). 4 m^3 = 4 N^(3/2) complex multiply-adds of a transform and its inverse, all
of them in products of matrices. The order in which frequencies stand is left as it falls: products of spectra do not ask.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Factors(NamedTuple):
    """w^(m a b) and w^(a b) for a, b < m: the blocks of both products, and the turn between them."""

    block_MM: Tensor
    turn_MM: Tensor


@lru_cache(maxsize=32)
def factors(m: int, dtype: torch.dtype, device: torch.device) -> Factors:
    """Compute the factors of a transform of m^2 numbers, in float64, and round them to a complex dtype."""
    place_M = torch.arange(m, dtype=torch.float64)
    product_MM = place_M[:, None] * place_M
    block, turn = (
        torch.polar(torch.ones_like(angle), angle).to(device=device, dtype=dtype)
        for angle in (-2 * math.pi / m * product_MM, -2 * math.pi / m**2 * product_MM)
    )
    return Factors(block, turn)


def to_spectrum(x: Tensor, m: int) -> Tensor:
    """Transform x [..., up to m^2] real, zeros after it -> [..., m, m] complex, frequency k1 + m k2 at [k1, k2]."""
    wide = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    block, turn = factors(m, wide, x.device)
    x_MM = functional.pad(x, (0, m * m - x.shape[-1])).unflatten(-1, (m, m)).to(wide)
    return (block @ x_MM * turn) @ block


def from_spectrum(x_MM: Tensor) -> Tensor:
    """Invert `to_spectrum`: [..., m, m] -> [..., m^2] real."""
    m = x_MM.shape[-1]
    block, turn = (factor.conj() for factor in factors(m, x_MM.dtype, x_MM.device))
    return ((block @ (x_MM @ block * turn)).real / m**2).flatten(-2)


def convolve(x_BCT: Tensor, kernel_CT: Tensor) -> Tensor:
    """Compute y_t = sum_(j <= t) kernel_(t - j) x_j of each channel: [B, C, T]; in float32 at least."""
    tokens, wide = x_BCT.shape[-1], torch.promote_types(x_BCT.dtype, torch.float32)
    m = math.isqrt(2 * tokens - 2) + 1  # m^2 >= 2 T - 1, so that nothing comes around
    spectrum = to_spectrum(x_BCT.to(wide), m) * to_spectrum(kernel_CT[:, :tokens].to(wide), m)
    return from_spectrum(spectrum)[..., :tokens].to(x_BCT.dtype)
