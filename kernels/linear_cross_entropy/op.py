"""Cross-entropy of a linear head without keeping the logits, whole or over a shard of the vocabulary.

How: logits of a vocabulary of 100k in float32 are among the largest tensors of a training step, and are needed
for one softmax only. They are made for a slice of rows at a time. With the whole head on one rank, forward
turns each slice into its gradients at once, so that backward only scales them; with the head sharded over
tensor ranks, the softmax needs sums of all ranks first, so forward keeps the statistics and backward makes the
logits again. Reductions over ranks are the caller's.

The definition that the fast paths must keep has all logits in memory, one row at a time (`linear_cross_entropy_reference`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.kernels.common.inputs import check_float, check_shape
from amfm.kernels.linear_cross_entropy.torch_impl import linear_cross_entropy_torch, linear_statistics_torch
from amfm.kernels.runtime.backend import resolve_backend


@dataclass(frozen=True)
class CrossEntropy:
    """Sums over the rows whose label is not ignored.

    `total`: differentiable scalar, negative log-likelihood plus z-loss. `nll_sum`: detached scalar without the z-loss.
    `token_nll_R`: detached float32, 0 at ignored rows.

    Sums and not means, because a step divides by the labels of all ranks and micro-batches.
    """

    total: Tensor
    nll_sum: Tensor
    token_nll_R: Tensor


def linear_cross_entropy(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    *,
    ignore_index: int = -100,
    z_loss_weight: float = 0.0,
    backend: str = "auto",
) -> CrossEntropy:
    """Sum over rows of -log softmax(weight hidden)[label] + z_loss_weight * logsumexp(weight hidden)^2.

    Shapes: hidden [R, D], weight [V, D], labels [R] int64 in [0, V) or `ignore_index` -> CrossEntropy. Sums are kept
    in float32 (float64 for float64). Peak memory is a slice of the logits plus both gradients; all rows ignored gives
    a zero loss with zero gradients.
    Raises ValueError for wrong shapes and dtypes, labels outside the vocabulary (on CPU), a negative z_loss_weight.
    Source of the z-loss: PaLM (arXiv 2204.02311), section 5.
    """
    _check(hidden_RD, weight_VD, labels_R)
    if z_loss_weight < 0:
        raise ValueError(f"z_loss_weight must not be negative; got {z_loss_weight}")
    _check_labels(labels_R, weight_VD.shape[0], ignore_index)
    backend = resolve_backend(backend, hidden_RD.device, "linear_cross_entropy")
    if backend == "triton":
        from amfm.kernels.linear_cross_entropy.triton_impl import linear_cross_entropy_triton as implementation
    else:
        implementation = linear_cross_entropy_torch if backend == "torch" else linear_cross_entropy_reference
    total, token_nll_R = implementation(
        hidden_RD, weight_VD, labels_R, ignore_index=ignore_index, z_loss_weight=z_loss_weight
    )
    # Only the total carries gradient: the gradients that forward made are those of the total.
    token_nll_R = token_nll_R.detach()
    return CrossEntropy(total, token_nll_R.sum(), token_nll_R.float())


def linear_statistics(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, first_row: int = 0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What one shard of the vocabulary adds to the cross-entropy: (log-sum-exp [R], label's logit [R]), differentiable.

    The shard holds rows first_row .. first_row + V of the head. A label elsewhere (another shard, or ignored) gives
    logit 0. Over all shards, the label's logits add up and `torch.logsumexp` joins the log-sum-exps; their
    difference is the negative log-likelihood. Backward computes the logits again. Float32 (float64 for float64).

    Shapes: hidden [R, D], weight [V, D] of this shard, labels [R] int64 in the whole vocabulary.
    Raises ValueError for wrong shapes and dtypes.
    """
    _check(hidden_RD, weight_VD, labels_R)
    backend = resolve_backend(backend, hidden_RD.device, "linear_cross_entropy")
    if backend == "triton":
        from amfm.kernels.linear_cross_entropy.triton_impl import linear_statistics_triton

        return linear_statistics_triton(hidden_RD, weight_VD, labels_R, first_row)
    implementation = linear_statistics_torch if backend == "torch" else linear_statistics_reference
    return implementation(hidden_RD, weight_VD, labels_R, first_row=first_row)


