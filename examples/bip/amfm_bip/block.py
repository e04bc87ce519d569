"""Bi-level pruning (BiP, Zhang et al. 2022, arXiv 2210.04092) as a block; see the README for the two problems.

A step solves both, each on its half of a micro-batch's rows: the first rows train the weights under the mask, the others
move the scores, whose best `keep` are the mask. The scores are parameters like any other, so an optimizer trains them, a
checkpoint has them, and a run that was interrupted continues bitwise identical.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amfm.kernels.linear.op import linear
from amfm.kernels.swiglu.op import squared_relu, swiglu
from amfm.model.feed_forward import FeedForward
from amfm.model.mixers.interface import BlockState, BuildContext, Mixer, MixerOutput
from amfm.model.packing import PackMeta
from amfm_bip.spec import BipOptions

FIRST_SCORES = 0.01  # their deviation: a few steps of an optimizer's rate


class BipMixer(FeedForward, Mixer):
    """down(activation(up(x))) of the channels with the best scores."""

    def __init__(self, options: BipOptions, build: BuildContext) -> None:
        super().__init__(
            build.hidden_size,
            options.hidden_size,
            options.activation,
            build.groups,
            name="model.mixers.bip.hidden_size",
            backend=build.backend,
        )
        self.options = options
        self.scores = nn.Parameter(torch.empty(options.hidden_size))

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Scores that say nothing yet."""
        return torch.empty(shape).normal_(0.0, FIRST_SCORES, generator=generator) if name == "scores" else None

    def mask(self) -> Tensor:
        """1 for channels that compute, 0 for others, [F]."""
        best = self.scores.detach().topk(self.options.num_kept()).indices
        return torch.zeros_like(self.scores).index_fill_(0, best, 1.0)

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:  # type: ignore[override]
        """Map the residual stream x [B, T, D] -> [B, T, D], each token on its own. Raises ValueError for one row in training."""
        up, down, mask = self.up_proj.weight, self.down_proj.weight, self.mask()
        if not self.training:
            return MixerOutput(self.multiply(x_BTD, *masked(up, down, mask)))
        rows = len(x_BTD)
        if rows < 2:
            raise ValueError("train.micro_batch_size=1: BiP's two problems need a row each; use 2 or more")
        lower = rows // 2
        weights = [louder(weight, rows / lower) for weight in masked(up, down, mask)]
        trained_BTD = self.multiply(x_BTD[:lower], *weights)
        weights = _Upper.apply(self.scores, up, down, mask, self.options.gamma, rows / (rows - lower))
        judged_BTD = self.multiply(x_BTD[lower:], *weights)
        squares = sum(weight.float().square().sum() for weight in (up, down))
        # Every context rank adds its share of what they all compute alike.
        penalty = 0.5 * self.options.gamma * squares / self.groups.cp.size()
        return MixerOutput(torch.cat([trained_BTD, judged_BTD]), None, {"bip": penalty})

    def multiply(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """The feed-forward with these matrices."""
        inner = linear(x, up)
        if self.unit is None:
            return linear(squared_relu(inner, backend=self.backend), down)
        return linear(swiglu(inner, self.unit, backend=self.backend), down)


def masked(up: Tensor, down: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices with rows and columns of masked channels at zero; a gate's rows come before those of up."""
    return up * mask.repeat(len(up) // len(mask))[:, None], down * mask


def louder(weight: Tensor, factor: float) -> Tensor:
    """The same with a gradient `factor` times as large."""
    return weight.detach() + factor * (weight - weight.detach())


class _Upper(torch.autograd.Function):
    """Masked matrices whose gradient goes only to the scores: sum over a channel of theta g - m g^2 / gamma.

    g is `factor` times what arrives, the gradient of a mean over its rows where the loss is one over all. The second
    term is how trained weights answer a mask, with 1 / gamma for the inverse of the curvature of their loss.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, up: Tensor, down: Tensor, mask: Tensor, gamma: float, factor: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(up, down, mask)
        ctx.gamma, ctx.factor = gamma, factor
        return masked(up, down, mask)

    @staticmethod
    def backward(ctx: Any, d_up: Tensor, d_down: Tensor) -> tuple[Tensor | None, ...]:
        up, down, mask = ctx.saved_tensors

        def by_channel(of_up: Tensor, of_down: Tensor) -> Tensor:
            return of_up.sum(1).view(-1, len(mask)).sum(0) + of_down.sum(0)

        wide = torch.promote_types(up.dtype, torch.float32)
        g_up, g_down = (ctx.factor * gradient.to(wide) for gradient in (d_up, d_down))
        straight = by_channel(up.to(wide) * g_up, down.to(wide) * g_down)
        answered = mask * by_channel(g_up.square(), g_down.square())
        return (straight - answered / ctx.gamma).to(mask), None, None, None, None, None
