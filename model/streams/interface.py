"""What a kind of residual stream gives each block: the interface, next to the plain sum, which needs none.

Between blocks flow two tensors, residual and delta (block.py). Plainly their sum is the residual stream. A kind decides
itself what both hold: residual is [B, T, D] before the first block and may have more dimensions after T behind it, so that
rows and tokens are cut as before. Its section of the configuration (model/config/streams.py) names its class and counts what
a pipeline stage sends.
"""

from __future__ import annotations

from torch import Tensor, nn


class StreamReader(nn.Module):
    """What one block, or the final norm, reads of the stream, and how the block's output joins it.

    In a block: `add`, `forward`, the mixer, `leave`; before the final norm only `forward`, of both tensors as they come.
    ZeRO 3 gathers parameters where a module is called: those that another method than `forward` reads are a module's inside.
    A module with parameters, in here or further inside, has `first_value` (init.py): a new model is the one whose stream is a sum.
    """

    def add(self, residual: Tensor, delta_BTD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Join what can be joined before this block; the residual that it returns flows to the next block.

        Both are kept where the block is recomputed.
        """
        raise NotImplementedError

    def leave(self, y_BTD: Tensor, residual: Tensor, delta_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Residual and delta after this block, of its output y and of both as `add` returned them.

        The delta is a tensor [B, T, any width]; one of no width where the residual has all.
        """
        raise NotImplementedError

    def send(self, residual: Tensor, delta_BTD: Tensor) -> Tensor:
        """One tensor of both, for the next pipeline stage."""
        raise NotImplementedError

    def receive(self, sent: Tensor) -> tuple[Tensor, Tensor]:
        """Take apart what the stage before has sent."""
        raise NotImplementedError
