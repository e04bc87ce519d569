"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of a momentum is the update, and one moment is kept."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from amfm.model.config.section import Section
from amfm.pretrain.config.optimizers import OptimizerSpec


class Options(Section):
    """Options of Lion; the decay of its momentum is `optimizer.beta2`."""

    beta: float = Field(0.9, ge=0, lt=1, description="Share of the momentum in an update; the rest is the gradient.")


def update(
    weight: Tensor,
    gradient: Tensor,
    moments: Mapping[str, Tensor],
    step: int,
    group: Mapping[str, Any],
    options: Options,
) -> None:
    """Step weights and momentum, [N] float32, in place."""
    momentum = moments["momentum"]
    direction = momentum.lerp(gradient, 1 - options.beta).sign_()
    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
    momentum.lerp_(gradient, 1 - group["betas"][1])


SPEC = OptimizerSpec("lion", "amfm_lion:update", num_moments=1, options=Options)
