"""Inverses of batches of small triangular matrices, by matrix products.

Why the inverse and not a solve: the right-hand side holds the state, which is known only when the loop over
chunks gets there, while the inverse can be taken for all chunks beforehand. Source of the form: Yang et al.
2024 (arXiv 2406.06484), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are eliminated one after another; larger blocks are joined by products.
_LEAF = 16


def invert_unit_lower(strict_nMM: Tensor) -> Tensor:
    """(I + strict)^-1 for matrices [n, M, M], whose entries on and above the diagonal are taken as zeros.

    Diagonal blocks of 16 rows are inverted by elimination, all at once; two neighbours of inverses X and Z with the block
    Y below the first then make one: [[X, 0], [-Z Y X, Z]]. Products run at the speed of products, where triangular
    solves of small matrices do not, and no power of the matrix is taken, whose entries could be large.

    Returns [n, M, M] in the dtype of the argument; M need be no multiple of 16.
    """
    n, M, _ = strict_nMM.shape
    inverse = torch.zeros_like(strict_nMM)
    whole = [slice(start, start + _LEAF) for start in range(0, M - _LEAF + 1, _LEAF)]
    if whole:
        solved = _eliminate(torch.cat([strict_nMM[:, leaf, leaf] for leaf in whole]))
        for leaf, block in zip(whole, solved.split(n), strict=True):
            inverse[:, leaf, leaf] = block
    if M % _LEAF:
        rest = slice(len(whole) * _LEAF, M)
        inverse[:, rest, rest] = _eliminate(strict_nMM[:, rest, rest])
    size = _LEAF
    while size < M:
        for start in range(0, M - size, 2 * size):
            first, second = slice(start, start + size), slice(start + size, min(start + 2 * size, M))
            below = torch.bmm(strict_nMM[:, second, first], inverse[:, first, first])
            inverse[:, second, first] = torch.bmm(inverse[:, second, second], below).neg_()
        size *= 2
    return inverse


def _eliminate(strict_nLL: Tensor) -> Tensor:
    """(I + strict)^-1 column by column, with the matrices side by side in the last dim.

    That makes each update one operation over all matrices, [L - j, j + 1, n], with long contiguous rows.
    """
    strict_LLn = strict_nLL.permute(1, 2, 0).contiguous()
    inverse_LLn = torch.zeros_like(strict_LLn)
    inverse_LLn.diagonal().fill_(1.0)
    for j in range(len(strict_LLn) - 1):
        inverse_LLn[j + 1 :, : j + 1].addcmul_(strict_LLn[j + 1 :, j : j + 1], inverse_LLn[j, : j + 1], value=-1.0)
    return inverse_LLn.permute(2, 0, 1)
