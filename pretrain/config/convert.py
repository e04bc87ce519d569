"""The section of `amfm convert`: which model gets which blocks, and how long each stage trains. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from amfm.model.config.lora_mixer import LoraMixerConfig, Projection
from amfm.model.config.section import Section

StageName = Literal["transfer", "tune", "tune-window", "tune-teacher"]


class TransferConfig(Section):
    """First stage: the new weights of each block learn to reproduce its softmax attention; nothing else is trained."""

    steps: int = Field(gt=0, description="Optimizer steps.")
    learning_rate: float = Field(1e-2, gt=0, description="Peak rate.")
    scale: float = Field(1000.0, gt=0, description="Factor on the mean squared distance of the outputs.")


class RoutingConfig(Section):
    """Several updates of each projection, of which a router chooses some for each token (LoRA-Mixer)."""

    num_experts: int = Field(ge=2, description="Updates of each projection.")
    top_k: int = Field(2, gt=0, description="Updates per token; at most num_experts.")
    balance_weight: float = Field(0.01, ge=0, description="Weight of the loss that balances the router.")
    hard_from_step: int | None = Field(
        None,
        gt=0,
        description="Steps of tuning in which all updates count, by the softmax of the router, before only the top_k count; none: the top_k from the first step.",
    )


class TuneConfig(Section):
    """Second stage: the language model's loss trains the new weights, and low-rank updates of the projections."""

    steps: int = Field(gt=0, description="Optimizer steps; the two controls train as long.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak rate.")
    rank: int = Field(8, gt=0, description="Rank of the updates.")
    alpha: float = Field(16.0, gt=0, description="Updates count alpha / rank times.")
    targets: tuple[Projection, ...] = Field(
        ("q", "k", "v", "o"), min_length=1, description="Projections with an update."
    )
    routing: RoutingConfig | None = Field(
        None,
        description="Choose among several updates, which then stay in the result; none: one, merged into the weights.",
    )

    def routed(self) -> LoraMixerConfig | None:
        """The model's section of the updates that a router chooses among."""
        if self.routing is None:
            return None
        own = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets}
        return LoraMixerConfig(**self.routing.model_dump(), **own)


class ConvertConfig(Section):
    """Conversion of a trained model's softmax attention to a mixer of fixed state: `amfm convert` (docs/conversion.md)."""

    teacher: str = Field(
        description="The trained model: a run, a checkpoint or an import. `model` describes it, and also has the options of the new mixer."
    )
    to: str = Field("window_linear", description="The mixer that attention becomes; its options are in model.mixers.")
    blocks: tuple[int, ...] | None = Field(
        None, description="Blocks to convert, by their number in the pattern from 0; none: every attention block."
    )
    keep: tuple[int, ...] = Field((), description="Attention blocks that are kept; instead of blocks.")
    transfer: TransferConfig | None = Field(
        None, description="Of window_linear with weights of its own; none: no such stage."
    )
    tune: TuneConfig = Field(description="Of every conversion, and of its controls.")
    stage: StageName | None = Field(
        None, description="Set by `amfm convert` in the runs of its stages, below run.dir; leave it out."
    )

    def own_losses(self) -> tuple[str, ...]:
        """Auxiliary losses that blocks give in this stage alone."""
        return ("transfer",) if self.stage == "transfer" else ()
