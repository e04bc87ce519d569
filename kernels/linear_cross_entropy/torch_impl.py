"""Cross-entropy of a linear head in PyTorch, over slices of tokens, so that the logits of all tokens never exist.

Each slice's logits are turned in place into their own gradient and used at once, so backward has nothing left to do
but to scale: three products instead of the four that recomputing needs.

Ignored rows are left out of all products: they are gathered away first, which on a CPU costs no wait. The
weight's gradient is summed over slices in float32 even where products are bfloat16.

What autograd and the compiler have to know of the operations is here for Triton too. The loss operation returns its gradients as
outputs, because a custom operation cannot hand its context a tensor in any other way; they are marked as not differentiable.
Backward multiplies them with the scalar that reaches the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.kernels.common.weight_gradients import gradient_sum_of

# Logits of a slice: 8 MiB in float32 stay in the cache of one core complex; fewer than 128 rows starve the product.
_SLICE_ELEMENTS = 1 << 21
_LEAST_ROWS = 128


def sum_dtype(x: Tensor) -> torch.dtype:
    """Dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def register_loss(operation: CustomOpDef) -> None:
    """Shapes and gradient of an operation that gives the loss, that of each row, and the gradients (or empty ones)."""
    operation.register_fake(_fake_loss)
    operation.register_autograd(_differentiate_loss, setup_context=_save_gradients)


def register_statistics(operation: CustomOpDef, backward: CustomOpDef) -> None:
    """Shapes and gradient of an operation that gives the log-sum-exp and the label's logit; `backward` computes it.

    The inputs and the log-sum-exp are kept: backward computes the logits again.
    """

    @fake_of(operation)
    def _(given: Any) -> tuple[Tensor, ...]:
        log_sum_R = given.hidden_RD.new_empty(given.labels_R.shape, dtype=sum_dtype(given.hidden_RD))
        return log_sum_R, torch.empty_like(log_sum_R)

    differentiate(operation, backward, outputs=("log_sum_R", "target_R"), gradients=("hidden_RD", "weight_VD"))


