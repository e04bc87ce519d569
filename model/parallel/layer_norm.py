"""The layer norm of models that have one instead of root-mean-square norms (`model.norm`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amfm.kernels.norm.layer_norm import layer_norm
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import RMSNorm, stream_shard


class LayerNorm(RMSNorm):
    """Layer norm of the residual stream (Ba et al. 2016, arXiv 1607.06450, section 3), with the interface of the other norm."""

    def __init__(self, size: int, epsilon: float, backend: str, groups: ProcessGroupCollection) -> None:
        super().__init__(size, epsilon, backend, groups)
        self.bias = nn.Parameter(torch.empty(size))
        self.shards["bias"] = stream_shard(groups)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size], keeping shape and dtype."""
        y: Tensor = layer_norm(x, self.weight, self.bias, self.epsilon, backend=self.backend)
        return y

    def add(self, delta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As of the other norm."""
        delta = delta.to(residual.dtype)
        y, total = layer_norm(delta, self.weight, self.bias, self.epsilon, residual=residual, backend=self.backend)
        return y, total
