"""What configurations know of BiP's block; read without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from amfm.model.config.kinds import Kind
from amfm.model.config.options import MixerOptions


class BipOptions(MixerOptions):
    """A feed-forward of which a part of the channels computes, chosen by scores that are trained with the weights."""

    training_only = MixerOptions.training_only | {"gamma"}
    hidden_size: int = Field(gt=0, description="Inner width before any channel is left out.")
    activation: Literal["squared_relu", "swiglu"] = Field(
        "squared_relu", description="As model.feed_forward.activation."
    )
    keep: float = Field(gt=0, lt=1, description="Share of the channels of each block that compute.")
    gamma: float = Field(
        1.0,
        gt=0,
        description="Curvature of the lower problem: gamma / 2 times the squares of the weights joins the loss, and 1 / gamma weighs how trained weights answer a mask.",
    )

    def num_kept(self) -> int:
        """Channels that compute."""
        return round(self.keep * self.hidden_size)

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """At least one channel computes, and one does not."""
        if not 0 < self.num_kept() < self.hidden_size:
            yield "keep", f"leaves {self.num_kept()} of {self.hidden_size} channels; use another share"

    def auxiliary_names(self) -> tuple[str, ...]:
        """The squares of the weights."""
        return ("bip",)


SPEC = Kind(
    "bip",
    "amfm_bip.block:BipMixer",
    BipOptions,
    refuses={"tensor": "its scores choose among all channels of a block, which no rank would hold"},
    mixes="channels",
)
