"""Rotary positions (Su et al. 2021, arXiv 2104.09864) of all mixers, and their stretches for longer rows.

Sizes: B rows, T tokens, H heads, K head size, F rotated pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rope_frequencies(rope: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Compute the radians a position of each rotated pair, and the factor on cosine and sine (YaRN, arXiv 2309.00071, section 3)."""
    size = int(head_dim * rope["fraction"])
    base, scaling = rope["theta"], rope["scaling"]
    if scaling == "ntk":
        base = base * rope["ntk_alpha"] ** (size / (size - 2))
    inverse = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if scaling == "linear":
        return inverse / rope["linear_factor"], 1.0
    if scaling == "llama3":
        stretch = rope["llama3"]
        turns = stretch["original_length"] * inverse / (2 * math.pi)
        kept = ((turns - stretch["slow_turns"]) / (stretch["fast_turns"] - stretch["slow_turns"])).clamp(0, 1)
        return inverse * kept + inverse / stretch["factor"] * (1 - kept), 1.0
    if scaling != "yarn":
        return inverse, 1.0

    def pair_of(rotations: float) -> float:
        length = rope["yarn_original_length"]
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(rope["yarn_beta_fast"]), pair_of(rope["yarn_beta_slow"])
    if rope.get("yarn_truncate", True):  # exports of before have none
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low or 1e-3)).clamp(0, 1)
    factor = rope["yarn_factor"]
    is_on_scores = rope.get("yarn_mscale") is not None
    attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 and not is_on_scores else 1.0
    return inverse / factor * ramp + inverse * (1 - ramp), attention_factor


def rotate(x_BTHK: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> Tensor:
    """Rotate, in float32, the pairs (i, i + half) of the first 2 * F channels; the others stay."""
    half = cos_BTF.shape[-1]
    first, second, rest = x_BTHK.float().split([half, half, x_BTHK.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat([first * cos_BTF - second * sin_BTF, second * cos_BTF + first * sin_BTF, rest], dim=-1)
    return turned.to(x_BTHK.dtype)


def rotation(rope: dict[str, Any], head_dim: int, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, T, 1, F] at positions, times the factor of the stretch."""
    frequencies, factor = rope_frequencies(rope, head_dim)
    angles_BTF = positions_BT[..., None].float() * frequencies.to(positions_BT.device)
    return angles_BTF.cos()[:, :, None] * factor, angles_BTF.sin()[:, :, None] * factor


def plain_rope(theta: float) -> dict[str, Any]:
    """Rotary positions of whole heads, not stretched."""
    return {"theta": theta, "fraction": 1.0, "scaling": "none"}


def yarn_rope(theta: float, yarn: dict[str, Any] | None) -> dict[str, Any]:
    """The same, stretched where a mixer's options have `yarn`."""
    stretch = {"scaling": "yarn", **{f"yarn_{name}": value for name, value in yarn.items()}} if yarn else {}
    return plain_rope(theta) | stretch


def factor_on_scores(yarn: dict[str, Any] | None) -> float:
    """The factor on all scores of latent attention, which DeepSeek-V3 has instead of one on cosine and sine."""
    mscale = (yarn or {}).get("mscale")
    return 1.0 if yarn is None or mscale is None else (0.1 * mscale * math.log(yarn["factor"]) + 1.0) ** 2
