"""What configurations know of SeqBoat; read without torch."""

from __future__ import annotations

from pydantic import Field

from amfm.kernels.common.limits import DIAG_LIMITS, ScanLimits
from amfm.model.config.kinds import Kind
from amfm.model.config.options import MixerOptions


class SeqBoatOptions(MixerOptions):
    """Moving averages for all tokens, attention among those that ask for it."""

    num_heads: int = Field(gt=0, description="Heads of the attention.")
    head_dim: int = Field(64, gt=0, description="Channels a head.")
    window: int = Field(64, gt=1, description="Active tokens that an active token sees, itself among them.")
    averages: int = Field(2, gt=0, description="Moving averages a channel of the stream.")
    capacity: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a row that may be active at most; later tokens stay out. Not in decoding.",
    )
    chunk_size: int = Field(
        64, gt=0, description="Tokens a chunk of the averages; changes speed and rounding, not meaning."
    )

    def scan(self) -> tuple[ScanLimits, int, tuple[int, int]] | None:
        """One number a channel and average."""
        return DIAG_LIMITS, self.chunk_size, (1, 1)


SPEC = Kind(
    "seqboat",
    "amfm_seqboat.mixer:SeqBoatMixer",
    SeqBoatOptions,
    refuses={
        "context": "its window counts the active tokens before, on whatever rank they are",
        "tensor": "whether a token is active is decided from all channels of the stream",
    },
)
