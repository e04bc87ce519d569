"""The options of mixers side by side, made of those of the mixers: a pattern alone says that they are. No torch here."""

from __future__ import annotations

from pydantic import Field

from amfm.model.config.options import MixerOptions


class ParallelOptions(MixerOptions):
    """Sequence mixers that read one norm and are added. Rules, ranks and limits are those of each mixer's own section."""

    names: tuple[str, ...] = Field(description="Kinds of the mixers, in order.")
    branches: tuple[MixerOptions, ...] = Field(description="Their options.")

    def auxiliary_names(self) -> tuple[str, ...]:
        """Those of all, each once."""
        return tuple(dict.fromkeys(name for each in self.branches for name in each.auxiliary_names()))

    def lookback(self) -> tuple[int, str]:
        """The longest."""
        return max(each.lookback() for each in self.branches)
