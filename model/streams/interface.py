"""What a kind of residual stream gives each block: the interface, next to the plain sum, which needs none.

Between blocks flow two tensors, residual and delta (block.py). Plainly their sum is the residual stream. A kind decides
itself what both hold: residual is [B, T, D] before the first block and may have more dimensions after T behind it, so that
rows and tokens are cut as before. Its section of the configuration (`ModelConfig.stream`) names its class and counts what a
pipeline stage sends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StreamReader(nn.Module):
    """What one block, or the final norm, reads of the stream, and how the block's output joins it.

    In a block: `add`, `forward`, the mixer, `leave`; before the final norm only `forward`, of both tensors as they come.
    """

    def add(self, residual: Tensor, delta_BTD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Join what can be joined before this block; the residual that it returns flows to the next block.

        Both are kept where the block is recomputed.
        """
        raise NotImplementedError

    def leave(self, y_BTD: Tensor, delta_BTD: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The delta after this block: its output y, with the delta that `add` returned; dtype: of the residual."""
        raise NotImplementedError

    def send(self, residual: Tensor, delta_BTD: Tensor) -> Tensor:
        """One tensor of both, for the next pipeline stage."""
        raise NotImplementedError

    def receive(self, sent: Tensor) -> tuple[Tensor, Tensor]:
        """Take apart what the stage before has sent."""
        raise NotImplementedError
