"""Cross-entropy of a linear head out of Triton tiles, with the plain products left to the vendor's library.

The whole loss computes gradients in forward: a slice's logits are written once (float32), read once, and become their
gradient: 3 products. Over a shard of the vocabulary no logits are written in forward, and backward computes them
again: 4 products.

Why the two products with the gradient are the library's: they are plain, and its kernels are tuned for every
GPU; only the softmax around them is worth fusing. Ignored rows stay and get a weight of zero, because their
number is known only on the device.

Logits of a linear head as tiles on chip: their log-sum-exp, the label's logit, and their gradient.

Softmax is online: a program keeps a running maximum and the sum of exponentials below it, and rescales the sum
when the maximum grows. Logits are float32 whatever the inputs are. Labels are compared with columns of this
shard, so a label of another shard, or an ignored one, meets no column and adds nothing.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.common.weight_gradients import add_outer
from amfm.kernels.linear_cross_entropy.torch_impl import register_loss, register_statistics
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import count_programs, dot_dtype


@triton.jit
def _logits_tile(
    hidden, weight, row, column, rows, vocab, model,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden weight^T for rows [BLOCK_M] and columns [BLOCK_N], in float32.

    hidden [rows, model] and weight [vocab, model] packed. "tf32x3": float32 operands keep their digits in three products of tf32.
    """
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, model, BLOCK_K):
        lane = begin + tl.arange(0, BLOCK_K)
        h = tl.load(
            hidden + row[:, None] * model + lane[None, :],
            mask=(row[:, None] < rows) & (lane[None, :] < model),
            other=0.0,
        )
        w = tl.load(
            weight + column[None, :] * model + lane[:, None],
            mask=(column[None, :] < vocab) & (lane[:, None] < model),
            other=0.0,
        )
        logits = tl.dot(h.to(DOT), w.to(DOT), logits, input_precision="tf32x3")
    return logits