def _fake_loss(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, ignore_index: int, z_loss_weight: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the loss operation: loss [], loss of each row [R], gradients of hidden and weight."""
    wide = sum_dtype(hidden_RD)
    d_hidden, d_weight = (x.new_empty(x.shape if with_grad else 0) for x in (hidden_RD, weight_VD))
    return hidden_RD.new_empty((), dtype=wide), hidden_RD.new_empty(labels_R.shape, dtype=wide), d_hidden, d_weight


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that forward made.

    The inputs are not kept: backward does not need them.
    """
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.total = gradient_sum_of(inputs[1])


def _differentiate_loss(ctx: Any, d_total: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Scale the gradients that forward made."""
    if d_total is None:
        return (None,) * 6
    d_hidden_RD, d_weight_VD = ctx.saved_tensors
    # A scalar tensor does not change the dtype, and is multiplied in float32.
    d_hidden_RD = d_hidden_RD * d_total
    if ctx.total is None:
        return (d_hidden_RD, d_weight_VD * d_total) + (None,) * 4
    place, adds = ctx.total.take()
    _add_scaled(place, adds, d_weight_VD, d_total)
    return (d_hidden_RD,) + (None,) * 5


def _add_scaled(place: Tensor, adds: bool, d_weight_VD: Tensor, scale: Tensor) -> None:
    """place += or = scale times a gradient, in one pass over memory and without rounding the product to the gradient's dtype.

    On a CPU product and sum round one after the other, as without a place to land in (`weight_gradients.add_outer`).
    """
    # A matrix, and not a scalar, widens what it is multiplied with.
    scale = scale.to(place.dtype).view(1, 1)
    if not adds:
        torch.mul(d_weight_VD, scale, out=place)
    elif place.device.type == "cpu":
        place.add_(d_weight_VD * scale)
    else:
        place.addcmul_(d_weight_VD, scale)


def _slice_rows(vocab: int) -> int:
    """Rows of a slice of logits."""
    return max(_LEAST_ROWS, _SLICE_ELEMENTS // vocab)


def _logits(hidden_RD: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits of one slice in the dtype of sums."""
    return torch.mm(hidden_RD, weight_VD.T).to(sum_dtype(hidden_RD))


@torch.library.custom_op("amfm::linear_cross_entropy_torch", mutates_args=())
def _forward(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    ignore_index: int,
    z_loss_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total, negative log-likelihood of each row, and (empty unless `with_grad`) gradients of hidden and weight."""
    hidden_RD, weight_VD = hidden_RD.contiguous(), weight_VD.contiguous()
    dtype, wide = gemm_dtype(hidden_RD), sum_dtype(hidden_RD)
    rows_S = (labels_R != ignore_index).nonzero()[:, 0]
    whole = rows_S.numel() == labels_R.numel()
    hidden_SD = (hidden_RD if whole else hidden_RD.index_select(0, rows_S)).to(dtype)
    labels_S = labels_R if whole else labels_R.index_select(0, rows_S)
    weight = weight_VD.to(dtype)
    nll_S = hidden_RD.new_empty(rows_S.numel(), dtype=wide)
    log_sum_S = torch.empty_like(nll_S)
    d_hidden_SD = torch.empty_like(hidden_SD) if with_grad else hidden_SD.new_empty(0)
    d_weight = torch.zeros_like(weight_VD, dtype=wide) if with_grad else weight_VD.new_empty(0)
    step = _slice_rows(weight.shape[0])
    for begin in range(0, rows_S.numel(), step):
        part = slice(begin, begin + step)
        labels = labels_S[part, None]
        logits = _logits(hidden_SD[part], weight)
        peak = logits.amax(1, keepdim=True)
        target = logits.gather(1, labels)
        # From here on logits, probabilities and their gradient are one buffer.
        probabilities = logits.sub_(peak).exp_()
        total = probabilities.sum(1, keepdim=True)
        log_sum = total.log().add_(peak)
        nll_S[part], log_sum_S[part] = (log_sum - target)[:, 0], log_sum[:, 0]
        if with_grad:
            # d(log_sum + z log_sum^2) = (1 + 2 z log_sum) p, and -1 at the label.
            d_logits = probabilities.mul_((1 + 2 * z_loss_weight * log_sum) / total)
            d_logits.scatter_add_(1, labels, -torch.ones_like(total))
            d_logits = d_logits.to(dtype)
            torch.mm(d_logits, weight, out=d_hidden_SD[part])
            _accumulate_outer(d_weight, d_logits, hidden_SD[part])
    loss = nll_S.sum() + z_loss_weight * log_sum_S.square().sum()
    nll_R = nll_S if whole else nll_S.new_zeros(labels_R.shape[0]).index_copy_(0, rows_S, nll_S)
    if with_grad and not whole:
        d_hidden_SD = torch.zeros_like(hidden_RD, dtype=dtype).index_copy_(0, rows_S, d_hidden_SD)
    return loss, nll_R, d_hidden_SD.to(hidden_RD.dtype), d_weight.to(weight_VD.dtype)


def _accumulate_outer(total_VD: Tensor, d_logits_RV: Tensor, hidden_RD: Tensor) -> None:
    """total += d_logits^T hidden, the sum kept in the dtype of `total`.

    bfloat16 products are added in float32: a bfloat16 sum would round at every slice.
    """
    if d_logits_RV.dtype == total_VD.dtype:
        total_VD.addmm_(d_logits_RV.T, hidden_RD)
    else:
        total_VD.add_(torch.mm(d_logits_RV.T, hidden_RD))


register_loss(_forward)


def linear_cross_entropy_torch(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, ignore_index: int, z_loss_weight: float
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy_reference`, with sums in float32 (float64 for float64)."""
    # Evaluation needs no gradients, and then only one of the three products is taken.
    with_grad = torch.is_grad_enabled() and (hidden_RD.requires_grad or weight_VD.requires_grad)
    return _forward(hidden_RD, weight_VD, labels_R, ignore_index, z_loss_weight, with_grad)[:2]


@torch.library.custom_op("amfm::linear_statistics_torch", mutates_args=())
def _statistics(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [R] and the label's logit [R] over the rows of the head that this shard holds.

    Slices of rows, so that the logits of all tokens never exist together.
    """
    dtype = gemm_dtype(hidden_RD)
    weight, hidden_RD = weight_VD.to(dtype), hidden_RD.to(dtype)
    log_sum_R = hidden_RD.new_empty(labels_R.shape[0], dtype=sum_dtype(hidden_RD))
    target_R = torch.zeros_like(log_sum_R)
    for part, mine, local in _walk(hidden_RD.shape[0], weight.shape[0], labels_R, first_row):
        logits = _logits(hidden_RD[part], weight)
        # Labels of other shards were moved to row 0, and are masked here.
        target_R[part] = logits.gather(1, local)[:, 0].mul_(mine)
        log_sum_R[part] = logits.logsumexp(1)
    return log_sum_R, target_R


def _walk(rows: int, vocab: int, labels_R: Tensor, first_row: int) -> list[tuple[slice, Tensor, Tensor]]:
    """Slices of tokens, whether each label is in this shard, and its row there (0 where it does not)."""
    local_R = labels_R - first_row
    mine_R = (local_R >= 0) & (local_R < vocab)
    local_R = local_R.where(mine_R, torch.zeros_like(local_R))[:, None]
    step = _slice_rows(vocab)
    parts = [slice(begin, begin + step) for begin in range(0, rows, step)]
    return [(part, mine_R[part], local_R[part]) for part in parts]


@torch.library.custom_op("amfm::linear_statistics_torch_backward", mutates_args=("weight_VD_sum",))
def _statistics_backward(
    d_log_sum_R: Tensor,
    d_target_R: Tensor,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    log_sum_R: Tensor,
    first_row: int,
    weight_VD_sum: Tensor | None,
    weight_VD_adds: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, which is empty if it lands; logits are computed again."""
    hidden_RD, weight_VD = hidden_RD.contiguous(), weight_VD.contiguous()
    dtype = gemm_dtype(hidden_RD)
    weight, hidden = weight_VD.to(dtype), hidden_RD.to(dtype)
    d_hidden_RD = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight_VD, dtype=sum_dtype(hidden_RD))
    for part, mine, local in _walk(hidden.shape[0], weight.shape[0], labels_R, first_row):
        d_logits = _logits(hidden[part], weight).sub_(log_sum_R[part, None]).exp_().mul_(d_log_sum_R[part, None])
        d_logits = d_logits.scatter_add_(1, local, (d_target_R[part] * mine)[:, None]).to(dtype)
        torch.mm(d_logits, weight, out=d_hidden_RD[part])
        _accumulate_outer(d_weight, d_logits, hidden[part])
    if weight_VD_sum is None:
        return d_hidden_RD.to(hidden_RD.dtype), d_weight.to(weight_VD.dtype)
    weight_VD_sum.add_(d_weight) if weight_VD_adds else weight_VD_sum.copy_(d_weight)
    return d_hidden_RD.to(hidden_RD.dtype), hidden_RD.new_empty(0)


register_statistics(_statistics, _statistics_backward)


def linear_statistics_torch(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, first_row: int
) -> tuple[Tensor, Tensor]:
    """As `linear_statistics_reference`, over slices of tokens; backward computes the logits again."""
    return _statistics(hidden_RD, weight_VD, labels_R, first_row)
