"""What the options of every kind of block answer: rules, ranks, kernels and pruning ask nothing else. No torch here.

A kind of block is its options (a frozen section of the configuration, derived from `MixerOptions`), its mixer
(model/mixers/interface.py) and one row of the table of kinds (kinds.py). Whoever wants to know something of a block asks its
options and never its letter, so that a new kind is known everywhere once its options answer. Every method has a default,
which is the answer of a block to which the question does not apply.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from amfm.kernels.common.limits import ScanLimits
from amfm.model.config.section import Section
from amfm.model.config.structure import FeedForwardPart

OutputGate = Literal["none", "element", "head"]
Axis = Literal["tensor", "expert_tensor", "expert"]


@dataclass(frozen=True)
class Prunable:
    """Groups of a mixer's weights that can go together.

    sizes: the settings that become smaller with them, the one that counts groups first, each with its units a group. dims: of
    each parameter that is divided into groups, by its name behind `place`, the dim, its period and the width of a group.
    rows: further tensors with one row per group. least: a setting that says how many must stay. rejected: rules, each
    with a fix, by which these options cannot lose such groups.
    """

    sizes: Mapping[str, int]
    count: int
    dims: Mapping[str, tuple[int, int, int]]
    place: str = ""
    rows: tuple[str, ...] = ()
    least: str | None = None
    refused: tuple[tuple[str, str], ...] = ()


class MixerOptions(Section):
    """The base of the options of a kind of block."""

    # Fields that change how a model is trained, and not what it computes.
    training_only: ClassVar[frozenset[str]] = frozenset(("chunk_size", "balance_loss_weight"))

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Fields (dotted inside of a section) that do not go with the others, each with the rule and a fix."""
        yield from ()

    def broken_widths(self, hidden_size: int) -> Iterator[tuple[str, str]]:
        """Fields that do not go with the width of the residual stream, likewise."""
        for part in self.feed_forwards():
            yield from part.broken_rules(hidden_size)

    def broken_training(self) -> Iterator[tuple[str, str, str]]:
        """Fields by which something would never be trained, each with the rule and a fix; a trained model is read."""
        yield from ()

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Sizes that the number of ranks of an axis must divide, by axis and field."""
        return {}

    def refuses(self) -> Mapping[str, str]:
        """Axes over which these options cannot be spread, with the reason; a kind's own are in its row of the table."""
        return {}

    def cut_or_copied(self) -> dict[str, int]:
        """Units, by field, that may be fewer than tensor ranks: one number must divide the other."""
        return {}

    def differs_by_block(self) -> bool:
        """Whether blocks of this kind have weights of different shapes; they are then counted one by one."""
        return False

    def wraps(self) -> str | None:
        """The kind inside, whose own options are read too."""
        return None

    def auxiliary_names(self) -> tuple[str, ...]:
        """The auxiliary losses that it adds in training."""
        return ()

    def routed_experts(self) -> int:
        """Experts among which its router chooses for each token, and whose choices it counts; 0: none."""
        return 0

    def rows_read(self) -> int:
        """Rows that a token looks up in its parameter `tables`, which nothing is multiplied by; 0: there is none."""
        return 0

    def lookback(self) -> tuple[int, str]:
        """Tokens before a context rank's segment that its first token reads, and the field that says so."""
        return 0, ""

    def scan(self) -> tuple[ScanLimits, int, tuple[int, int]] | None:
        """What its scan's Triton kernels take, tokens per chunk, and a head's state (rows, columns); None: not known,
        or no scan.
        """
        return None

    def refuse_native(self) -> str | None:
        """Why its block runs no C code on a CPU (`kernels.backend: native`): "" if there is none; None if it does."""
        return ""

    def qk_clip(self) -> str | None:
        """What QK-clip can do about its scores: "" where it bounds them, else why it cannot; None: no softmax of queries and keys."""
        return None

    def feed_forwards(self) -> tuple[FeedForwardPart, ...]:
        """The dense feed-forwards inside, whose matrices may be factored."""
        return ()

    def prunable(self, groups: str) -> Prunable | None:
        """The groups of weights of this name (channels, experts, heads) that it can lose; None if it has none."""
        return None


QK_NORM_AND_CLIP = "has qk_norm, by which the length of queries has no effect on its scores"


def must_divide(field: str, part: int, whole_key: str, whole: int) -> Iterator[tuple[str, str]]:
    """Yield a broken rule with the divisors to choose from where `part` does not divide `whole`."""
    if whole % part:
        divisors = [number for number in range(1, whole + 1) if whole % number == 0]
        shown = ", ".join(map(str, divisors[:12])) + (", ..." if len(divisors) > 12 else "")
        yield field, f"must divide {whole_key}={whole}; use one of {shown}"


def channel_dims(inner: int) -> dict[str, tuple[int, int, int]]:
    """`Prunable.dims` of the inner channels of a feed-forward: gate rows, then up rows, the same channel after `inner` rows."""
    return {"up_proj.weight": (0, inner, 1), "down_proj.weight": (1, inner, 1)}


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
