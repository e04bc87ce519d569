"""What configurations know of SeqBoat; read without torch."""

from __future__ import annotations

from typing import Literal

from amfm_mixers.options import DIAG_LIMITS
from pydantic import Field

from amfm.kernels.common.limits import ScanLimits
from amfm.model.config.kinds import Kind
from amfm.model.config.options import Axis, MixerOptions


class SeqBoatOptions(MixerOptions):
    """Moving averages for all tokens, a gated attention unit for those that ask for it."""

    inner_size: int = Field(gt=0, description="Channels of the unit's values and of their gate.")
    head_dim: int = Field(
        64, gt=0, description="Channels of its one head of queries and keys, which share a projection."
    )
    window: int = Field(64, gt=1, description="Active tokens that an active token sees, itself among them.")
    attention: Literal["softmax", "relu2"] = Field(
        "softmax", description="Its weights: softmax, or relu(q k / window + bias)^2."
    )
    averages: int = Field(2, gt=0, description="Moving averages per channel of the stream.")
    capacity: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a sequence that may be active at most; later tokens stay out. Not in decoding.",
    )
    chunk_size: int = Field(
        64, gt=0, description="Tokens per chunk of the averages; changes speed and rounding, not meaning."
    )

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Values and gates by channel; queries and keys are whole on every rank."""
        return {"tensor": {"inner_size": self.inner_size}}

    def auxiliary_names(self) -> tuple[str, ...]:
        """The share of tokens that ask for attention: a metric, without a gradient."""
        return ("active",)

    def scan(self) -> tuple[ScanLimits, int, tuple[int, int]] | None:
        """One number a channel and average."""
        return DIAG_LIMITS, self.chunk_size, (1, 1)


SPEC = Kind("seqboat", "amfm_seqboat.mixer:SeqBoatMixer", SeqBoatOptions)
