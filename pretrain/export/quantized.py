"""Released weights of 4 or 8 bits with scales, read as float32: `mxfp4` of gpt-oss and block `fp8` of DeepSeek.

Both formats are products of a number and a scale, so float32 has mxfp4 exactly, and fp8 to its own rounding. Rows are made
when they are asked for, as those of any file.

Sources: OCP Microscaling Formats 1.0, sections 5.3 and 6 (e2m1 in blocks of 32 with e8m0 scales); DeepSeek-AI 2024, arXiv
2412.19437, section 3.3.2 (e4m3 in blocks of 128 by 128).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.model.on_demand import OnDemand, Source

# e2m1 by the three bits after its sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCKS, SCALES, INVERSE = "_blocks", "_scales", "_scale_inv"


def read_quantized(tensors: OnDemand, quantization: Any, source: Path) -> OnDemand:
    """The tensors with those of 4 and 8 bits as float32, under the names that they have unquantized.

    quantization: `quantization_config` of config.json; None: nothing is quantized. Raises ValueError for another method, for
    tensors without their scales, and for shapes that do not belong together.
    """
    if quantization is None:
        return tensors
    how = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, Mapping) else quantization
    if how not in ("mxfp4", "fp8"):
        raise ValueError(
            f"{source}/config.json: weights quantized by {how} are not read, only by mxfp4 and fp8; use the release in bf16"
        )
    if how == "mxfp4":
        return _with(tensors, BLOCKS, SCALES, _read_mxfp4, source)
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise ValueError(
            f"{source}/config.json: quantization_config.weight_block_size={block}, and must be two integers, as [128, 128]; "
            "use the release in bf16"
        )

    def read_fp8(name: str, codes: Source, scales: Source) -> Source:
        return _read_fp8(name, codes, scales, (block[0], block[1]))

    return _with(tensors, "", INVERSE, read_fp8, source)


def _with(
    tensors: OnDemand, codes: str, scales: str, make: Callable[[str, Source, Source], Source], source: Path
) -> OnDemand:
    """Replace each pair of tensors NAME + codes and NAME + scales by NAME."""
    found = dict(tensors.sources)
    for name in [name.removesuffix(scales) for name in tensors if name.endswith(scales)]:
        if name + codes not in found:
            raise ValueError(f"{source}: {name}{scales} is there and {name}{codes} is not; copy the whole folder")
        try:
            made = make(name, found.pop(name + codes), found.pop(name + scales))
        except ValueError as error:
            raise ValueError(f"{source}: {error}; download the file again") from error
        found[name] = made
    return OnDemand(found)


def _read_mxfp4(name: str, blocks: Source, scales: Source) -> Source:
    """Numbers [E, A, B / 32, 16 bytes] and scales [E, A, B / 32] as the class has their matrices, [E, B, A]."""
    if blocks.shape[:-1] != scales.shape or len(blocks.shape) != 4 or {blocks.dtype, scales.dtype} != {torch.uint8}:
        raise ValueError(
            f"{name}{BLOCKS} is {_describe(blocks)} and {name}{SCALES} {_describe(scales)}, and must be uint8 [E, A, B, 16] and "
            "[E, A, B]"
        )
    experts, rows, groups, size = blocks.shape

    def read(start: int, stop: int) -> Tensor:
        return decode_mxfp4(blocks.read(start, stop), scales.read(start, stop)).transpose(1, 2).contiguous()

    return Source((experts, groups * size * 2, rows), torch.float32, read)


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Bytes [..., B / 32, 16] of two numbers each, the lower bits first, and scales [..., B / 32] -> float32 [..., B]."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float32)
    powers = torch.tensor([*(2.0 ** (power - 127) for power in range(255)), math.nan], dtype=torch.float32)
    numbers = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1).flatten(-2)
    return (numbers * powers[scales.int()][..., None]).flatten(-2)


def _read_fp8(name: str, codes: Source, scales: Source, block: tuple[int, int]) -> Source:
    """Numbers [A, B] times the scale of their block, [A / block, B / block] rounded up."""
    wanted = tuple(-(-size // each) for size, each in zip(codes.shape, block, strict=False))
    if codes.dtype != torch.float8_e4m3fn or len(codes.shape) != 2 or scales.shape != wanted:
        raise ValueError(
            f"{name} is {_describe(codes)} and {name}{INVERSE} {_describe(scales)}, and must be float8_e4m3fn [A, B] and a scale "
            f"for every block of {block[0]} by {block[1]}"
        )

    def read(start: int, stop: int) -> Tensor:
        first = start // block[0]
        own = scales.read(first, -(-stop // block[0])).float()
        rows = torch.arange(start, stop) // block[0] - first
        columns = torch.arange(codes.shape[1]) // block[1]
        return codes.read(start, stop).float() * own[rows][:, columns]

    return Source(codes.shape, torch.float32, read)


def _describe(found: Source) -> str:
    return f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
