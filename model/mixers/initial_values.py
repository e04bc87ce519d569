"""Initial values that several mixers share: decay rates and time steps of selective recurrences.

Both are parameters in a transformed form, so that training cannot leave their range: a rate is e^(A_log), a time step
softplus(dt_bias). They are spread over heads, so that from the start some remember a few tokens and others a thousand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def first_decay_rates(
    shape: tuple[int, ...], generator: torch.Generator, *, low: float = 1.0, high: float = 16.0
) -> Tensor:
    """Draw log(-A) with -A uniform in a range (Gu et al. 2022, arXiv 2206.11893, section 4), float32."""
    return torch.empty(shape).uniform_(low, high, generator=generator).log()


def first_time_steps(
    shape: tuple[int, ...], generator: torch.Generator, *, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4
) -> Tensor:
    """Draw the inverse softplus of log-uniform time steps (Gu and Dao 2023, arXiv 2312.00752, section 3.6), float32."""
    step = torch.empty(shape).uniform_(math.log(low), math.log(high), generator=generator).exp().clamp_(min=floor)
    # log(e^s - 1) = s + log(1 - e^-s), which loses no digits for small s.
    return step + torch.log(-torch.expm1(-step))
