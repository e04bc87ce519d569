"""Weight gradients that operations give to no one but a sum of micro-batches, or later than those of inputs.

A separate gradient is written by its product and read again by whoever adds it up: 12 bytes a bfloat16 weight and
micro-batch, and a rounding to bfloat16. So an optimizer may hang a `GradientSum` on a parameter, as its attribute
`gradient_sum`. Operations that multiply by large weights look for it in the forward pass (`gradient_sum_of`), add their
gradient to the place that it gives them in the backward pass, and give autograd none. The idea is Megatron-LM's
`gradient_accumulation_fusion`. Looked for in forward and not in backward, because what a recomputed block saves are copies of
its parameters. Autograd still comes to the parameter when all that multiplied by it are done, with or without a gradient: there
the sum learns that a pass is in. A pass that is cut in two tells it later, by `collect`.

A zero-bubble schedule (Qi et al. 2023, arXiv 2401.10241, section 2) wants the gradients of inputs first, for which the
pipeline stage before waits, and fills its gaps with those of weights. Autograd on its own cannot cut an operation that computes
both: it would run it twice. So operations that multiply by large weights ask here. While a pass is split, they compute
their input's gradient, leave the weight's as a function on the micro-batch's list, and give autograd none for it; the
schedule runs the list when its turn comes. What else a backward pass computes (scans, norms, small parameters) stays whole.

The list belongs to the process and not to a thread, since autograd runs a GPU's backward pass in a separate thread.

For rows of an embedding table torch makes a table of zeros for the gradient of each micro-batch, adds to the rows of its tokens,
and whoever sums gradients reads the whole of it. Here (`embedding`) the rows are added to the sum itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.common.gemm_precision import gemm_dtype


class GradientSum(Protocol):
    """Where the gradients of one weight are added up, in float32."""

    def take(self) -> tuple[Tensor, bool]:
        """The place for a gradient, in the weight's shape, and whether to add to what it holds: else to overwrite all of it.

        For a backward pass, which must do so before anything else happens to the sum.
        """
        ...


_aside: list[bool] = []  # an entry for each block of `gradients_by_autograd` around us, in whatever thread


@contextmanager
def gradients_by_autograd() -> Iterator[None]:
    """Inside the block operations look for no sums: autograd gets all their gradients, as `torch.autograd.grad` needs.

    Around the backward pass too, in which recomputed blocks must do what they did before.
    """
    _aside.append(True)
    try:
        yield
    finally:
        _aside.pop()


def gradient_sum_of(weight: Tensor | None) -> GradientSum | None:
    """The sum in which this weight's gradients of the present forward pass land; None: autograd gets them."""
    if torch.compiler.is_compiling() or _aside or weight is None or not weight.requires_grad:
        return None
    found: GradientSum | None = getattr(weight, "gradient_sum", None)
    return found


def gradient_sums_of(*weights: Tensor) -> list[GradientSum] | None:
    """The sums of weights whose gradients one operation makes together; None unless all have one."""
    found = [total for weight in weights if (total := gradient_sum_of(weight)) is not None]
    return found if len(found) == len(weights) else None


def accumulate(totals: Sequence[GradientSum], write: Callable[[Sequence[Tensor]], None]) -> None:
    """Let `write` make gradients over the places of sums, or over tensors like them that are added to what is there."""
    taken = [total.take() for total in totals]
    made = [torch.empty_like(place) if adds else place for place, adds in taken]
    write(made)
    for (place, adds), gradient in zip(taken, made, strict=True):
        if adds:
            place.add_(gradient)


def make_or_accumulate(
    totals: Sequence[GradientSum] | None, weights: Sequence[Tensor], write: Callable[[Sequence[Tensor]], None]
) -> Sequence[Tensor | None]:
    """Gradients of weights, which `write` makes over what it is given; None for each where they land in sums."""
    if totals is not None:
        accumulate(totals, write)
        return [None] * len(weights)
    made = [torch.empty_like(weight) for weight in weights]
    write(made)
    return made


def accumulate_product(total: GradientSum, product: Tensor) -> None:
    """Add a gradient that was made in float32 to its sum."""
    place, adds = total.take()
    place.add_(product) if adds else place.copy_(product)


def multiplies_as_gpu(device: torch.device) -> bool:
    """Whether products have results wider than their factors, as those of a GPU's library; the meta device stands for a GPU."""
    return device.type in ("cuda", "meta")


