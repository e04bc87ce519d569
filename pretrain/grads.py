"""What happens to gradients between the backward passes and the optimizer: summing in float32, checking, clipping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Float32Accumulator:
    """Sums the bf16 gradients of several micro-batches in float32 and hands them back, rounded once.

    Without it `grad += new` rounds to bf16 after every micro-batch, which loses the small ones. A hook on each
    parameter moves the fresh gradient into a float32 buffer and leaves zeros; `finish` writes the sums over them, in
    place, because under ZeRO-3 the parameter itself may be partitioned away by then.
    """

    def __init__(self, module: nn.Module) -> None:
        self.sums: dict[Tensor, Tensor] = {}
        self.handles = [
            parameter.register_post_accumulate_grad_hook(self._collect)
            for parameter in module.parameters()
            if parameter.requires_grad and parameter.dtype != torch.float32
        ]

    def _collect(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None, "the hook runs after a gradient was accumulated"
        if parameter in self.sums:
            self.sums[parameter].add_(gradient)
        else:
            self.sums[parameter] = gradient.float()
        gradient.zero_()

    def finish(self) -> None:
        """Write the sums to the gradients, remove the hooks and free the buffers."""
        for handle in self.handles:
            handle.remove()
        for parameter, total in self.sums.items():
            assert parameter.grad is not None, "gradients stay in place until the optimizer's step"
            parameter.grad.copy_(total)
        self.sums.clear()


@dataclass(frozen=True)
class GradientFault:
    """The first parameter whose gradient on this rank is not finite, and how many there are."""

    parameter: str
    num_parameters: int


def find_fault(module: nn.Module) -> GradientFault | None:
    """Look for a gradient with NaN or infinity among this rank's own, before they are reduced; None when all are fine.

    Costs one read of the gradients and one synchronisation with the device.
    """
    named = [(name, parameter.grad) for name, parameter in module.named_parameters() if parameter.grad is not None]
    if not named:
        return None
    norms = torch.stack([norm.float() for norm in torch._foreach_norm([gradient for _, gradient in named])])
    finite = torch.isfinite(norms)
    if bool(finite.all()):
        return None
    faulty = torch.nonzero(~finite).flatten().tolist()
    return GradientFault(named[faulty[0]][0], len(faulty))


def clip_by_norm(parameters: list[nn.Parameter], largest_norm: float | None) -> float:
    """Scale float32 gradients so that their joint norm is at most `largest_norm`; returns the norm before that.

    The formula is that of DeepSpeed's ZeRO optimizers, so that all stages step alike. Nothing is scaled when the norm
    is not finite.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
    if largest_norm is not None and torch.isfinite(torch.tensor(norm)):
        excess = (norm + 1e-6) / largest_norm
        if excess > 1:
            torch._foreach_mul_(gradients, 1 / excess)
    return norm
