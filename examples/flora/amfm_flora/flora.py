"""One low-rank update for all experts of a block (FLoRA, Si et al. 2024, arXiv 2405.14739); see the README for the formula.

The update is a parametrization of the stack: whoever reads `experts.up` gets the sum, so that routing, kernels and decoding
know nothing of it. The stack itself stays under another name, frozen, and `merge_flora` puts the sum in its place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from amfm.model.hybrid import HybridModel
from amfm.model.moe.block import Experts

STACKS = ("up", "down")


class TuckerUpdate(nn.Module):
    """W [E, O, I] + scale * sum_abc core_abc experts_ea outputs_ob inputs_ic; zero at first."""

    def __init__(self, stack_EOI: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        if not 0 < rank <= min(stack_EOI.shape):
            raise ValueError(
                f"rank={rank} must be in 1..{min(stack_EOI.shape)}, the least size of {tuple(stack_EOI.shape)}"
            )
        self.scale = scale

        def factor(size: int) -> nn.Parameter:
            values = torch.empty(size, rank).normal_(0.0, rank**-0.5, generator=generator)
            return nn.Parameter(values.to(stack_EOI))

        self.experts, self.outputs, self.inputs = (factor(size) for size in stack_EOI.shape)
        self.core = nn.Parameter(stack_EOI.new_zeros(rank, rank, rank))

    def forward(self, stack_EOI: Tensor) -> Tensor:
        """Add the update to a stack of experts' matrices."""
        # The narrow sides first: nothing of the stack's size is made but the update itself.
        each_Ebc = torch.einsum("ea,abc->ebc", self.experts, self.core)
        return stack_EOI + self.scale * (self.outputs @ each_Ebc @ self.inputs.T)


def add_flora(model: HybridModel, *, rank: int, alpha: float, seed: int = 0) -> list[str]:
    """Freeze a model and give the experts of each of its blocks two updates, times alpha / rank. Returns their names.

    Raises ValueError for a model without experts, a rank above a stack's least size, and experts that are cut over ranks.
    """
    check_ranks(model.groups.ep.size(), model.groups.expt_tp.size())
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, experts in stacks_of(model):
        for which in STACKS:
            update = TuckerUpdate(getattr(experts, which), rank, alpha / rank, generator)
            parametrize.register_parametrization(experts, which, update)
            experts.parametrizations[which].original.requires_grad_(False)
            found.append(f"{name}.{which}")
    if not found:
        raise ValueError("model.pattern has no block E, so there are no experts to update; use LoRA (amfm convert)")
    return found


def merge_flora(model: HybridModel) -> None:
    """Put the sums in the place of the stacks: the model has its names again, and can be saved and exported as before."""
    for _, experts in stacks_of(model):
        for which in STACKS:
            parametrize.remove_parametrizations(experts, which, leave_parametrized=True)


def stacks_of(model: HybridModel) -> Iterator[tuple[str, Experts]]:
    """Iterate over the stacked experts of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield name, module


def check_ranks(expert_ranks: int, tensor_ranks: int) -> None:
    """Raise ValueError where a rank holds a part of the experts: its factor of experts would have to be cut with them."""
    if expert_ranks > 1 or tensor_ranks > 1:
        raise ValueError(
            f"FLoRA got experts cut over {expert_ranks} expert and {tensor_ranks} tensor ranks, and updates whole stacks; "
            "use parallel.expert=1 and parallel.tensor=1"
        )
