"""Tensor and sequence parallelism: how the residual stream enters and leaves what tensor-parallel ranks compute together.

Between blocks every rank of `groups.tp` has the residual stream alike, [B, T, D], or under sequence parallel its share of the
tokens, [B, T / ranks, D] (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2). Inside, every rank has all tokens and a
part of the heads or of the inner width. Every rank of `groups.tp` must call these functions; on one rank they do nothing.
Megatron-core's mappings cut along dim 0, so tokens are brought there and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from amfm.kernels.common.weight_gradients import gradient_sum_of
from amfm.kernels.linear.op import linear, linear_gradients
from amfm.kernels.low_precision.recipe import recipe_of
from amfm.kernels.runtime.compiling import disable_compile
from amfm.model.parallel.groups import ProcessGroupCollection


def enter_tensor_region(x_BTD: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Give every rank the residual stream with all tokens; backward sums the ranks' gradients, each a part of the whole."""
    if groups.tp.size() > 1 and groups.sequence_parallel:
        return _gather(x_BTD, groups.tp)
    return sum_gradients(x_BTD, groups)


def project_stream(x_BTD: Tensor, weights: Sequence[Tensor], groups: ProcessGroupCollection) -> tuple[Tensor, ...]:
    """Enter the region and project: x W^T of all tokens for each weight [out of this rank, D] -> [B, T, out].

    Under sequence parallel backward gathers the tokens again, so that what is kept for it is this rank's share.
    """
    if groups.tp.size() > 1 and groups.sequence_parallel:
        products: tuple[Tensor, ...] = _ProjectGathered.apply(
            x_BTD, groups.tp, [(gradient_sum_of(weight), recipe_of(weight)) for weight in weights], *weights
        )
        return products
    x_BTD = enter_tensor_region(x_BTD, groups)
    return tuple(linear(x_BTD, weight) for weight in weights)


class _ProjectGathered(torch.autograd.Function):
    """Gather tokens, multiply by all weights; backward gathers once more and reduce-scatters the gradient of the tokens.

    Kept for backward is [B, T / ranks, D] and not the gathered tokens: one all-gather more for memory that would grow with
    the number of ranks (Korthikanti et al. 2022, section 4.2.2).
    """

    @staticmethod
    def forward(ctx: Any, own_BTD: Tensor, group: Any, found: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.found = group, found
        ctx.save_for_backward(own_BTD, *weights)
        x_BTD = _gather(own_BTD, group)
        return tuple(linear(x_BTD, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own_BTD, *weights = ctx.saved_tensors
        x_BTD = _gather(own_BTD, ctx.group)
        given = zip(weights, grads, ctx.found, strict=True)
        pairs = [linear_gradients(x_BTD, weight, grad, *found) for weight, grad, found in given]
        grad_BTD = sum((grad for grad, _ in pairs[1:]), start=pairs[0][0])
        return _reduce_scatter(grad_BTD, ctx.group), None, None, *(grad for _, grad in pairs)


def _gather(own_BTD: Tensor, group: Any, *, gradients_are_parts: bool = True) -> Tensor:
    """All-gather tokens; backward keeps this rank's tokens of the gradient, summed over ranks where each has a part."""
    gathered_TBD: Tensor = mappings.gather_from_sequence_parallel_region(
        own_BTD.transpose(0, 1), tensor_parallel_output_grad=gradients_are_parts, group=group
    )
    return gathered_TBD.transpose(0, 1).contiguous()


def _reduce_scatter(part_BTD: Tensor, group: Any) -> Tensor:
    """Sum the ranks' parts and keep this rank's tokens, [B, T / ranks, D]; backward gathers the gradient."""
    own_TBD: Tensor = mappings.reduce_scatter_to_sequence_parallel_region(part_BTD.transpose(0, 1), group=group)
    return own_TBD.transpose(0, 1).contiguous()


def leave_tensor_region(part_BTD: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Sum what the ranks computed into the residual stream: all tokens, or under sequence parallelism this rank's."""
    if groups.tp.size() > 1 and groups.sequence_parallel:
        return _reduce_scatter(part_BTD, groups.tp)
    return _reduce(part_BTD, groups)


def gather_stream(x_BTD: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Give every rank the residual stream with all tokens for a replicated computation; backward keeps this rank's part."""
    if groups.tp.size() == 1 or not groups.sequence_parallel:
        return x_BTD
    return _gather(x_BTD, groups.tp, gradients_are_parts=False)


def sum_gradients(weight: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Use a replicated tensor for a part of the work: identity forward, all-reduce of the gradient backward."""
    return weight if groups.tp.size() == 1 else _sum_gradients(weight, groups)


@disable_compile  # torch.compile rejects the mapping, whose backward sums in place what it takes for a view
def _sum_gradients(weight: Tensor, groups: ProcessGroupCollection) -> Tensor:
    same: Tensor = mappings.copy_to_tensor_model_parallel_region(weight, group=groups.tp)
    return same


def sum_values(part: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Sum what each rank computed of a loss; backward gives each its own part's gradient, which is whole."""
    return _reduce(part, groups)


def sum_parts(part: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Sum partial results that each rank then uses in its own way: all-reduce forward and backward."""
    return sum_gradients(_reduce(part, groups), groups)


def _reduce(part: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """All-reduce the ranks' parts; backward is the identity, because every rank has the gradient of the sum."""
    if groups.tp.size() == 1:
        return part
    # The mapping sums in place.
    total: Tensor = mappings.reduce_from_tensor_model_parallel_region(part.contiguous(), group=groups.tp)
    return total


def scatter_tokens(x_BTD: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Take this rank's share of the residual stream's tokens, [B, T / ranks, D], for work that ranks divide by token.

    Under sequence parallel the residual stream is that already. Backward gathers the shares' gradients. Raises ValueError if
    the ranks do not divide T.
    """
    if groups.tp.size() == 1 or groups.sequence_parallel:
        return x_BTD
    num_tokens, num_ranks = x_BTD.shape[1], groups.tp.size()
    if num_tokens % num_ranks:
        raise ValueError(
            f"sequences of {num_tokens} tokens cannot be shared by parallel.tensor={num_ranks} ranks that hold different "
            f"experts; use a multiple of {num_ranks}"
        )
    own_TBD: Tensor = mappings.scatter_to_sequence_parallel_region(x_BTD.transpose(0, 1), group=groups.tp)
    return own_TBD.transpose(0, 1)


def gather_tokens(own_BTD: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Gather every rank's share of the tokens into the residual stream; backward keeps this rank's part of the gradient."""
    if groups.tp.size() == 1 or groups.sequence_parallel:
        return own_BTD
    return _gather(own_BTD, groups.tp, gradients_are_parts=False)


def slice_tokens(alike_BTX: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Slice this rank's tokens out of a replicated result of `gather_stream`, in the order of `scatter_tokens`.

    In backward every rank gets what it needs to continue alike: from the others' shares without sequence parallel; with
    it, `gather_stream` keeps only this rank's part.
    """
    if groups.tp.size() == 1:
        return alike_BTX
    if not groups.sequence_parallel:
        return scatter_tokens(alike_BTX, groups)
    return alike_BTX.chunk(groups.tp.size(), dim=1)[groups.tp.rank()]