def _check(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor) -> None:
    """Raise ValueError unless hidden [R, D], weight [V, D] and labels [R] int64 fit each other."""
    check_shape("hidden_RD", hidden_RD, (-1, -1))
    check_float("hidden_RD", hidden_RD)
    check_shape("weight_VD", weight_VD, (-1, hidden_RD.shape[1]), hidden_RD)
    check_float("weight_VD", weight_VD, hidden_RD)
    check_shape("labels_R", labels_R, (hidden_RD.shape[0],), hidden_RD)
    if labels_R.dtype != torch.int64:
        raise ValueError(f"labels_R must be int64; got {labels_R.dtype}")
    if weight_VD.shape[0] == 0:
        raise ValueError("weight_VD must hold at least one row of the vocabulary; got 0")


def _check_labels(labels_R: Tensor, vocab: int, ignore_index: int) -> None:
    """On CPU, where looking costs nothing, reject labels that the vocabulary does not hold."""
    if labels_R.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((labels_R < 0) | (labels_R >= vocab)) & (labels_R != ignore_index)
    if bool(wrong.any()):
        raise ValueError(
            f"labels_R must be in [0, {vocab}) or be ignore_index={ignore_index}; got {labels_R[wrong][0].item()}"
        )


def cross_entropy_flops(rows: int, vocab: int, model: int, *, recompute: bool) -> int:
    """Floating point operations of forward and backward: three products, four where backward computes logits again.

    `rows`, `vocab` and `model` are R, V and D; a product costs 2 R V D.
    """
    return 2 * rows * vocab * model * (4 if recompute else 3)


def cross_entropy_bytes(rows: int, vocab: int, model: int, size: int) -> int:
    """Least bytes of forward and backward: hidden and weight read, both gradients written.

    `size` is the bytes of one number; logits are not in it, because no logit has to reach memory.
    """
    return 2 * size * (rows + vocab) * model


def linear_cross_entropy_reference(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, ignore_index: int, z_loss_weight: float
) -> tuple[Tensor, Tensor]:
    """Total loss (scalar) and negative log-likelihood of each row [R], 0 where the label is `ignore_index`.

    hidden [R, D], weight [V, D], labels [R]; in the dtype of the inputs, gradients by autograd.
    """
    # Zero, but connected to both inputs: with all rows ignored the gradients are zeros and not absent.
    total = (hidden_RD.sum() + weight_VD.sum()) * 0
    token_nll = []
    for hidden, label in zip(hidden_RD, labels_R.tolist()):
        if label == ignore_index:
            token_nll.append(total.detach() * 0)
            continue
        logits_V = weight_VD @ hidden
        log_sum = logits_V.logsumexp(0)
        token_nll.append((log_sum - logits_V[label]).detach())
        total = total + log_sum - logits_V[label] + z_loss_weight * log_sum.square()
    return total, torch.stack(token_nll) if token_nll else hidden_RD.new_empty(0)


def linear_statistics_reference(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, first_row: int
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over these rows of the head, and the label's logit, 0 where another shard holds it.

    The shard holds rows first_row .. first_row + V of the head; both results are [R].
    """
    logits_RV = hidden_RD @ weight_VD.T
    local_R = labels_R - first_row
    mine_R = (local_R >= 0) & (local_R < weight_VD.shape[0])
    target_R = logits_RV.gather(1, local_R.clamp(0, weight_VD.shape[0] - 1)[:, None])[:, 0]
    return logits_RV.logsumexp(1), target_R.where(mine_R, torch.zeros_like(target_R))
