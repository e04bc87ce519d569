"""What configurations know of attention with relative positions; read without torch."""

from __future__ import annotations

from pydantic import Field

from amfm.model.config.kinds import Kind
from amfm.model.config.options import Axis, MixerOptions


class RelativeAttentionOptions(MixerOptions):
    """Softmax attention whose scores add what the query says to a learned vector of the distance."""

    num_heads: int = Field(gt=0, description="Heads.")
    head_dim: int = Field(64, gt=0, description="Channels per head.")
    max_distance: int = Field(
        512, gt=0, description="Distances with their own vector; what is further shares the last one."
    )

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Heads."""
        return {"tensor": {"num_heads": self.num_heads}}


SPEC = Kind(
    "relative_attention",
    "amfm_relative_attention.mixer:RelativeAttentionMixer",
    RelativeAttentionOptions,
    refuses={"context": "its scores of whole rows are made on one rank"},
)
