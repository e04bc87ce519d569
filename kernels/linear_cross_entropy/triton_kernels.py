"""Logits of a linear head as tiles on chip: their log-sum-exp, the label's logit, and their gradient.

Softmax is online: a program keeps a running maximum and the sum of exponentials below it, and rescales the sum
when the maximum grows. Logits are float32 whatever the inputs are. Labels are compared with columns of this
shard, so a label of another shard, or an ignored one, meets no column and adds nothing.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl


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
