"""Newton-Schulz: the nearest matrix with equal singular values, only by products, for whole matrices and for cut ones.

X <- a X + (b A + c A A) X with A = X X^T, rows being the short side, drives all singular values of X / |X| towards 1 in a
few rounds: U V^T of the decomposition X = U S V^T, but with values of 0.7 to 1.2, which is all that Muon needs (Jordan et
al. 2024, Muon: an optimizer for hidden layers in neural networks). Tensor ranks that hold slices of a matrix get the same:

    along the long side     A is a sum over ranks: one all-reduce of [short, short] a round, and each keeps its columns
    along the short side    the matrix is gathered, every rank computes all of it and keeps its part

Orthogonalising slices on their own would be cheaper and another optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from amfm.model.matrices import MatrixCut

# a, b, c of a round: steep at 0, so that small singular values come up in five rounds.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
BATCH_ELEMENTS = 1 << 26  # numbers of like matrices that are worth orthogonalising together
EPSILON = 1e-7  # added to the norm, so that a matrix of zeros stays one


def orthogonalize(
    matrices_NRC: Tensor, rounds: int, *, shape: tuple[int, int], cut: MatrixCut | None = None, group: Any = None
) -> Tensor:
    """Orthogonalise a stack of matrices [N, R, C] in their dtype; of cut ones this rank's slices, whole ones have `shape`.

    `group`: the ranks of the cut, all of which must call this with the same stack. Zeros stay zeros.
    """
    is_tall = shape[0] > shape[1]
    X_NSL = matrices_NRC.mT if is_tall else matrices_NRC
    if cut is None:
        found_NSL = _iterate(X_NSL, rounds, None, 1)
    elif (cut.dim == 0) != is_tall:
        whole_NSL = gather_rows(X_NSL, cut, group)
        found_NSL = own_rows(_iterate(whole_NSL, rounds, None, 1), cut, group)
    else:
        found_NSL = _iterate(X_NSL, rounds, group, group.size() // cut.slices)
    return found_NSL.mT if is_tall else found_NSL


def gather_rows(X_NRC: Tensor, cut: MatrixCut, group: Any) -> Tensor:
    """Gather the rows of matrices that the ranks of a cut share, of copies the first. All of them must call."""
    gathered = X_NRC.new_empty(group.size() * len(X_NRC), *X_NRC.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, X_NRC.contiguous(), group=group)
    copies = group.size() // cut.slices
    return gathered.unflatten(0, (group.size(), -1))[::copies].transpose(0, 1).flatten(1, 2)


def own_rows(X_NRC: Tensor, cut: MatrixCut, group: Any) -> Tensor:
    """This rank's rows of whole matrices."""
    return X_NRC.unflatten(1, (cut.slices, -1))[:, group.rank() // (group.size() // cut.slices)]


def _iterate(X_NSL: Tensor, rounds: int, group: Any, copies: int) -> Tensor:
    """Rounds on matrices with short rows; `group`: the ranks that have the other columns, each `copies` times."""
    a, b, c = COEFFICIENTS
    squares_N11 = X_NSL.to(_sum_dtype(X_NSL)).square().sum((1, 2), keepdim=True)
    norm_N11 = _sum(squares_N11, group, copies).sqrt()
    X_NSL = (X_NSL / (norm_N11 + EPSILON)).to(X_NSL.dtype)
    for _ in range(rounds):
        A_NSS = X_NSL @ X_NSL.mT
        if group is not None:
            A_NSS = _sum(A_NSS.to(_sum_dtype(A_NSS)), group, copies).to(X_NSL.dtype)
        B_NSS = torch.baddbmm(A_NSS, A_NSS, A_NSS, beta=b, alpha=c)
        X_NSL = torch.baddbmm(X_NSL, B_NSS, X_NSL, beta=a)
    return X_NSL


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Dtype of sums: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _sum(part: Tensor, group: Any, copies: int) -> Tensor:
    """Sum over the ranks of a group in place, each part being there this many times; without a group it is whole."""
    if group is None:
        return part
    torch.distributed.all_reduce(part, group=group)
    return part.div_(copies) if copies > 1 else part


def cost(shape: tuple[int, int]) -> int:
    """Products of one round on a whole matrix, up to a common factor: 4 s^2 l + 2 s^3 for sides s <= l."""
    short, long = min(shape), max(shape)
    return 4 * short * short * long + 2 * short**3