def add_outer(place: Tensor, adds: bool, left_RA: Tensor, right_RB: Tensor) -> None:
    """place [A, B] += left^T right, or = if nothing is to be added to.

    On CUDA one product of the library, which adds in float32 where it makes the result. On a CPU the sum must not depend on how
    a library orders its additions, so the product is made first, in `gemm_dtype`: narrower than float32 it is rounded once.
    """
    if multiplies_as_gpu(place.device):
        if left_RA.dtype != place.dtype and adds:
            torch.addmm(place, left_RA.t(), right_RB, out_dtype=place.dtype, out=place)
        elif left_RA.dtype != place.dtype:
            torch.mm(left_RA.t(), right_RB, out_dtype=place.dtype, out=place)
        elif adds:
            place.addmm_(left_RA.t(), right_RB)
        else:
            torch.mm(left_RA.t(), right_RB, out=place)
        return
    dtype = gemm_dtype(left_RA)
    left_AR, right_RB = left_RA.to(dtype).t(), right_RB.to(dtype)
    if dtype == place.dtype and not adds:
        torch.mm(left_AR, right_RB, out=place)
    elif adds:
        place.add_(left_AR @ right_RB)
    else:
        place.copy_(left_AR @ right_RB)


@dataclass(frozen=True)
class WeightsHalf:
    """What one operation left to compute: the gradients of `weights`, in their order; None for one that landed in its sum."""

    weights: Sequence[Tensor]
    compute: Callable[[], Sequence[Tensor | None]]


Later = list[WeightsHalf]

_passes: list[Later] = []  # that are being split, the innermost last


@contextmanager
def split_backward(later: Later) -> Iterator[None]:
    """Let forward passes inside prepare for a split, and backward passes inside add their weights' half to `later`."""
    _passes.append(later)
    try:
        yield
    finally:
        _passes.pop()


def is_splitting() -> bool:
    """Whether a pass is being split."""
    return bool(_passes)


def is_split(*weights: Tensor) -> bool:
    """Whether gradients of these weights are computed later: all are parameters themselves, and a pass is being split."""
    return bool(_passes) and all(weight.is_leaf and weight.requires_grad for weight in weights)


def compute_later(weights: Sequence[Tensor], compute: Callable[[], Sequence[Tensor | None]]) -> None:
    """Leave the gradients of `weights`, which `compute` gives in their order, for the weights' half of this pass.

    None for a weight whose gradient it added to its sum.
    """
    assert _passes, "no pass is being split"
    _passes[-1].append(WeightsHalf(weights, compute))


@torch.no_grad()
def compute_now(later: Later, collect: Callable[[Tensor], None]) -> None:
    """Compute what was left, add it to the weights' gradients, and empty the list as it goes.

    `collect` is called with each weight as soon as all of this pass is in its gradient, so that few of them are there.
    """
    uses = Counter(id(weight) for half in later for weight in half.weights)
    later.reverse()
    while later:
        half = later.pop()
        for weight, gradient in zip(half.weights, half.compute(), strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
            uses[id(weight)] -= 1
            if not uses[id(weight)]:
                collect(weight)


def weight_gradient(x: Tensor, weight_OI: Tensor, grad: Tensor, total: GradientSum | None) -> Tensor | None:
    """grad^T x over all tokens of grad [..., O] and x [..., I], or None if it was added to `total`."""
    if total is not None:
        place, adds = total.take()
        add_outer(place, adds, grad.flatten(0, -2), x.flatten(0, -2))
        return None
    dtype = gemm_dtype(x)
    product: Tensor = grad.flatten(0, -2).to(dtype).t() @ x.flatten(0, -2).to(dtype)
    return product.to(weight_OI.dtype)


def embedding(ids: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of the table [V, D] at ids [...] int64 -> [..., D]."""
    total = gradient_sum_of(weight_VD)
    if total is None:
        return functional.embedding(ids, weight_VD)
    rows: Tensor = _Embedding.apply(ids, weight_VD, total)
    return rows


class _Embedding(torch.autograd.Function):
    """The look-up whose gradient lands in a sum."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor, total: GradientSum) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.total = total
        return functional.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        place, adds = ctx.total.take()
        grad = grad.to(place.dtype)
        if place.device.type == "cuda":
            # With repeated ids this adds in one order, by sorting them.
            (place if adds else place.zero_()).index_put_((ids,), grad, accumulate=True)
            return None, None, None
        # On a CPU a pass's rows are added up first, as in `add_outer`.
        table_VD = torch.ops.aten.embedding_dense_backward(grad, ids, len(place), -1, False)
        place.add_(table_VD) if adds else place.copy_(table_VD)
        return None, None, None
