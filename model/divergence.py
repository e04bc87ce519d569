"""How far a model's next tokens are from a teacher's: the loss of distillation, without the logits of all tokens.

Of a teacher's probabilities p and a student's q, both with a temperature T, the divergence of a token is
T^2 sum_v p_v log(p_v / q_v), or with q and p in each other's place (`reverse_kl`); T^2 keeps the size of gradients (Hinton et al.
2015, arXiv 1503.02531, section 2). With `top_k` the outcomes are the teacher's k likeliest tokens, and one that stands for all
others with what remains of p and of q. Nothing is renormalised: that divergence is at most the whole one, and 0 for equal logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

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

    def outcomes(self, logits_RV: Tensor) -> Outcomes:
        """What a teacher of these logits says of each token, without gradients."""
        log_p_RV = logits_RV.detach().div(self.temperature).log_softmax(-1)
        if self.top_k is None or self.top_k >= log_p_RV.shape[-1]:
            return Outcomes(log_p_RV)
        chosen_RK = logits_RV.topk(self.top_k, dim=-1).indices
        return Outcomes(with_rest(log_p_RV, chosen_RK), chosen_RK)

    def between(self, student_RV: Tensor, teacher: Outcomes) -> Tensor:
        """The divergence of each token [R] in nats, of the student's logits [R, V], which get gradients."""
        log_p, log_q = teacher.log_p, student_RV.div(self.temperature).log_softmax(-1)
        if teacher.chosen_RK is not None:
            log_q = with_rest(log_q, teacher.chosen_RK)
        if self.kind == "reverse_kl":
            log_q, log_p = log_p, log_q
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class Outcomes:
    """A teacher's log probabilities, float32 or wider: [R, V] of all tokens, or [R, K + 1] of those chosen and of all others together."""

    log_p: Tensor
    chosen_RK: Tensor | None = None


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

    def outcomes(self, rows: slice, divergence: Divergence, groups: ProcessGroupCollection) -> Outcomes:
        """What these rows say, as a teacher's; every rank of `groups.tp` must call."""
        return divergence.outcomes(self.logits(rows, groups))


class TeacherRows(Protocol):
    """What a teacher says of rows [R], a slice of them at a time."""

    def outcomes(self, rows: slice, divergence: Divergence, groups: ProcessGroupCollection) -> Outcomes:
        """The outcomes of some rows, on the device of the student's; every rank of `groups.tp` must call."""


@dataclass(frozen=True)
class StoredRows:
    """Outcomes that were computed before, of all rows."""

    all: Outcomes

    def outcomes(self, rows: slice, divergence: Divergence, groups: ProcessGroupCollection) -> Outcomes:
        """Take some rows."""
        assert self.all.chosen_RK is not None, "only the likeliest tokens are stored"
        return Outcomes(self.all.log_p[rows], self.all.chosen_RK[rows])


def divergence_at_head(
    student: HeadRows, teacher: TeacherRows, labels_R: Tensor, divergence: Divergence, groups: ProcessGroupCollection
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
        teacher: TeacherRows,
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
                found = divergence.between(logits, teacher.outcomes(rows, divergence, groups))
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
