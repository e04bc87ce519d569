"""What configurations know of LongVQ; read without torch."""

from __future__ import annotations

from pydantic import Field

from amfm.kernels.common.limits import DECAY_LIMITS, ScanLimits
from amfm.model.config.kinds import Kind
from amfm.model.config.options import Axis, MixerOptions


class LongVqOptions(MixerOptions):
    """Moving averages that choose what to attend to: exact places in a window, codes in place of keys before it."""

    num_heads: int = Field(1, gt=0, description="Heads.")
    head_dim: int = Field(64, gt=0, description="Channels of a head's queries and keys, which share a projection.")
    value_head_dim: int = Field(gt=0, description="Channels of a head's values and of their gate.")
    window: int = Field(64, gt=0, description="Keys that have a bias by distance, the token's own among them.")
    num_codes: int = Field(64, gt=1, description="Codes per head.")
    averages: int = Field(2, gt=0, description="Moving averages per channel of the stream.")
    commit_weight: float = Field(
        0.1,
        ge=0,
        description="Of the loss that draws keys and their codes together; 0: none, and codes learn only from scores.",
    )
    chunk_size: int = Field(
        64, gt=0, description="Tokens per chunk of the scans; changes speed and rounding, not meaning."
    )

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Heads."""
        return {"tensor": {"num_heads": self.num_heads}}

    def lookback(self) -> tuple[int, str]:
        """What window and late tokens read."""
        return self.window, "window"

    def auxiliary_names(self) -> tuple[str, ...]:
        """The commitment, if it has a weight."""
        return ("commit",) if self.commit_weight else ()

    def scan(self) -> tuple[ScanLimits, int, tuple[int, int]] | None:
        """A row a code; the count of its keys next to the sum of their values."""
        return DECAY_LIMITS, self.chunk_size, (self.num_codes, self.value_head_dim + 1)


SPEC = Kind("longvq", "amfm_longvq.mixer:LongVqMixer", LongVqOptions)
