"""Inverses of batches of small triangular matrices, by matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are solved one after another; larger blocks are joined by products.
_LEAF = 16


def invert_unit_lower(strict_nMM: Tensor) -> Tensor:
    """(I + strict)^-1 for matrices [n, M, M], whose entries on and above the diagonal are taken as zeros.

    Diagonal blocks of 16 rows are inverted by forward substitution, all at once; two neighbours of inverses X and Z with
    the block Y below the first then make one: [[X, 0], [-Z Y X, Z]]. Products run at the speed of products, where
    triangular solves of small matrices do not, and no power of the matrix is taken, whose entries could be large.
    """
    M = strict_nMM.shape[1]
    inverse = torch.zeros_like(strict_nMM)
    _invert_leaves(strict_nMM, inverse)
    size = _LEAF
    while size < M:
        for start in range(0, M - size, 2 * size):
            first, second = slice(start, start + size), slice(start + size, min(start + 2 * size, M))
            below = torch.bmm(strict_nMM[:, second, first], inverse[:, first, first])
            inverse[:, second, first].baddbmm_(inverse[:, second, second], below, beta=0.0, alpha=-1.0)
        size *= 2
    return inverse


def _invert_leaves(strict_nMM: Tensor, inverse_nMM: Tensor) -> None:
    """Write the inverses of the diagonal blocks of at most 16 rows; those of full size are solved together."""
    n, M, _ = strict_nMM.shape
    whole = M // _LEAF
    leaves = [slice(i * _LEAF, (i + 1) * _LEAF) for i in range(whole)]
    if whole:
        solved = _substitute(torch.cat([strict_nMM[:, leaf, leaf] for leaf in leaves]))
        for leaf, block in zip(leaves, solved.split(n)):
            inverse_nMM[:, leaf, leaf] = block
    if M % _LEAF:
        rest = slice(whole * _LEAF, M)
        inverse_nMM[:, rest, rest] = _substitute(strict_nMM[:, rest, rest])


def _substitute(strict_nLL: Tensor) -> Tensor:
    """(I + strict)^-1 row by row: row i is the unit vector minus strict_i times the rows before it."""
    rows = strict_nLL.tril(-1).neg_()
    for i in range(1, rows.shape[1]):
        rows[:, i, :i] += torch.bmm(rows[:, i : i + 1, :i], rows[:, :i, :i])[:, 0]
    rows.diagonal(dim1=1, dim2=2).add_(1.0)
    return rows
