"""Frequencies of rotary positions, and how they are stretched to texts longer than the model was trained on.

"ntk" raises the base, so that with alpha as the ratio of lengths the slowest pair turns as far over the longer
text as it did over the shorter, and fast pairs hardly change. "yarn" and "llama3" treat pairs by how often they turn over
the trained length: fast ones tell neighbours apart and stay, slow ones would reach angles never trained and are
slowed down. "llama3" is what Llama 3.1 and later were trained with: its ramp is linear in the turns, yarn's in the number
of the pair, and it has no factor on the scores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Llama3Numbers(NamedTuple):
    """Llama 3's stretch: pairs that turn fewer than `slow_turns` times over the trained length are divided by `factor`, those
    that turn more than `fast_turns` times are kept."""

    factor: float
    original_length: int
    slow_turns: float = 1.0
    fast_turns: float = 4.0


def rope_frequencies(
    head_dim: int,
    *,
    theta: float,
    fraction: float = 1.0,
    scaling: str = "none",
    ntk_alpha: float | None = None,
    yarn_factor: float | None = None,
    yarn_original_length: int | None = None,
    yarn_beta_fast: float = 32.0,
    yarn_beta_slow: float = 1.0,
    yarn_truncate: bool = True,
    llama3: Llama3Numbers | None = None,
    linear_factor: float | None = None,
) -> tuple[Tensor, float]:
    """Angle a token of each rotated pair of channels, float32 on CPU, and the factor on cosine and sine.

    d = int(head_dim * fraction) channels are rotated, so there are d / 2 angles.
    `scaling`: "none" theta^(-2i/d); "linear" that divided by `linear_factor`; "ntk" theta becomes theta * alpha^(d/(d-2)); "yarn" frequencies that turn fewer
    than `yarn_beta_slow` times over the trained length are divided by `yarn_factor`, those above `yarn_beta_fast`
    are kept, and between them a ramp mixes both, whose ends are rounded outwards to whole pairs if `yarn_truncate`; "llama3" as `Llama3Numbers` says.

    Raises ValueError for an odd number of rotated channels, a missing setting, or one that another scaling reads.
    Source: Su et al. 2021 (arXiv 2104.09864), section 3.4.2; Peng et al. 2023 (arXiv 2309.00071), sections 3.1 to 3.4.
    """
    dim = int(head_dim * fraction)
    _check(head_dim, dim, theta, scaling, ntk_alpha, yarn_factor, yarn_original_length)
    if (scaling == "llama3") != (llama3 is not None):
        raise ValueError(f"scaling=llama3 needs llama3, and nothing else reads it; got {scaling=}, {llama3=}")
    if (scaling == "linear") != (linear_factor is not None):
        raise ValueError(
            f"scaling=linear needs linear_factor, and nothing else reads it; got {scaling=}, {linear_factor=}"
        )
    if scaling == "ntk":
        assert ntk_alpha is not None, "checked above"
        theta = theta * ntk_alpha ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / theta**exponents
    if linear_factor is not None:
        return frequencies / linear_factor, 1.0
    if llama3 is not None:
        turns = llama3.original_length * frequencies / (2 * math.pi)
        kept = ((turns - llama3.slow_turns) / (llama3.fast_turns - llama3.slow_turns)).clamp(0, 1)
        return frequencies * kept + frequencies / llama3.factor * (1 - kept), 1.0
    if scaling != "yarn":
        return frequencies, 1.0
    assert yarn_factor is not None and yarn_original_length is not None, "checked above"
    low, high = (
        _pair_that_turns(turns, dim, theta, yarn_original_length) for turns in (yarn_beta_fast, yarn_beta_slow)
    )
    if yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 1e-3
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    mixed = frequencies / yarn_factor * stretched + frequencies * (1 - stretched)
    # More keys flatten the softmax; the factor on q and k sharpens it again (section 3.4).
    return mixed, 0.1 * math.log(yarn_factor) + 1.0 if yarn_factor > 1 else 1.0


def _pair_that_turns(rotations: float, dim: int, theta: float, length: int) -> float:
    """Index (a real number) of the pair of channels that turns `rotations` times over `length` tokens."""
    return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _check(
    head_dim: int,
    dim: int,
    theta: float,
    scaling: str,
    ntk_alpha: float | None,
    yarn_factor: float | None,
    yarn_original_length: int | None,
) -> None:
    """Raise ValueError for settings that do not go together or that no scaling reads."""
    if not 0 < dim <= head_dim or dim % 2:
        raise ValueError(f"head_dim * fraction must be even and in 1..head_dim; got {dim} of head_dim={head_dim}")
    if theta <= 1:
        raise ValueError(f"theta must be above 1; got {theta}")
    if scaling not in ("none", "linear", "ntk", "yarn", "llama3"):
        raise ValueError(f"scaling must be none, linear, ntk, yarn or llama3; got {scaling!r}")
    if (scaling == "ntk") != (ntk_alpha is not None):
        raise ValueError(f"scaling=ntk needs ntk_alpha, and nothing else reads it; got {scaling=}, {ntk_alpha=}")
    if scaling == "ntk" and dim <= 2:
        raise ValueError(f"scaling=ntk needs more than 2 rotated channels; got {dim}")
    for name, value in (("yarn_factor", yarn_factor), ("yarn_original_length", yarn_original_length)):
        if (scaling == "yarn") != (value is not None):
            raise ValueError(f"scaling=yarn needs {name}, and nothing else reads it; got {scaling=}, {name}={value}")
