"""What configurations know of S4D; read without torch."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.kernels.common.limits import DECAY_LIMITS
from amfm.model.config.kinds import Kind
from amfm.model.config.mixer_options import HeadOptions


class S4DOptions(HeadOptions):
    """S4D: a learned convolution, the same at every token; head_dim counts real and imaginary parts."""

    scan_limits = DECAY_LIMITS

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """States are complex, and nothing selects by content before them."""
        if self.head_dim % 2:
            yield "head_dim", "must be even: a complex state has two numbers; use another"
        if self.conv_kernel:
            yield "conv_kernel", "must be 0: the convolution's SiLU would not be linear; remove it"


SPEC = Kind("s4d", "amfm_s4d.mixer:S4DMixer", S4DOptions)
