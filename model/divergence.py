"""How far a model's next tokens are from a teacher's: the loss of distillation, without the logits of all tokens.

Of a teacher's probabilities p and a student's q, both with a temperature T, the divergence of a token is
T^2 sum_v p_v log(p_v / q_v), or with q and p in each other's place (`reverse_kl`); T^2 keeps the size of gradients (Hinton et al.
2015, arXiv 1503.02531, section 2). With `top_k` the outcomes are the teacher's k likeliest tokens, and one that stands for all
others with what remains of p and of q. Nothing is renormalised: that divergence is at most the whole one, and 0 for equal logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from amfm.model.loss import IGNORE_INDEX, head_logits
from amfm.model.parallel.groups import ProcessGroupCollection

DivergenceKind = Literal["kl", "reverse_kl"]
SLICE = 1 << 23  # logits of a slice of tokens; a few tensors of this size are needed at a time


@dataclass(frozen=True)
class Divergence:
    """What is compared, as in the section `distill`."""

    kind: DivergenceKind = "kl"
    temperature: float = 1.0
    top_k: int | None = None

    def of_logits(self, student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
        """The divergence of each token [R] in nats, of logits [R, V]; only the student's get gradients."""
        log_q, log_p = (logits.div(self.temperature).log_softmax(-1) for logits in (student_RV, teacher_RV.detach()))
        if self.top_k is not None and self.top_k < log_p.shape[-1]:
            chosen_RK = teacher_RV.topk(self.top_k, dim=-1).indices
            log_q, log_p = with_rest(log_q, chosen_RK), with_rest(log_p, chosen_RK)
        if self.kind == "reverse_kl":
            log_q, log_p = log_p, log_q
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def with_rest(log_p_RV: Tensor, chosen_RK: Tensor) -> Tensor:
    """Log probabilities [R, K + 1] of chosen tokens, and of all others together."""
    rest_R1 = log_p_RV.scatter(-1, chosen_RK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p_RV.gather(-1, chosen_RK), rest_R1], dim=-1)


@dataclass(frozen=True)
class HeadRows:
    """What a head reads, [R, D] from `enter_tensor_region`, and its matrix [V of this rank, D]."""

    read_RD: Tensor
    weight_VD: Tensor

    def logits(self, rows: slice, groups: ProcessGroupCollection) -> Tensor:
        """Logits [r, V] of some rows, in float32 for bf16; every rank of `groups.tp` must call, and all get the same."""
        logits = head_logits(self.read_RD[rows], self.weight_VD, groups)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def divergence_at_head(
    student: HeadRows, teacher: HeadRows, labels_R: Tensor, divergence: Divergence, groups: ProcessGroupCollection
) -> tuple[Tensor, Tensor]:
    """Sum the divergence less the negative log-likelihood over tokens with a label, and the divergence on its own, without gradient.

    Of the difference a part w makes a loss (1 - w) nll + w divergence of a loss nll. Gradients are made in the forward pass, a slice
    of tokens at a time; both models must have the same vocabulary. Every rank of `groups.tp` must call.
    """
    total, alone = _AtHead.apply(student.read_RD, student.weight_VD, teacher, labels_R, divergence, groups)
    return total, alone


class _AtHead(torch.autograd.Function):
    """Keeps the gradients of what the head reads, and of its matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        read_RD: Tensor,
        weight_VD: Tensor,
        teacher: HeadRows,
        labels_R: Tensor,
        divergence: Divergence,
        groups: ProcessGroupCollection,
    ) -> tuple[Tensor, Tensor]:
        student, own_vocab = HeadRows(read_RD, weight_VD), weight_VD.shape[0]
        wide = torch.promote_types(read_RD.dtype, torch.float32)
        d_read_RD, d_weight_VD = torch.empty_like(read_RD), torch.zeros_like(weight_VD, dtype=wide)
        sums = read_RD.new_zeros(2, dtype=wide)
        step = max(1, SLICE // (own_vocab * groups.tp.size()))
        for begin in range(0, len(read_RD), step):
            rows = slice(begin, begin + step)
            labels, logits = labels_R[rows], student.logits(rows, groups).requires_grad_()
            with torch.enable_grad():
                is_valid = labels != IGNORE_INDEX
                found = divergence.of_logits(logits, teacher.logits(rows, groups))
                nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
                found = torch.where(is_valid, found, 0.0)
                total = (found - nll).sum()
                (d_logits,) = torch.autograd.grad(total, logits)
            own = d_logits[:, groups.tp.rank() * own_vocab :][:, :own_vocab].to(weight_VD.dtype)
            torch.mm(own, weight_VD, out=d_read_RD[rows])
            d_weight_VD += torch.mm(own.T, read_RD[rows])
            sums += torch.stack([total.detach(), found.detach().sum()])
        ctx.save_for_backward(d_read_RD, d_weight_VD.to(weight_VD.dtype))
        total, alone = sums.unbind()
        total, alone = total.clone(), alone.clone()
        ctx.mark_non_differentiable(alone)
        return total, alone

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_read_RD, d_weight_VD = ctx.saved_tensors
        factor = grads[0]
        return (
            d_read_RD * factor.to(d_read_RD.dtype),
            d_weight_VD * factor.to(d_weight_VD.dtype),
            None,
            None,
            None,
            None,
        )
