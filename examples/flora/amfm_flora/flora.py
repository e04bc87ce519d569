"""One low-rank update for all experts of a block (FLoRA, Si et al. 2024, arXiv 2405.14739); see the README for the formula.

Experts with an update are of a class of their own, which gives the sums where others read the stacks: routing, kernels and
decoding know nothing of it, the stacks keep their names, and a tuned state has the factors under names of their own until
`merge_update` adds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from amfm.model.hybrid import HybridModel
from amfm.model.init import named_seed
from amfm.model.moe.block import Experts
from amfm.model.on_demand import OnDemand, computed, on_demand

STACKS = ("up", "down")
FACTORS = ("core", "experts", "outputs", "inputs")


def tucker(core: Tensor, experts: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """sum_abc core_abc experts_ea outputs_ob inputs_ic, [E, O, I]."""
    # The narrow sides first: nothing of the stack's size is made but the sum itself.
    return outputs @ torch.einsum("ea,abc->ebc", experts, core) @ inputs.T


class TuckerUpdate(nn.Module):
    """The factors of an update of a stack [E, O, I], whole on every rank; zero at first."""

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
        return stack_EOI + self.scale * tucker(self.core, self.experts, self.outputs, self.inputs)


class UpdatedExperts(Experts):
    """Experts that give their stacks with the updates."""

    flora_up: TuckerUpdate
    flora_down: TuckerUpdate

    @property
    def up(self) -> Tensor:
        """The first stack and its update."""
        return self.flora_up(self._parameters["up"])

    @property
    def down(self) -> Tensor:
        """The second stack and its update."""
        return self.flora_down(self._parameters["down"])


class Flora:
    """The adapter `flora` of `convert.tune.adapters`."""

    def add_update(self, model: HybridModel, *, rank: int, alpha: float) -> list[str]:
        """Give the experts of each block two updates, times alpha / rank; returns the names of the factors.

        Raises ValueError for a rank above a stack's least size, and experts that are cut over ranks.
        """
        check_ranks(model.groups.ep.size(), model.groups.expt_tp.size())
        found = []
        for name, experts in list(stacks_of(model)):
            for which in STACKS:
                generator = torch.Generator().manual_seed(named_seed(model.seed, f"{name}.flora_{which}"))
                update = TuckerUpdate(getattr(experts, which), rank, alpha / rank, generator)
                experts.add_module(f"flora_{which}", update)
                found += [f"{name}.flora_{which}.{factor}" for factor, _ in update.named_parameters()]
            experts.__class__ = UpdatedExperts
        return found

    def merge_update(self, state: Mapping[str, Tensor], *, rank: int, alpha: float) -> OnDemand:
        """Put the sums instead of the stacks: the model has its names again."""
        given = on_demand(state)
        merged = given.without(lambda name: ".experts.flora_" in name)
        for name in given:
            place, found, factor = name.partition("flora_")
            which, _, last = factor.partition(".")
            if found and last == "core":
                source = given.sources[f"{place}{which}"]
                merged.sources[f"{place}{which}"] = computed(
                    source.shape, source.dtype, partial(merge_stack, given, f"{place}{which}", name[:-5], alpha / rank)
                )
        return merged


FLORA = Flora()


def merge_stack(state: OnDemand, stack: str, update: str, scale: float) -> Tensor:
    """Add an update to its stack in float64."""
    stack_EOI = state[stack]
    factors = (state[f"{update}.{factor}"].double() for factor in FACTORS)
    return (stack_EOI.double() + scale * tucker(*factors)).to(stack_EOI.dtype)


def stacks_of(model: HybridModel) -> Iterator[tuple[str, Experts]]:
    """Iterate over the stacked experts of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield name, module


def check_ranks(expert_ranks: int, tensor_ranks: int) -> None:
    """Raise ValueError if a rank holds a part of the experts: its factor of experts would have to be cut with them."""
    if expert_ranks > 1 or tensor_ranks > 1:
        raise ValueError(
            f"FLoRA got experts cut over {expert_ranks} expert and {tensor_ranks} tensor ranks, and updates whole stacks; "
            "use parallel.expert=1 and parallel.tensor=1"
        )
