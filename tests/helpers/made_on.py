"""Moves tensors that a test makes to a device, so that tests that name none run there."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint, torch.randn,
    torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip


class MadeOn(TorchFunctionMode):
    """Inside, a factory called without `device` gives a tensor on this one, with the numbers that the CPU draws.

    Generators of tests are those of the CPU, so numbers are drawn there and moved.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Move what a factory made; a leaf stays a leaf."""
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        if function not in FACTORIES or kwargs.get("device") is not None:
            return made
        moved = made.detach().to(self.device)
        return moved.requires_grad_() if made.requires_grad else moved
