"""What a fine-tune adds to a matrix: scale B (A x), two thin factors next to a weight that stays as it is (LoRA).

The factors follow the cut of their matrix, so that no collective is added. Next to a column layer A is whole on every
tensor rank, which reads the same tokens, and B is cut as the rows of W. Next to a row layer A is cut as the columns of
W and B is
whole: its parts leave the region in the sum that W's parts need anyway. Of a whole factor each rank has the gradient that
its own rows or columns give, a part of the sum.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from amfm.kernels.linear.op import linear
from amfm.model.parallel.shards import Shard, ShardSpec


class LowRankUpdate(nn.Module):
    """The factors down [rank, in of this rank] and up [out of this rank, rank] of scale up (down x).

    `cut`: of the matrix next to it, of dim 0 for a column layer and dim 1 for a row layer. `gates` [..., rank]:
    what the numbers between both factors are multiplied by, token by token (model/routed_updates.py); none: nothing.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """

    def __init__(self, weight_OI: Tensor, cut: ShardSpec, rank: int, scale: float) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        self.scale = scale
        self.gates: Tensor | None = None
        self.down = nn.Parameter(weight_OI.new_empty(rank, inputs))
        self.up = nn.Parameter(weight_OI.new_empty(outputs, rank))
        own, whole = Shard((replace(cut),)), Shard(partial=("tp",))
        self.shards = {"down": whole, "up": own} if cut.dim == 0 else {"down": own, "up": whole}

    def forward(self, x: Tensor) -> Tensor:
        """Compute the update of x [..., in of this rank] -> [..., out of this rank]."""
        return self.raise_rank(linear(x, self.down))

    def raise_rank(self, inner: Tensor) -> Tensor:
        """Compute the update from what `down` gives, [..., rank] -> [..., out of this rank]."""
        return linear(inner if self.gates is None else inner * self.gates, self.up) * self.scale
