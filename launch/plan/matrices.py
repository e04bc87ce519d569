"""What Muon adds to a plan: the matrices that a pipeline stage holds, and the arithmetic of orthogonalising them once per step.

Read off a model on the meta device, from the list that the optimizer itself steps by (model/matrices.py), so that experts,
heads and segments count as they are. Matrices that tensor ranks cut count as cut evenly; those along whose short side they
are cut cost each rank more than that.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import cycle

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.matrices import list_matrices
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.muon import MuonConfig
from amfm.pretrain.config.optimizers import PackageMatrices
from amfm.pretrain.engine.muon.newton_schulz import cost


@dataclass(frozen=True)
class MatrixShare:
    """Of matrices of a rank of a stage, of routed experts and of the rest: numbers, FLOPs to orthogonalise them, numbers that
    their optimizer keeps, and numbers that are sent to and from their owners.
    """

    dense: float = 0.0
    routed: float = 0.0
    dense_flops: float = 0.0
    routed_flops: float = 0.0
    dense_state: float = 0.0
    routed_state: float = 0.0
    dense_sent: float = 0.0
    routed_sent: float = 0.0

    def __add__(self, other: MatrixShare) -> MatrixShare:
        return MatrixShare(*(one + more for one, more in zip(astuple(self), astuple(other))))

    def divided(self, dense: float, routed: float) -> MatrixShare:
        """The same spread over this many ranks."""
        return MatrixShare(*(value / ranks for value, ranks in zip(astuple(self), cycle((dense, routed)))))


NO_MATRICES = MatrixShare()


def count_matrices(
    model: ModelConfig, letters: tuple[str, ...], muon: MuonConfig | PackageMatrices | None
) -> MatrixShare:
    """Count the matrices of these blocks, whole; none without Muon."""
    if muon is None:
        return NO_MATRICES
    of_block = _by_letter(model, muon)
    return sum((of_block[symbol] for symbol in letters), start=NO_MATRICES)


@lru_cache(maxsize=16)
def _by_letter(model: ModelConfig, muon: MuonConfig | PackageMatrices) -> dict[str, MatrixShare]:
    """Matrices of one block of each symbol of the pattern."""
    groups = single_rank_groups()
    built = HybridModel(model, groups, backend="torch", device="meta")
    # The first block of a symbol stands for all of them, in MTP layers too.
    places = [f"blocks.{index}" for index in range(len(model.letters))]
    places += [f"mtp.0.blocks.{index}" for index in range(len(model.parsed_pattern.depth_letters))]
    letters: dict[str, str] = {}
    for place, symbol in zip(places, model.built_letters):
        if symbol not in letters.values():
            letters[place] = symbol
    found = dict.fromkeys(model.built_letters, NO_MATRICES)
    for stack in list_matrices(built, groups, per_head=muon.per_head):
        block = stack.name.partition(".mixer.")[0]
        if block not in letters:
            continue
        flops, numel = float(muon.rounds * stack.count * cost(stack.shape)), float(stack.numel)
        kept = float(stack.count * sum(math.prod(shape) for shape in muon.state_shapes(*stack.shape).values()))
        # An update and its result, or weights, gradient and new weights in the dtype of the master weights, twice as wide on GPUs.
        sent = (6.0 if muon.keeps_state_at_owners else 2.0) * numel
        share = [value for pair in zip((numel, flops, kept, sent), (0.0, 0.0, 0.0, 0.0)) for value in pair]
        if ".experts." in stack.name:
            share = [value for pair in zip(share[1::2], share[::2]) for value in pair]
        found[letters[block]] += MatrixShare(*share)
    return found
