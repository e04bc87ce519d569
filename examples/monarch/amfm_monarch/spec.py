"""What configurations know of Monarch's sequence mixer; read without torch."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from amfm.model.config.kinds import Kind
from amfm.model.config.options import MixerOptions


class MonarchOptions(MixerOptions):
    """A gated convolution as long as the text, by transforms that are two block-diagonal products each."""

    max_tokens: int = Field(
        gt=1, description="Longest document, in training and decoding; at least train.sequence_length."
    )
    filter_size: int = Field(64, gt=0, description="Hidden units of the network that computes the kernels.")
    bands: int = Field(8, gt=0, description="Frequencies of the place that it reads, a sine and a cosine each.")

    def broken_widths(self, hidden_size: int) -> Iterator[tuple[str, str]]:
        """The highest frequency turns by at most half a circle a token."""
        if self.bands > self.max_tokens // 2:
            yield "bands", f"must be at most half of max_tokens={self.max_tokens}; lower it"


SPEC = Kind(
    "monarch",
    "amfm_monarch.mixer:MonarchMixer",
    MonarchOptions,
    refuses={"context": "its transforms need whole rows, which do not pass between ranks yet"},
)
