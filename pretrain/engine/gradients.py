"""Gradients between backward passes and optimizer: summed over passes and ranks, checked, clipped.

The order is fixed by what each part needs (engine.py draws it): micro-batches are summed before anything is rounded to
bf16, partial gradients are completed before DeepSpeed sums over data ranks, because DeepSpeed knows nothing of parts, and
the check for NaN looks at a rank's own gradients, because after a reduction every rank has the NaN and no one knows
where it came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.shards import Axis, ShardSpec, parameter_shards


class Float32Accumulator:
    """Sums the bf16 gradients of several micro-batches in float32 and writes the sum back, rounded once.

    Without it `grad += new` rounds to bf16 after every micro-batch, which loses the small ones. A hook on each
    parameter moves the fresh gradient into a float32 buffer and leaves zeros; `finish` writes the sums over them, in
    place, because under ZeRO-3 the parameter itself may be partitioned away by then.
    """

    def __init__(self, module: nn.Module) -> None:
        self.sums: dict[Tensor, Tensor] = {}
        self.handles = [
            parameter.register_post_accumulate_grad_hook(self.collect)
            for parameter in module.parameters()
            if parameter.requires_grad and parameter.dtype != torch.float32
        ]

    def collect(self, parameter: Tensor) -> None:
        """Move a gradient into its float32 sum and leave zeros, to which the next backward pass adds."""
        gradient = parameter.grad
        if gradient is None:
            return  # autograd was given none: a split backward pass computes it later, and calls again
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
class PartialGradient:
    """A gradient of which each rank of `axis` has only a part: the whole of it, or what a cut holds in copies."""

    name: str
    parameter: nn.Parameter
    axis: Axis
    cut: ShardSpec | None = None


def find_partial_gradients(module: nn.Module, groups: ProcessGroupCollection) -> list[PartialGradient]:
    """List the gradients that ranks must sum before they are complete, in the order of the parameters; none on one rank.

    Frozen parameters have none. Norms, router and latent projections of sequence-parallel tokens; norms of query and key heads, whose heads are spread
    over ranks; key and value heads, and groups of B and C, that several tensor ranks hold.
    """
    found = []
    for name, parameter, shard in parameter_shards(module):
        if not parameter.requires_grad:
            continue
        for axis in shard.partial:
            if getattr(groups, axis).size() > 1:
                found.append(PartialGradient(name, parameter, axis))
        for cut in shard.cuts:
            size = getattr(groups, cut.axis).size()
            if min(cut.slices(size)) < size:
                found.append(PartialGradient(name, parameter, cut.axis, cut))
    return found


def own_gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's `grad`, made of zeros if it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@torch.no_grad()
def sum_partial_gradients(
    partials: Sequence[PartialGradient],
    groups: ProcessGroupCollection,
    gradient_of: Callable[[nn.Parameter], Tensor] = own_gradient,
) -> None:
    """Sum these gradients over ranks in place, in float32 or wider, with one reduction for each axis and dtype.

    `gradient_of`: where a parameter's gradient is; by default in `grad`, made of zeros if there is none.
    Every rank must call this, after the last backward pass and before gradients are reduced over data ranks. The two ends
    of a pipeline must get bitwise identical results for what they both hold, or it would drift apart; but each end has its own order
    of summing three and more data ranks. So these gradients are summed over data ranks here, and only one rank hands the
    sum on.
    """
    batches: dict[tuple[Axis, torch.dtype], list[PartialGradient]] = {}
    for partial in partials:
        assert partial.parameter.requires_grad, f"{partial.name} has no gradient to sum"
        batches.setdefault((partial.axis, gradient_of(partial.parameter).dtype), []).append(partial)
    for (axis, dtype), batch in batches.items():
        group = getattr(groups, axis)
        pieces = [
            piece
            for partial in batch
            for piece in _pieces(partial, gradient_of(partial.parameter), group.rank(), group.size())
        ]
        buffer = torch.zeros(
            sum(piece.numel() * slots for piece, slots, _ in pieces),
            dtype=torch.promote_types(dtype, torch.float32),
            device=pieces[0][0].device,
        )
        places = buffer.split([piece.numel() * slots for piece, slots, _ in pieces])
        own = [place.view(slots, *piece.shape)[slot] for place, (piece, slots, slot) in zip(places, pieces)]
        for place, (piece, _, _) in zip(own, pieces):
            place.copy_(piece)
        # With two data ranks a sum has one order, and the ends agree without this.
        all_data = groups.dp_cp if axis == "embd" and groups.dp_cp.size() > 2 else None
        if all_data is not None:
            torch.distributed.all_reduce(buffer, group=all_data)
        torch.distributed.all_reduce(buffer, group=group)
        if all_data is not None and all_data.rank() > 0:
            buffer.zero_()
        for place, (piece, _, _) in zip(own, pieces):
            piece.copy_(place)


def _pieces(partial: PartialGradient, gradient: Tensor, rank: int, size: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield the partial views of a gradient, each with the number of different slices among the ranks, and ours.

    A cut over more ranks than it has slices gives each slice to neighbouring ranks, so that rank r holds slice
    r * slices // ranks; the sum runs over a buffer with one slot for each slice.
    """
    if partial.cut is None:
        yield gradient, 1, 0
        return
    cut = partial.cut
    views = gradient.split(list(cut.local_segments(size)), dim=cut.dim)
    for view, slices in zip(views, cut.slices(size)):
        if slices < size:
            yield view, slices, rank * slices // size


@dataclass(frozen=True)
class GradientFault:
    """The first parameter with a gradient that is not finite on this rank, and how many there are."""

    parameter: str
    num_parameters: int


def poison_gradients(module: nn.Module) -> None:
    """Make this rank's gradients infinite: the one way to have every optimizer skip a step as a whole."""
    next(parameter.grad for parameter in module.parameters() if parameter.grad is not None).fill_(float("inf"))


def find_fault(module: nn.Module) -> GradientFault | None:
    """Look for NaN or infinity in this rank's own gradients, before they are reduced; None when all are finite.

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


def clip_by_norm(gradients: Sequence[Tensor], norm: float, largest_norm: float | None) -> None:
    """Scale float32 gradients whose joint norm is `norm` so that it becomes at most `largest_norm`.

    The formula is that of DeepSpeed's ZeRO optimizers, so that all stages step alike. Nothing is scaled when the norm
    is not finite.
    """
    if largest_norm is not None and math.isfinite(norm):
        excess = (norm + 1e-6) / largest_norm
        if excess > 1:
            torch._foreach_mul_(list(gradients), 1 / excess)
