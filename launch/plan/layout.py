"""How a run lies on its ranks: sizes of all axes, and what each pipeline rank holds of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from launch.plan.activations import up_rows
from model.config.pattern import block_kind
from model.config.schema import ModelConfig
from model.flops import count_parameters
from model.pipeline_split import cut_pieces, pieces_of_rank
from pretrain.config.schema import RunConfig
from pretrain.recompute import recomputed_letters


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of `ranks` ranks and rows a forward pass; the names are those of the `parallel` section."""

    ranks: int
    zero_stage: int
    micro_batch_size: int
    tensor: int = 1
    sequence_parallel: bool = False
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    schedule: str = "1f1b"
    recompute: frozenset[str] = frozenset()  # letters of the blocks that are computed again

    @classmethod
    def of(cls, config: RunConfig, ranks: int) -> Layout:
        """The layout that a configuration declares."""
        section = config.parallel
        return cls(
            ranks,
            section.zero_stage,
            config.train.micro_batch_size,
            section.tensor,
            section.sequence_parallel,
            section.expert,
            section.expert_tensor_size(),
            section.context,
            section.pipeline,
            section.virtual_stages,
            section.schedule,
            recomputed_letters(config),
        )

    @property
    def data(self) -> int:
        """Ranks over which micro-batches are spread."""
        return max(1, self.ranks // (self.tensor * self.context * self.pipeline))

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.ranks // self.pipeline

    @property
    def dense_sharers(self) -> int:
        """Ranks with the same dense weights: ZeRO spreads over them."""
        return self.data * self.context

    @property
    def expert_sharers(self) -> int:
        """Ranks with the same experts."""
        if self.expert == 1:
            return self.dense_sharers
        return max(1, self.ranks // (self.pipeline * self.expert * self.expert_tensor))

    @property
    def width_ranks(self) -> int:
        """Ranks among which an expert's inner width is cut; without an expert axis the tensor ranks cut it."""
        return self.expert_tensor if self.expert > 1 else self.tensor

    @property
    def stream_ranks(self) -> int:
        """Tensor ranks among which the tokens between blocks are cut."""
        return self.tensor if self.sequence_parallel else 1

    def micro_batches(self, config: RunConfig) -> int:
        """Micro-batches of a data rank and step."""
        return max(1, config.train.global_batch_size // (self.micro_batch_size * self.data))

    def tokens(self, config: RunConfig) -> int:
        """Tokens of a micro-batch on one context rank."""
        return self.micro_batch_size * config.train.sequence_length // self.context

    def settings(self) -> dict[str, Any]:
        """The `parallel` section that asks for it."""
        section: dict[str, Any] = {
            "tensor": self.tensor,
            "sequence_parallel": self.sequence_parallel,
            "expert": self.expert,
            "context": self.context,
            "pipeline": self.pipeline,
            "zero_stage": self.zero_stage,
        }
        if self.expert > 1:
            section["expert_tensor"] = self.expert_tensor
        if self.pipeline > 1:
            section |= {"schedule": self.schedule, "virtual_stages": self.virtual_stages}
        return section

    def train_settings(self, model: ModelConfig) -> dict[str, Any]:
        """What of the `train` section belongs to it: the rows of a micro-batch, and which blocks are computed again."""
        kinds = frozenset(model.letters)
        name = "none" if not self.recompute else "full" if self.recompute >= kinds else "selective"
        blocks = "".join(sorted(self.recompute)) if name == "selective" else ""
        return {"micro_batch_size": self.micro_batch_size, "recompute": name, "recompute_blocks": blocks}

    def describe(self) -> str:
        """The settings that are not at their smallest, as overrides write them."""
        parts = [
            f"{name}={str(value).lower()}"
            for name, value in self.settings().items()
            if name == "zero_stage" or value is True or value not in (1, False, "1f1b")
        ]
        again = [f"recompute={''.join(sorted(self.recompute))}"] if self.recompute else []
        return " ".join([*parts, f"micro_batch_size={self.micro_batch_size}", *again])


@dataclass(frozen=True)
class StageShare:
    """What one rank of a pipeline stage holds: its blocks, and parameters by how ZeRO spreads them."""

    stage: int
    letters: tuple[str, ...]
    dense: float
    routed: float
    has_embedding: bool
    has_head: bool
    largest_block: float

    @property
    def parameters(self) -> float:
        """All that the rank computes with."""
        return self.dense + self.routed

    def gradient_groups(self, layout: Layout) -> tuple[tuple[float, bool], ...]:
        """(parameters, whether they are experts spread over ranks) of all that is reduced over the same ranks."""
        if layout.expert == 1:
            return ((self.parameters, False),)
        return ((self.dense, False), (self.routed, True))

    def share(self, layout: Layout) -> float:
        """Its part of the states that ZeRO spreads."""
        return self.dense / layout.dense_sharers + self.routed / layout.expert_sharers


def routed_parameters(model: ModelConfig) -> int:
    """Parameters of all routed experts of one block."""
    if model.moe is None:
        return 0
    moe = model.moe
    rows = up_rows(moe.expert_hidden_size, moe.activation) + moe.expert_hidden_size
    return moe.num_experts * rows * (moe.latent_size or model.hidden_size)


def held_by_stages(model: ModelConfig, layout: Layout, sequence_length: int) -> tuple[StageShare, ...]:
    """One rank of each pipeline stage. Norms and routers, which every tensor rank holds, count as cut: they are small."""
    # Of all that a layout says only what cuts the model: a search asks for the same shares again and again.
    cuts = Layout(
        0,
        0,
        1,
        tensor=layout.tensor,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        pipeline=layout.pipeline,
        virtual_stages=layout.virtual_stages,
    )
    return _held(model, cuts, sequence_length)


def distinct_stages(stages: tuple[StageShare, ...]) -> tuple[StageShare, ...]:
    """The first of the stages that hold the same: a later one needs no more memory, and no more time."""
    first: dict[object, StageShare] = {}
    for held in stages:
        first.setdefault((held.letters, held.has_embedding, held.has_head), held)
    return tuple(first.values())


@lru_cache(maxsize=1024)
def _held(model: ModelConfig, layout: Layout, sequence_length: int) -> tuple[StageShare, ...]:
    letters = model.letters
    counts = count_parameters(model)
    number = {letter: letters.count(letter) for letter in letters}
    whole = {letter: counts.total_by_kind[block_kind(letter)] / number[letter] for letter in number}
    routed = {letter: routed_parameters(model) if letter == "E" else 0 for letter in number}
    table = model.vocab_size * model.hidden_size
    cut = cut_pieces(model, layout.pipeline * layout.virtual_stages, sequence_length)
    held = []
    for stage in range(layout.pipeline):
        pieces = pieces_of_rank(cut, stage, layout.pipeline)
        own = tuple(letters[index] for piece in pieces for index in piece.blocks)
        is_first, is_last = any(piece.is_first for piece in pieces), any(piece.is_last for piece in pieces)
        tables = table * (is_first or (is_last and model.tie_embeddings))
        tables += table * (is_last and not model.tie_embeddings) + model.hidden_size * is_last
        dense = sum(whole[letter] - routed[letter] for letter in own)
        experts = sum(routed[letter] for letter in own)
        largest = max((whole[letter] for letter in own), default=0.0)
        held.append(
            StageShare(
                stage,
                own,
                (dense + tables) / layout.tensor,
                experts / (layout.expert * layout.width_ranks),
                is_first,
                is_last,
                largest / layout.tensor,
            )
        )
    return tuple(held)
