"""What configurations know of Maestro: its block, and the hook that ends ranks; read without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from amfm.model.config.kinds import Kind
from amfm.model.config.options import MixerOptions
from amfm.pretrain.config.hook_registry import HookOptions, HookSpec

if TYPE_CHECKING:
    from amfm.pretrain.config.schema import RunConfig


class MaestroOptions(MixerOptions):
    """A feed-forward of two low-rank matrices whose components are trained in order of importance."""

    training_only = MixerOptions.training_only | {"penalty", "orders"}
    hidden_size: int = Field(gt=0, description="Inner width.")
    activation: Literal["squared_relu", "swiglu"] = Field(
        "squared_relu", description="As model.feed_forward.activation."
    )
    rank: int = Field(gt=0, description="Components of each matrix at first.")
    ranks: tuple[tuple[int, int], ...] | None = Field(
        None,
        description="Of up and down of each block of the kind, in order, as the package's cut writes it; none: rank.",
    )
    orders: bool = Field(True, description="Compute each training step with a part of one matrix's components.")
    penalty: float = Field(
        0.0, ge=0, description="Weight of the group lasso on tails of components, which empties what is not needed."
    )

    def ranks_of(self, number: int) -> tuple[int, int]:
        """Ranks of up and down of a block."""
        return (self.rank, self.rank) if self.ranks is None else self.ranks[number]

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Ranks are those of components that are there."""
        if self.ranks is not None and any(not 0 < each <= self.rank for pair in self.ranks for each in pair):
            yield "ranks", f"must be in 1..rank={self.rank}; lower them, or raise rank"

    def broken_widths(self, hidden_size: int) -> Iterator[tuple[str, str]]:
        """A matrix has no more components than its smaller side."""
        if self.rank > min(hidden_size, self.hidden_size):
            yield "rank", f"must be at most {min(hidden_size, self.hidden_size)}, the smaller side; lower it"

    def differs_by_block(self) -> bool:
        """Where ranks are given by block."""
        return self.ranks is not None

    def auxiliary_names(self) -> tuple[str, ...]:
        """The lasso, if it has a weight."""
        return ("tails",) if self.penalty else ()


class CutOptions(HookOptions):
    """Ends the components of each matrix after the last that counts, while the run trains."""

    threshold: float = Field(
        0.01, gt=0, lt=1, description="A component counts from this share of its matrix's largest on."
    )
    start_step: int = Field(gt=0, description="Step after which components first end.")
    every_steps: int = Field(gt=0, description="Steps from one look to the next.")

    def broken_rules(self, config: RunConfig, steps: int) -> Iterator[tuple[str, str, str]]:
        """There are such blocks, and steps for it."""
        if SPEC.symbol not in config.model.letters:
            yield "start_step", f"ends ranks of {SPEC.symbol}, and model.pattern has none", "remove hooks.maestro"
        if self.start_step > steps:
            yield "start_step", f"is beyond the {steps} steps of the run", "lower it"


SPEC = Kind(
    "maestro",
    "amfm_maestro.block:MaestroMixer",
    MaestroOptions,
    refuses={"tensor": "its matrices are whole on every rank, so that their components can end"},
    mixes="channels",
)
HOOK = HookSpec("maestro", "amfm_maestro.hook:MaestroHook", CutOptions, interface=2)
