"""SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithms 3 and 4): Adam in the eigenbasis of Shampoo's two preconditioners.

For a matrix W [R, C] with gradient G, and bases P [R, R] and Q [C, C]:

    G' = P^T G Q;   M <- b1 M + (1 - b1) G;   V <- b2 V + (1 - b2) G'^2;   N = P (P^T M Q / (sqrt(V) + eps)) Q^T
    W <- (1 - rate decay) W - rate N
    left <- b2 left + (1 - b2) G G^T;   right <- b2 right + (1 - b2) G^T G

and every `frequency` steps P <- QR(left P), Q <- QR(right Q). M and V are corrected for their bias as Adam's. The first step finds
the bases by an eigendecomposition and changes no weight, as in the authors' program.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from amfm.model.config.section import Section
from amfm.pretrain.config.optimizers import MatrixOptimizerSpec


class Options(Section):
    """Options of SOAP; the decays of its moments are `optimizer.beta1` and `optimizer.beta2`."""

    frequency: int = Field(10, gt=0, description="Steps between two refinements of the bases.")


def shapes(rows: int, columns: int, options: Options) -> dict[str, tuple[int, ...]]:
    """Shapes of what is kept of a matrix."""
    squares = {"left": (rows, rows), "left_basis": (rows, rows)}
    squares |= {"right": (columns, columns), "right_basis": (columns, columns)}
    return squares | {"exp_avg": (rows, columns), "exp_avg_sq": (rows, columns)}


def update(
    weight_NRC: Tensor,
    gradient_NRC: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    group: Mapping[str, Any],
    options: Options,
) -> Tensor:
    """Step N matrices [N, R, C]; changes their state in place and returns their new weights."""
    beta1, beta2 = group["betas"]
    P_NRR, Q_NCC = state["left_basis"], state["right_basis"]
    grams = {"left": gradient_NRC @ gradient_NRC.mT, "right": gradient_NRC.mT @ gradient_NRC}
    if step == 1:
        for side, basis_NSS in (("left", P_NRR), ("right", Q_NCC)):
            state[side].copy_(grams[side])
            # The largest eigenvalue first, as the decompositions that follow have them.
            basis_NSS.copy_(torch.linalg.eigh(grams[side]).eigenvectors.flip(-1))
        return weight_NRC
    first_NRC = state["exp_avg"].lerp_(gradient_NRC, 1 - beta1)
    second_NRC = state["exp_avg_sq"].lerp_((P_NRR.mT @ gradient_NRC @ Q_NCC).square(), 1 - beta2)
    # The moments have seen one step less.
    rotated_NRC = P_NRR.mT @ (first_NRC / (1 - beta1 ** (step - 1))) @ Q_NCC
    scaled_NRC = rotated_NRC / ((second_NRC / (1 - beta2 ** (step - 1))).sqrt() + group["eps"])
    new_NRC = weight_NRC * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * (P_NRR @ scaled_NRC @ Q_NCC.mT)
    for side, basis_NSS in (("left", P_NRR), ("right", Q_NCC)):
        state[side].lerp_(grams[side], 1 - beta2)
        if step % options.frequency == 0:
            basis_NSS.copy_(torch.linalg.qr(state[side] @ basis_NSS).Q)
    return new_NRC


SPEC = MatrixOptimizerSpec("soap", "amfm_soap:update", Options, shapes="amfm_soap:shapes")