@triton.jit
def statistics_kernel(
    hidden, weight, labels, peaks, sums, targets, logits_out, rows, vocab, model, first_row, tiles_per_split,
    STORE: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum of exponentials and label's logit over one split of the vocabulary: [splits, rows] each.

    Grid: (row blocks, splits). With STORE the logits [rows, vocab] are written as well.
    """
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    label = tl.load(labels + row, mask=row < rows, other=-1) - first_row
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    target = tl.zeros((BLOCK_M,), tl.float32)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocab, BLOCK_N))):
        column = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        logits = _logits_tile(hidden, weight, row, column, rows, vocab, model, DOT, BLOCK_M, BLOCK_N, BLOCK_K)
        exists = column[None, :] < vocab
        if STORE:
            tl.store(logits_out + row[:, None] * vocab + column[None, :], logits, mask=exists & (row[:, None] < rows))
        target += tl.sum(tl.where(exists & (column[None, :] == label[:, None]), logits, 0.0), 1)
        logits = tl.where(exists, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        peak = higher
    place = split * rows + row
    tl.store(peaks + place, peak, mask=row < rows)
    tl.store(sums + place, total, mask=row < rows)
    tl.store(targets + place, target, mask=row < rows)


@triton.jit
def gradient_kernel(
    hidden, weight, labels, log_sums, d_log_sums, d_targets, d_logits, rows, vocab, model, first_row,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_logits [rows, vocab] = d_log_sum * exp(logits - log_sum) + d_target at the label; logits computed again.

    Grid: one program per tile, row blocks innermost, so that programs that run together share a tile of the
    weight.
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = _logits_tile(hidden, weight, row, column, rows, vocab, model, DOT, BLOCK_M, BLOCK_N, BLOCK_K)
    label = tl.load(labels + row, mask=row < rows, other=-1) - first_row
    log_sum = tl.load(log_sums + row, mask=row < rows, other=0.0)
    d_log_sum = tl.load(d_log_sums + row, mask=row < rows, other=0.0)
    d_target = tl.load(d_targets + row, mask=row < rows, other=0.0)
    grad = d_log_sum[:, None] * tl.exp(logits - log_sum[:, None])
    grad += tl.where(column[None, :] == label[:, None], d_target[:, None], 0.0)
    inside = (row[:, None] < rows) & (column[None, :] < vocab)
    tl.store(d_logits + row[:, None] * vocab + column[None, :], grad.to(d_logits.dtype.element_ty), mask=inside)


@triton.jit
def stored_gradient_kernel(
    logits, labels, log_sums, d_log_sums, d_targets, d_logits, rows, vocab,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `gradient_kernel` out of stored float32 logits: each is read once. Grid: (row blocks, column blocks)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row[:, None] < rows) & (column[None, :] < vocab)
    place = row[:, None] * vocab + column[None, :]
    label = tl.load(labels + row, mask=row < rows, other=-1)
    log_sum = tl.load(log_sums + row, mask=row < rows, other=0.0)
    d_log_sum = tl.load(d_log_sums + row, mask=row < rows, other=0.0)
    d_target = tl.load(d_targets + row, mask=row < rows, other=0.0)
    stored = tl.load(logits + place, mask=inside, other=float("-inf"))
    grad = d_log_sum[:, None] * tl.exp(stored - log_sum[:, None])
    grad += tl.where(column[None, :] == label[:, None], d_target[:, None], 0.0)
    tl.store(d_logits + place, grad.to(d_logits.dtype.element_ty), mask=inside)


# Tile of a product: rows, vocabulary, model. Fixed, so that results do not depend on a tuning run.
TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32} if INTERPRETED else {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
# With logits that are stored, 128 rows spill 352 bytes per thread on sm_90 and 608 on sm_100.
STORING_TILE = TILE | {"BLOCK_M": min(64, TILE["BLOCK_M"])}
PRODUCT_OPTIONS = {"num_warps": 8, "num_stages": 3}
ELEMENTWISE_TILE = {"BLOCK_M": 16, "BLOCK_N": 64} if INTERPRETED else {"BLOCK_M": 1, "BLOCK_N": 4096}

# Elements of a slice's logits: 1 GiB in float32.
_SLICE_ELEMENTS = 1 << 28


def slice_rows(vocab: int) -> int:
    """Rows of a slice: whole tiles, enough to keep the products square, and 64 in the interpreter, to have several."""
    return 64 if INTERPRETED else max(256, min(4096, _SLICE_ELEMENTS // vocab // 128 * 128))


def _statistics_of(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, first_row: int, logits_RV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and label's logit [R] float32 of one slice; writes the logits where a buffer for them is given.

    The vocabulary is split over programs where just row blocks do not fill the GPU; partial sums are joined by
    a log-sum-exp of the splits.
    """
    rows, model = hidden_RD.shape
    vocab = weight_VD.shape[0]
    tile = TILE if logits_RV is None else STORING_TILE
    tiles = triton.cdiv(vocab, tile["BLOCK_N"])
    blocks = triton.cdiv(rows, tile["BLOCK_M"])
    per_split = triton.cdiv(tiles, max(1, min(tiles, count_programs(hidden_RD.device) // max(blocks, 1))))
    splits = triton.cdiv(tiles, per_split)
    peaks, sums, targets = hidden_RD.new_empty(3, splits, rows, dtype=torch.float32)
    if rows:
        statistics_kernel[(blocks, splits)](
            hidden_RD, weight_VD, labels_R, peaks, sums, targets, logits_RV, rows, vocab, model, first_row, per_split,
            STORE=logits_RV is not None, DOT=dot_dtype(hidden_RD.dtype), **tile, **PRODUCT_OPTIONS,
        )  # fmt: skip
    return (peaks + sums.log()).logsumexp(0), targets.sum(0)


def _accumulate(total_VD: Tensor | None, d_logits_RV: Tensor, hidden_RD: Tensor) -> Tensor:
    """Add a slice's d_logits^T hidden in float32; the first slice is the sum itself."""
    product = torch.mm(d_logits_RV.T, hidden_RD)
    return product if total_VD is None else total_VD.float().add_(product)


@torch.library.custom_op("amfm::linear_cross_entropy_triton", mutates_args=())
def _forward(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, ignore_index: int, z_loss_weight: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the PyTorch operation of the same shape; rows are never compacted, which would ask the device for a size."""
    hidden_RD, weight_VD, labels_R = hidden_RD.contiguous(), weight_VD.contiguous(), labels_R.contiguous()
    rows, vocab = hidden_RD.shape[0], weight_VD.shape[0]
    kept_R = (labels_R != ignore_index).float()
    log_sum_R, target_R = hidden_RD.new_empty(2, rows, dtype=torch.float32)
    d_hidden_RD = torch.empty_like(hidden_RD) if with_grad else hidden_RD.new_empty(0)
    d_weight_VD: Tensor | None = None
    step = slice_rows(vocab)
    logits = hidden_RD.new_empty(min(step, rows), vocab, dtype=torch.float32) if with_grad else None
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        hidden, labels = hidden_RD[part], labels_R[part]
        log_sum_R[part], target_R[part] = _statistics_of(hidden, weight_VD, labels, 0, logits)
        if logits is not None:
            d_log_sum = (1 + 2 * z_loss_weight * log_sum_R[part]) * kept_R[part]
            d_logits = _gradient_of(logits, labels, log_sum_R[part], d_log_sum, -kept_R[part], hidden)
            torch.mm(d_logits, weight_VD, out=d_hidden_RD[part])
            d_weight_VD = _accumulate(d_weight_VD, d_logits, hidden)
            del d_logits  # or two slices' would be there while the next one's is made
    nll_R = (log_sum_R - target_R) * kept_R
    total = nll_R.sum() + z_loss_weight * (log_sum_R.square() * kept_R).sum()
    if d_weight_VD is None:
        d_weight_VD = torch.zeros_like(weight_VD) if with_grad else weight_VD.new_empty(0)
    return total, nll_R, d_hidden_RD, d_weight_VD.to(weight_VD.dtype)


def _gradient_of(
    logits_RV: Tensor, labels_R: Tensor, log_sum_R: Tensor, d_log_sum_R: Tensor, d_target_R: Tensor, hidden_RD: Tensor
) -> Tensor:
    """Gradient of a slice's stored logits, in the dtype of hidden."""
    rows, vocab = hidden_RD.shape[0], logits_RV.shape[1]
    d_logits = hidden_RD.new_empty(rows, vocab)
    grid = (triton.cdiv(rows, ELEMENTWISE_TILE["BLOCK_M"]), triton.cdiv(vocab, ELEMENTWISE_TILE["BLOCK_N"]))
    stored_gradient_kernel[grid](
        logits_RV, labels_R, log_sum_R, d_log_sum_R, d_target_R, d_logits, rows, vocab, **ELEMENTWISE_TILE
    )
    return d_logits


register_loss(_forward)


def linear_cross_entropy_triton(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, ignore_index: int, z_loss_weight: float
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy_reference`, for float32, bfloat16 and float16, with sums in float32."""
    dot_dtype(hidden_RD.dtype)  # rejects float64
    with_grad = torch.is_grad_enabled() and (hidden_RD.requires_grad or weight_VD.requires_grad)
    return _forward(hidden_RD, weight_VD, labels_R, ignore_index, z_loss_weight, with_grad)[:2]


@torch.library.custom_op("amfm::linear_statistics_triton", mutates_args=())
def _statistics(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and label's logit [R] over this shard; no logits are written.

    Backward makes the logits again, so that no rank keeps [R, V / ranks] of them between the passes.
    """
    return _statistics_of(hidden_RD.contiguous(), weight_VD.contiguous(), labels_R.contiguous(), first_row, None)


@torch.library.custom_op("amfm::linear_statistics_triton_backward", mutates_args=("weight_VD_sum",))
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
    """Gradients of hidden and weight, which is empty if it lands, a slice of rows at a time."""
    hidden_RD, weight_VD, labels_R = hidden_RD.contiguous(), weight_VD.contiguous(), labels_R.contiguous()
    d_log_sum_R, d_target_R = d_log_sum_R.contiguous(), d_target_R.contiguous()
    (rows, model), vocab = hidden_RD.shape, weight_VD.shape[0]
    d_hidden_RD = torch.empty_like(hidden_RD)
    d_weight_VD: Tensor | None = None
    step = slice_rows(vocab)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        hidden = hidden_RD[part]
        d_logits = hidden.new_empty(hidden.shape[0], vocab)
        tiles = triton.cdiv(hidden.shape[0], TILE["BLOCK_M"]) * triton.cdiv(vocab, TILE["BLOCK_N"])
        gradient_kernel[(tiles,)](
            hidden, weight_VD, labels_R[part], log_sum_R[part], d_log_sum_R[part], d_target_R[part], d_logits,
            hidden.shape[0], vocab, model, first_row, DOT=dot_dtype(hidden_RD.dtype), **TILE, **PRODUCT_OPTIONS,
        )  # fmt: skip
        torch.mm(d_logits, weight_VD, out=d_hidden_RD[part])
        if weight_VD_sum is None:
            d_weight_VD = _accumulate(d_weight_VD, d_logits, hidden)
        else:
            add_outer(weight_VD_sum, weight_VD_adds or begin > 0, d_logits, hidden)
        del d_logits
    if weight_VD_sum is not None:
        if not rows and not weight_VD_adds:
            weight_VD_sum.zero_()
        return d_hidden_RD, hidden_RD.new_empty(0)
    if d_weight_VD is None:
        d_weight_VD = torch.zeros_like(weight_VD)
    return d_hidden_RD, d_weight_VD.to(weight_VD.dtype)


register_statistics(_statistics, _statistics_backward)


def linear_statistics_triton(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, first_row: int
) -> tuple[Tensor, Tensor]:
    """As `linear_statistics_reference`, for float32, bfloat16 and float16, with sums in float32."""
    dot_dtype(hidden_RD.dtype)
    return _statistics(hidden_RD, weight_VD, labels_R, first_row)
