"""What configurations know of the Fourier head; read without torch."""

from __future__ import annotations

from pydantic import Field

from amfm.model.config.kinds import Kind
from amfm.model.config.options import MixerOptions


class FourierHeadOptions(MixerOptions):
    """A smooth density over a vocabulary whose tokens are bins in order."""

    training_only = MixerOptions.training_only | {"smoothness"}
    num_frequencies: int = Field(gt=0, description="Of the density; below half of model.vocab_size.")
    smoothness: float = Field(
        0.0,
        ge=0,
        description="Weight of the penalty on high frequencies (the paper's gamma, such as 1e-6); 0: none.",
    )

    def auxiliary_names(self) -> tuple[str, ...]:
        """The penalty, as a metric: its gradient is in the loss."""
        return ("smoothness",) if self.smoothness else ()


SPEC = Kind(
    "fourier_head",
    "amfm_fourier_head.head:FourierHead",
    FourierHeadOptions,
    refuses={"tensor": "its few coefficients are whole on every rank, and nothing sums their gradients"},
    mixes="logits",
)
