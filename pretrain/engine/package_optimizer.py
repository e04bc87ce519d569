"""An installed package's optimizer, as DeepSpeed, ZeRO and checkpoints expect one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amfm.pretrain.engine.moments import moments_of


class PackageOptimizer(torch.optim.AdamW):
    """Calls a package's `update` on each flat master with its moments, which the label of the group names.

    A subclass of torch's AdamW for its groups, settings and state alone: checkpoints and DeepSpeed read these.
    """

    def __init__(self, groups: list[dict[str, Any]], update: Callable[..., None], options: Any, **adamw: Any) -> None:
        super().__init__(groups, **adamw | {"fused": False})
        self.update, self.options = update, options

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the groups of this call, which DeepSpeed may narrow to one."""
        assert closure is None, "gradients come from the engine"
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._step(master, master.grad, group)

    def _step(self, master: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One master."""
        state = self.state[master]
        names = moments_of(str(group["label"]))
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({name: torch.zeros_like(master) for name in names})
        state["step"] += 1
        # A flat master, or under ZeRO 0 in float32 a parameter in its shape; neither has gaps, so these are views.
        moments = {name: state[name].view(-1) for name in names}
        self.update(master.view(-1), gradient.reshape(-1), moments, int(state["step"]), group, self.options)
