"""The section of `amfm convert`: which model gets which blocks, and how long each stage trains. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from amfm.model.config.schema import LoraMixerConfig, Projection
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
    specialization_weight: float = Field(
        0.0, ge=0, description="Weight of the loss that makes a token's routing sharp once the load is balanced."
    )
    hard_from_step: int | None = Field(
        None,
        gt=0,
        description="Steps of tuning in which all updates count, by the softmax of the router, before only the top_k count; null: the top_k from the first step.",
    )
    updates: tuple[str, ...] = Field(
        (),
        description="Updates trained elsewhere, one for each of num_experts, which stay as they are while the router is trained: runs `convert-tune` or `convert-tune-teacher` of conversions without routing, or folders that peft wrote for an export of target own. null: updates of the conversion's own.",
    )


class TuneConfig(Section):
    """Second stage: the language model's loss trains the new weights, and low-rank updates of the projections."""

    steps: int = Field(gt=0, description="Optimizer steps; the two controls train as long.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak rate.")
    rank: int = Field(8, gt=0, description="Rank of the updates.")
    alpha: float = Field(16.0, gt=0, description="Updates count alpha / rank times.")
    targets: tuple[Projection, ...] = Field(
        ("q", "k", "v", "o"),
        min_length=1,
        description="Projections with an update: `q`, `k`, `v`, `o` of attention, `in` and `out` of Mamba2 and of linear mixers.",
    )
    adapters: tuple[str, ...] = Field(
        (),
        description="Further updates, by the names that packages register, such as flora: of the same rank and alpha.",
    )
    routing: RoutingConfig | None = Field(
        None,
        description="Choose among several updates, which then stay in the result; null: one, merged into the weights.",
    )

    def routed(self) -> LoraMixerConfig | None:
        """The model's section of the updates that a router chooses among."""
        if self.routing is None:
            return None
        own = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets}
        return LoraMixerConfig(**self.routing.model_dump(exclude={"updates"}), **own)


class UpcycleConfig(Section):
    """Sparse upcycling: feed-forwards of a dense model become experts (Komatsuzaki et al. 2023, arXiv 2212.05055).

    Copies may be cut into slices of the inner width (He et al. 2024, arXiv 2410.07524): expert c * num_slices + g is slice
    g of copy c, and a token takes whole copies at first. Without noise and reset the model computes what the dense one does.
    """

    num_copies: int = Field(ge=2, description="Copies of each feed-forward; there are num_copies x num_slices experts.")
    num_slices: int = Field(
        1, gt=0, description="Experts that a copy is cut into along its inner width, which this must divide."
    )
    top_copies: int = Field(
        2, gt=0, description="Copies per token: model.moe.top_k becomes this times num_slices; at most num_copies."
    )
    router: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="How logits become scores; sigmoid comes with a balancing bias, which begins at 0."
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of the noise that is added to each expert's matrices, over that of the matrix.",
    )
    reset: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each expert's inner units that are drawn again, with mean and deviation of the matrix (Nakamura et al. 2025, arXiv 2502.19261).",
    )

    def is_exact(self) -> bool:
        """Whether the model computes what the dense one does."""
        return self.noise == 0 and self.reset == 0


class ConvertConfig(Section):
    """Conversion of a trained model's softmax attention to a mixer of fixed state, or of feed-forwards to experts: `amfm convert` (docs/conversion.md)."""

    teacher: str = Field(
        description="The trained model: a run, a checkpoint or an import. `model` describes it, and also has the options of the new mixer."
    )
    to: str = Field("window_linear", description="The mixer that attention becomes; its options are in model.mixers.")
    blocks: tuple[int, ...] | None = Field(
        None,
        description="Blocks to convert, by their number in the pattern from 0; null: every attention block (upcycle: every feed-forward).",
    )
    keep_blocks: tuple[int, ...] = Field((), description="Indices of attention blocks to keep; alternative to blocks.")
    upcycle: UpcycleConfig | None = Field(
        None, description="Make experts of the feed-forwards instead; nothing is trained, so without transfer and tune."
    )
    transfer: TransferConfig | None = Field(
        None, description="Of window_linear with its own weights; null: no such stage."
    )
    tune: TuneConfig | None = Field(None, description="Of every conversion of attention, and of its controls.")
    stage: StageName | None = Field(
        None, description="Set by `amfm convert` in the runs of its stages, below run.dir; leave it out."
    )

    def tuning(self) -> TuneConfig:
        """The settings of tuning, which every conversion of attention has."""
        assert self.tune is not None, "check_conversion asks for convert.tune"
        return self.tune

    def own_losses(self) -> tuple[str, ...]:
        """Auxiliary losses that blocks give only in this stage."""
        return ("transfer",) if self.stage == "transfer" else ()
