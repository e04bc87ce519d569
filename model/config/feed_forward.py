"""The options of a dense feed-forward. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from amfm.model.config.options import Axis, MixerOptions, Prunable, channel_dims
from amfm.model.config.structure import Activation, FeedForwardPart, LinearKind, Structure, broken_limit


class FeedForwardConfig(MixerOptions):
    """Dense feed-forward; letter `-` (Hunyuan: `D`)."""

    hidden_size: int = Field(gt=0, description="Inner width.")
    activation: Activation = Field(
        "squared_relu",
        description="`swiglu` is gated and has a third matrix, `swiglu_oai` is that of gpt-oss, gate sigmoid(1.702 gate) (up + 1); `squared_relu` is not gated.",
    )
    activation_limit: float | None = Field(
        None,
        gt=0,
        description="Gate at most this, and up between its negative and this, before they are multiplied: 7 in gpt-oss, 10 in DeepSeek-V4; null: no limit. Gated activations alone.",
    )
    linear_kind: LinearKind = Field(
        "dense",
        description="Form of the matrices: products of two factors, `lowrank` (linear_rank), `blockshuffle` (linear_blocks) or `blockdense` (both); docs/structure.md.",
    )
    linear_rank: int | None = Field(
        None, gt=0, description="Numbers per token between the factors; lowrank, blockdense."
    )
    linear_blocks: int | None = Field(
        None,
        ge=2,
        description="Blocks of a block-diagonal factor; blockshuffle, blockdense. Tensor ranks must divide it.",
    )

    def structure(self) -> Structure:
        """Form of the matrices."""
        return Structure(self.linear_kind, self.linear_rank, self.linear_blocks)

    def feed_forwards(self) -> tuple[FeedForwardPart, ...]:
        """Itself."""
        return (FeedForwardPart("", "", self.structure(), self.hidden_size, self.activation),)

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Only gated units have a limit."""
        yield from broken_limit(self.activation, self.activation_limit)

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Channels, and blocks of factors."""
        blocks = {} if self.linear_blocks is None else {"linear_blocks": self.linear_blocks}
        return {"tensor": {"hidden_size": self.hidden_size} | blocks}

    def prunable(self, groups: str) -> Prunable | None:
        """Inner channels."""
        if groups != "channels":
            return None
        return Prunable({"hidden_size": 1}, self.hidden_size, channel_dims(self.hidden_size))
