"""The number formats of three recipes in PyTorch: the definition that kernels are compared with, bitwise.

    fp8_block  codes e4m3; a power of two as float32 for each run of 128 numbers, of a weight for each block of 128 x 128
    mxfp8      codes e4m3; a power of two for each run of 32 numbers, whose exponent is the e8m0 byte
    nvfp4      codes e2m1; an e4m3 scale for each run of 16 numbers, of a weight for each block of 16 x 16, and one float32 scale
               for the whole tensor

Runs are along the last dimension, over which a product sums, so an operand of a product along its rows is quantised from the
transpose, and always from the wide numbers. Scales are powers of two such that the largest number of a block is at most the
format's largest: scaling rounds nothing, and decoded numbers of e4m3 are bfloat16 exactly.

What is not finite stays so. A NaN has the code of NaN in e4m3; e2m1 has none, so there its block's scale is NaN. Neither counts
for the scales of others. Sources: the OCP specifications of 8-bit numbers (OFP8) 1.0 and of MX 1.0; for nvfp4 Abecassis et al.
2025, arXiv 2509.25149, section 2 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.low_precision.recipe import RecipeName

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E4M3_NAN = 0x7F
# Numbers of a run along the sum, and rows of a weight's block.
RUN = {"fp8_block": 128, "mxfp8": 32, "nvfp4": 16}
WEIGHT_ROWS = {"fp8_block": 128, "mxfp8": 1, "nvfp4": 16}
SMALLEST_SCALE = 2.0**-126
TURNED = 16  # numbers that a Hadamard matrix turns
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Quantized:
    """A matrix [M, K] as codes [M, K], a byte each, and a float32 scale [ceil(M / rows), ceil(K / run)] of each block.

    `rows`, `run`: sizes of a block. `whole`: nvfp4's float32 factor of the whole matrix; its codes are 0..15.
    """

    codes: Tensor
    scales: Tensor
    rows: int
    run: int
    whole: Tensor | None = None

    @classmethod
    def of_rows(cls, name: RecipeName, codes: Tensor, scales: Tensor, whole: Tensor | None = None) -> Quantized:
        """What `quantize` made of rows of activations or gradients, out of its tensors."""
        return cls(codes, scales, 1, RUN[name], whole)

    def decode(self) -> Tensor:
        """The numbers [M, K] float32 without the factor of the whole matrix: exact in bfloat16 too."""
        numbers = from_e4m3(self.codes) if self.whole is None else from_e2m1(self.codes)
        blocks = cut_blocks(numbers, self.rows, self.run)
        return join_blocks(blocks * self.scales[:, None, :, None], self.codes)

    def values(self) -> Tensor:
        """The numbers [M, K] float32 that this stands for."""
        return self.decode() if self.whole is None else self.decode() * self.whole


def quantize(x_MK: Tensor, name: RecipeName, *, weight: bool = False, noise: Tensor | None = None) -> Quantized:
    """Quantise a matrix [M, K] in runs along its rows; `weight`: in a weight's blocks.

    `noise` [M, K], of `draw_noise`: round e2m1 at random. Sizes need not divide: what a block lacks counts as zeros. Numbers are
    read in float32.
    """
    rows, run = WEIGHT_ROWS[name] if weight else 1, RUN[name]
    blocks = cut_blocks(x_MK.float(), rows, run)
    largest = torch.where(blocks.isnan(), 0.0, blocks.abs()).amax((1, 3), keepdim=True)
    if name == "nvfp4":
        return _quantize_nvfp4(x_MK, blocks, largest, noise)
    scales, factors = power_of_two_scales(largest)
    return Quantized(join_blocks(to_e4m3(blocks * factors), x_MK), scales[:, 0, :, 0], rows, run)


def _quantize_nvfp4(x_MK: Tensor, blocks: Tensor, largest: Tensor, noise: Tensor | None) -> Quantized:
    """`quantize` with two scales: the whole matrix's lets those of blocks use all of e4m3."""
    finite = torch.where(largest.isfinite(), largest, 0.0)
    all_finite = torch.where(blocks.isfinite(), blocks.abs(), 0.0)
    whole = (all_finite.amax() / (E4M3_MAX * E2M1_MAX)).clamp(min=SMALLEST_SCALE)
    wanted = finite / E2M1_MAX / whole
    scales = from_e4m3(to_e4m3(wanted))
    if noise is not None:
        # Where the nearest scale is too small it clamps the largest number of its block, and the mean would be too small.
        scales = torch.where(scales < wanted, from_e4m3(to_e4m3(wanted).clamp(max=E4M3_NAN - 2) + 1), scales)
    divisors = scales * whole
    numbers = torch.where(divisors > 0, blocks / divisors, 0.0)
    codes = to_e2m1(numbers, None if noise is None else cut_blocks(noise, *blocks.shape[1::2]))
    has_all = blocks.isfinite().all(3, keepdim=True).all(1, keepdim=True)
    scales = torch.where(has_all, scales, torch.nan)
    return Quantized(join_blocks(codes, x_MK), scales[:, 0, :, 0], blocks.shape[1], blocks.shape[3], whole)


