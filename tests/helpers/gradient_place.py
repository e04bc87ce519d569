"""A place in which weight gradients land, as an optimizer hangs it on a parameter (kernels/common/weight_gradients.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Place:
    """A sum that begins as NaN, which an operation that adds before it has stored cannot hide."""

    sum: Tensor
    passes: int = 0

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype = torch.float32) -> Place:
        """Hang one on a weight."""
        place = cls(torch.full_like(weight, torch.nan, dtype=dtype, requires_grad=False))
        weight.gradient_sum = place  # type: ignore[attr-defined]
        return place

    def take(self) -> tuple[Tensor, bool]:
        """The sum, and whether an earlier gradient is there."""
        self.passes += 1
        return self.sum, self.passes > 1
