"""First values that several mixers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def first_decay_rates(
    shape: tuple[int, ...], generator: torch.Generator, *, low: float = 1.0, high: float = 16.0
) -> Tensor:
    """log(-A) with -A uniform in a range (Gu et al. 2022, arXiv 2206.11893, section 4)."""
    return torch.empty(shape).uniform_(low, high, generator=generator).log()


def first_time_steps(
    shape: tuple[int, ...], generator: torch.Generator, *, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4
) -> Tensor:
    """The inverse softplus of a log-uniform time step (Gu and Dao 2023, arXiv 2312.00752, section 3.6)."""
    step = torch.empty(shape).uniform_(math.log(low), math.log(high), generator=generator).exp().clamp_(min=floor)
    return step + torch.log(-torch.expm1(-step))
