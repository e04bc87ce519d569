"""The options of mixers side by side, made of those of the mixers: a pattern alone says that they are. No torch here."""

from __future__ import annotations

from pydantic import Field

from amfm.model.config.options import MixerOptions, Weights


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

    def weights(self, hidden_size: int, *, is_guided: bool) -> Weights | None:
        """Their sum, where all are counted in closed form."""
        found = [each.weights(hidden_size, is_guided=is_guided) for each in self.branches]
        known = [weights for weights in found if weights is not None]
        return None if len(known) < len(found) else Weights(*map(sum, zip(*known, strict=True)))

    def sequence_flops(self, sequence_length: int) -> float:
        """Their sum."""
        return sum(each.sequence_flops(sequence_length) for each in self.branches)
