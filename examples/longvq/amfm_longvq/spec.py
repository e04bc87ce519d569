"""What configurations know of attention over codes; read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from amfm.kernels.common.limits import DECAY_LIMITS
from amfm.model.config.kinds import Kind
from amfm.model.config.mixer_options import HeadOptions


class LongVqOptions(HeadOptions):
    """Softmax attention to codes in place of keys: a state of num_codes x (value_head_dim + 1) numbers a head."""

    conv_kernel: Literal[0, 2, 3, 4] = Field(
        4, description="Width of the causal convolution over q, k, v and the gate; 0: none."
    )
    num_codes: int = Field(64, gt=1, description="Codes a head.")
    commit_weight: float = Field(
        0.1,
        ge=0,
        description="Of the loss that draws keys and their codes together; 0: none, and codes learn from scores alone.",
    )
    scan_limits = DECAY_LIMITS

    def state_shape(self) -> tuple[int, int]:
        """A row a code; the count of its keys beside the sum of their values."""
        return self.num_codes, self.value_dim() + 1

    def auxiliary_names(self) -> tuple[str, ...]:
        """The commitment, if it has a weight."""
        return ("commit",) if self.commit_weight else ()


SPEC = Kind("longvq", "amfm_longvq.mixer:LongVqMixer", LongVqOptions)
