"""What configurations know of LSSL; read without torch."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from amfm.model.config.kinds import Kind
from amfm.model.config.mixer_options import HeadOptions


class LsslOptions(HeadOptions):
    """LSSL: a state space model with a whole matrix a head, the same at every token; head_dim counts state numbers."""

    trains_state: bool = Field(
        True, description="Learn matrix, input and time step of a head; false: they stay HiPPO's (LSSL-fixed)."
    )

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Nothing selects by content before the states."""
        if self.conv_kernel:
            yield "conv_kernel", "must be 0: the convolution's SiLU would not be linear; remove it"


SPEC = Kind("lssl", "amfm_s4d.lssl:LsslMixer", LsslOptions)