def cut_blocks(x_MK: Tensor, rows: int, run: int) -> Tensor:
    """A matrix [M, K] as blocks [ceil(M / rows), rows, ceil(K / run), run], filled up with zeros."""
    missing = (0, -x_MK.shape[1] % run, 0, -x_MK.shape[0] % rows)
    if any(missing):
        x_MK = functional.pad(x_MK, missing)
    return x_MK.unflatten(1, (-1, run)).unflatten(0, (-1, rows)) if x_MK.numel() else x_MK.new_zeros(0, rows, 0, run)


def join_blocks(blocks: Tensor, like_MK: Tensor) -> Tensor:
    """The matrix of blocks, as large as another one."""
    joined = blocks.flatten(2).flatten(0, 1)
    return joined[: like_MK.shape[0], : like_MK.shape[1]].contiguous()


def power_of_two_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest powers of two by which numbers up to these become at most 448, and their reciprocals; both exact.

    By the bits of float32, without a logarithm or a division, so that all machines agree. 448 is 1.75 * 2^8: what is larger than
    1.75 times its own power of two needs the next one.
    """
    exponents = (((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 8).clamp(min=1)
    return (exponents << 23).view(torch.float32), ((254 - exponents) << 23).view(torch.float32)


def to_e8m0(scales: Tensor) -> Tensor:
    """The byte of each power of two: its exponent, 127 more."""
    return (scales.view(torch.int32) >> 23).to(torch.uint8)


def to_e4m3(numbers: Tensor) -> Tensor:
    """Codes [uint8] of the nearest e4m3 numbers, ties to even, beyond 448 that; NaN is 0x7F.

    torch's cast, which equals rounding by integers (the tests compares them with each other) and takes a thirtieth of
    the time.
    """
    codes = numbers.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(numbers.isnan(), E4M3_NAN, codes)


def from_e4m3(codes: Tensor) -> Tensor:
    """The float32 numbers of codes."""
    return codes.view(torch.float8_e4m3fn).float()


def to_e2m1(numbers: Tensor, noise: Tensor | None = None) -> Tensor:
    """Codes 0..15 [uint8] of the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, ties to the even code, beyond 6 that.

    `noise`, in [0, 1): up with the probability that makes the mean right. A NaN is 6.
    """
    size = numbers.abs().nan_to_num(nan=E2M1_MAX).clamp(max=E2M1_MAX)
    # Neighbours are 0.5 apart below 2, 1 below 4, 2 from there on; codes continue where steps change.
    per_step, first = torch.where(size < 4, torch.where(size < 2, 2.0, 1.0), 0.5), (size >= 2).int() * 2
    steps = size * per_step
    steps = steps.round() if noise is None else (steps + noise).floor()
    sign = (numbers.view(torch.int32) >> 28) & 8
    return (steps.int() + first + (size >= 4).int() * 2 | sign).to(torch.uint8)


def from_e2m1(codes: Tensor) -> Tensor:
    """The float32 numbers of codes."""
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
    return torch.cat([table, -table])[codes.int()]


def packed_width(width: int) -> int:
    """Bytes of a row of so many numbers as codes with their scales (packed_rows.py)."""
    return -(-(width + -(-width // RUN["fp8_block"])) // 16) * 16


def draw_noise(x_RO: Tensor, seed: int, product: int = 0, rows: int | None = None) -> Tensor:
    """Numbers in [0, 1) [R, O], one for each of a matrix, in steps of 2^-20: sums with the steps of e2m1 stay exact.

    A function of the seed, of the place and of all bits of the matrix: another step or micro-batch brings another matrix and so
    draws again, and the same one, computed again, draws alike, also with rows of zeros after it. No one has to know where in a
    run it is. `product`: one gradient is rounded apart for each that takes it. `rows`: for so many rows, of which a turned
    matrix has more.
    """
    x_RO = x_RO.float()
    rows = len(x_RO) if rows is None else rows
    place = torch.arange(rows * x_RO.shape[1], device=x_RO.device).view(rows, -1) & _WORD
    bits = x_RO.contiguous().view(torch.int32).long() & _WORD
    words = torch.where(x_RO != 0, _mix(bits ^ _mix(place[: len(x_RO)] + seed)), 0)
    salt = (words.sum() + seed) & _WORD
    return (_mix(_mix(place ^ salt) + seed + product) >> 12).float() * 2.0**-20


def _mix(words: Tensor) -> Tensor:
    """Scatter 32 bits held in int64 (Appleby's finalizer of MurmurHash3): products wrap, and lower bits stay right."""
    words = words & _WORD
    words = ((words ^ (words >> 16)) * 0x85EBCA6B) & _WORD
    words = ((words ^ (words >> 13)) * 0xC2B2AE35) & _WORD
    return words ^ (words >> 16)


def turn(x_MK: Tensor, seed: int) -> Tensor:
    """Turn each 16 numbers along rows by a Hadamard matrix with signs drawn by a seed: [M, K filled up to 16], float32.

    Both operands of a product turned alike along the sum leave it as it is, and spread what is large in one of them.
    """
    signs = (_mix(torch.arange(TURNED, device=x_MK.device) + seed) & 1) * 2 - 1
    turned = cut_blocks(x_MK.float(), 1, TURNED)[:, 0] * signs
    # In four steps of sums and differences, so that all machines add in the same order.
    for bit in range(4):
        pairs = turned.unflatten(-1, (-1, 2, 1 << bit))
        first, second = pairs.unbind(-2)
        turned = torch.stack([first + second, first - second], -2).flatten(-3)
    return (turned / TURNED**0.5).flatten(1)
