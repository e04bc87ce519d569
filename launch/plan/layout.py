"""A parallel layout: sizes of all axes, and what each pipeline rank holds of the model.

How it works: `Layout` is a plain value that a search can vary by the thousand; it mirrors the `parallel` section and
adds the rank count, micro-batch size and recomputed blocks. `StageShare` counts parameters that one rank of a pipeline
stage holds, from the same cut into pieces that training uses (`model/pipeline_split.py`), so that the plan and the run
cannot disagree about which blocks are where. Counts are cached by the fields that cut the model: the others do not
change them.

What Muon adds to a plan: the matrices that a pipeline stage holds, and the arithmetic of orthogonalising them once per step.

Read off a model on the meta device, from the list that the optimizer itself steps by (model/matrices.py), so that experts,
heads and segments count as they are. Matrices that tensor ranks cut count as cut evenly; those along whose short side they
are cut cost each rank more than that.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from itertools import cycle
from typing import Any, Literal

from amfm.model.config.schema import ModelConfig
from amfm.model.flops import block_parameters, count_weights, reader_parameters
from amfm.model.hybrid import HybridModel
from amfm.model.matrices import list_matrices
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.pipeline_split import cut_pieces, pieces_of_rank
from amfm.pretrain.config.optimizers import MuonConfig, PackageMatrices
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.muon.newton_schulz import cost
from amfm.pretrain.recompute import recomputed_letters


@dataclass(frozen=True)
class MatrixShare:
    """Of matrices of a rank of a stage, of routed experts and of the rest: numbers, FLOPs to orthogonalise them, numbers that
    their optimizer keeps, and numbers that are sent to and from their owners.
    """

    dense: float = 0.0
    routed: float = 0.0
    dense_flops: float = 0.0
    routed_flops: float = 0.0
    dense_state: float = 0.0
    routed_state: float = 0.0
    dense_sent: float = 0.0
    routed_sent: float = 0.0

    def __add__(self, other: MatrixShare) -> MatrixShare:
        return MatrixShare(*(one + more for one, more in zip(astuple(self), astuple(other))))

    def divided(self, dense: float, routed: float) -> MatrixShare:
        """The same spread over this many ranks."""
        return MatrixShare(*(value / ranks for value, ranks in zip(astuple(self), cycle((dense, routed)))))


NO_MATRICES = MatrixShare()


def count_matrices(
    model: ModelConfig, letters: tuple[str, ...], muon: MuonConfig | PackageMatrices | None
) -> MatrixShare:
    """Count the matrices of these blocks, whole; none without Muon."""
    if muon is None:
        return NO_MATRICES
    of_block = _by_letter(model, muon)
    return sum((of_block[symbol] for symbol in letters), start=NO_MATRICES)


@lru_cache(maxsize=16)
def _by_letter(model: ModelConfig, muon: MuonConfig | PackageMatrices) -> dict[str, MatrixShare]:
    """Matrices of one block of each symbol of the pattern."""
    groups = single_rank_groups()
    built = HybridModel(model, groups, backend="torch", device="meta")
    # The first block of a symbol stands for all of them, in MTP layers too.
    places = [f"blocks.{index}" for index in range(len(model.letters))]
    places += [f"mtp.0.blocks.{index}" for index in range(len(model.parsed_pattern.depth_letters))]
    letters: dict[str, str] = {}
    for place, symbol in zip(places, model.built_letters):
        if symbol not in letters.values():
            letters[place] = symbol
    found = dict.fromkeys(model.built_letters, NO_MATRICES)
    for stack in list_matrices(built, groups, per_head=muon.per_head):
        block = stack.name.partition(".mixer.")[0]
        if block not in letters:
            continue
        flops, numel = float(muon.rounds * stack.count * cost(stack.shape)), float(stack.numel)
        kept = float(stack.count * sum(math.prod(shape) for shape in muon.state_shapes(*stack.shape).values()))
        # An update and its result, or weights, gradient and new weights in the dtype of the master weights, twice as wide on GPUs.
        sent = (6.0 if muon.keeps_state_at_owners else 2.0) * numel
        share = [value for pair in zip((numel, flops, kept, sent), (0.0, 0.0, 0.0, 0.0)) for value in pair]
        if ".experts." in stack.name:
            share = [value for pair in zip(share[1::2], share[::2]) for value in pair]
        found[letters[block]] += MatrixShare(*share)
    return found


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes over `ranks` ranks, ZeRO stage, micro-batch rows and recomputation.

    Field names are those of the `parallel` section. `recompute` holds the letters of blocks that are recomputed in
    backward.
    """

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
    overlap_experts: bool | Literal["two_batch"] = False
    expert_buffer_factor: float | None = None
    balance: str = "chunks"

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
            section.overlap_experts,
            section.expert_buffer_factor,
            section.balance,
        )

    @property
    def data(self) -> int:
        """Data-parallel size: ranks over which micro-batches are spread."""
        return max(1, self.ranks // (self.tensor * self.context * self.pipeline))

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage, over all other axes."""
        return self.ranks // self.pipeline

    @property
    def dense_sharers(self) -> int:
        """Ranks that hold the same dense weights, over which gradients are reduced and ZeRO shards its states."""
        return self.data * self.context

    @property
    def expert_sharers(self) -> int:
        """Ranks that hold the same experts and reduce their gradients together."""
        if self.expert == 1:
            return self.dense_sharers
        return max(1, self.ranks // (self.pipeline * self.expert * self.expert_tensor))

    @property
    def width_ranks(self) -> int:
        """Ranks that split an expert's hidden units; without an expert axis the tensor ranks do."""
        return self.expert_tensor if self.expert > 1 else self.tensor

    @property
    def stream_ranks(self) -> int:
        """Tensor ranks that split the tokens of the residual stream: all with sequence parallelism, else 1."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def expert_parts(self) -> int:
        """Parts of a micro-batch whose rows are sent to experts on their own: halves where each overlaps with the
        other.
        """
        return 2 if self.overlap_experts is True else 1

    @property
    def sub_batches(self) -> int:
        """Parts of a micro-batch that pass each block on their own: two with two-batch overlap, else the micro-batch."""
        return 2 if self.overlap_experts == "two_batch" else 1

    def one_sub_batch(self) -> Layout:
        """The layout whose micro-batch is one sub-batch of this one; valid for the costs of blocks only."""
        if self.sub_batches == 1:
            return self
        return replace(self, micro_batch_size=self.micro_batch_size // self.sub_batches, overlap_experts=False)

    def micro_batches(self, config: RunConfig) -> int:
        """Micro-batches that a data rank accumulates in one step, at least 1."""
        return max(1, config.train.global_batch_size // (self.micro_batch_size * self.data))

    def tokens(self, config: RunConfig) -> int:
        """Tokens of a micro-batch on one context rank."""
        return self.micro_batch_size * config.train.sequence_length // self.context

    def settings(self) -> dict[str, Any]:
        """The `parallel` section that requests this layout, as plain values.

        `expert_tensor`, `overlap_experts` and `expert_buffer_factor` appear only with an expert axis, `schedule` and `virtual_stages` only with a pipeline.
        """
        section: dict[str, Any] = {
            "tensor": self.tensor,
            "sequence_parallel": self.sequence_parallel,
            "expert": self.expert,
            "context": self.context,
            "pipeline": self.pipeline,
            "zero_stage": self.zero_stage,
        }
        if self.expert > 1:
            section |= {"expert_tensor": self.expert_tensor, "overlap_experts": self.overlap_experts}
            section |= {} if self.expert_buffer_factor is None else {"expert_buffer_factor": self.expert_buffer_factor}
        if self.pipeline > 1:
            section |= {"schedule": self.schedule, "virtual_stages": self.virtual_stages}
            section |= {"balance": self.balance} if self.balance != "chunks" else {}
        return section

    def forwards(self, symbol: str) -> int:
        """How often a block of this symbol passes forward: twice where it is recomputed."""
        return 1 + (symbol in self.recompute)

    def train_settings(self, model: ModelConfig) -> dict[str, Any]:
        """The keys of `train` that the layout decides: micro-batch size and recomputation."""
        kinds = frozenset(model.built_letters)
        name = "none" if not self.recompute else "full" if self.recompute >= kinds else "selective"
        blocks = "".join(sorted(self.recompute)) if name == "selective" else ""
        return {"micro_batch_size": self.micro_batch_size, "recompute": name, "recompute_blocks": blocks}

    def describe(self) -> str:
        """The layout as one line of `key=value` overrides, without the values that are at their minimum."""
        parts = [
            f"{name}={str(value).lower()}"
            for name, value in self.settings().items()
            if name == "zero_stage" or value is True or value not in (1, False, "1f1b")
        ]
        recompute = [f"recompute={''.join(sorted(self.recompute))}"] if self.recompute else []
        return " ".join([*parts, f"micro_batch_size={self.micro_batch_size}", *recompute])


@dataclass(frozen=True)
class StageShare:
    """Parameters and blocks of one rank of a pipeline stage.

    `letters`: of the blocks that a micro-batch passes; the last stage has those of all its `depths` of multi-token
    prediction at the end, also where these share one module. `pieces`: the same by the pieces of the pipeline that the rank
    holds. `dense` and `routed` are kept apart because ZeRO shards them over different groups; `parts` has both of the
    embedding, of each block and of the head, in the module's order. `largest_block` (parameters) is what ZeRO-3 may gather
    beyond its limit of live parameters. `matrices`: those that Muon steps, none with AdamW. `routed_blocks`: how many of `letters`
    have a router. `indices`: of the main blocks in the model, in the order of `letters`.
    """

    stage: int
    letters: tuple[str, ...]
    dense: float
    routed: float
    has_embedding: bool
    has_head: bool
    largest_block: float
    parts: tuple[tuple[float, float], ...]
    pieces: tuple[tuple[str, ...], ...]
    matrices: MatrixShare = NO_MATRICES
    depths: int = 0
    routed_blocks: int = 0
    indices: tuple[int, ...] = ()

    @property
    def main_letters(self) -> tuple[str, ...]:
        """Letters but those of the depths."""
        return self.letters[: len(self.indices)]

    def narrow_letters(self, narrow: Collection[int]) -> tuple[str, ...]:
        """Letters of the blocks that make products by a recipe, `narrow` being the indices of all such blocks of the model."""
        return tuple(symbol for symbol, index in zip(self.letters, self.indices) if index in narrow)

    @property
    def embeddings(self) -> int:
        """Times that a micro-batch is embedded here: at the start, and for each MTP layer."""
        return self.has_embedding + self.depths

    @property
    def heads(self) -> int:
        """Times that a micro-batch passes the head here."""
        return self.has_head + self.depths

    @property
    def parameters(self) -> float:
        """All parameters that the rank computes with, dense and routed."""
        return self.dense + self.routed

    def gradient_groups(self, layout: Layout) -> tuple[tuple[float, bool], ...]:
        """(parameters, is_spread) of each set whose gradients are reduced over one group of ranks."""
        if layout.expert == 1:
            return ((self.parameters, False),)
        return ((self.dense, False), (self.routed, True))

    def share(self, layout: Layout) -> float:
        """Parameters of the shard that ZeRO leaves to this rank."""
        return self.dense / layout.dense_sharers + self.routed / layout.expert_sharers

    def own_matrices(self, layout: Layout) -> MatrixShare:
        """Of the matrices, what data ranks leave to this rank: to orthogonalise always, to hold where ZeRO spreads them."""
        return self.matrices.divided(layout.dense_sharers, layout.expert_sharers)


def count_routed(model: ModelConfig, letters: tuple[str, ...]) -> int:
    """Count the blocks whose router chooses among experts."""
    return sum(model.block_options(symbol).routed_experts() > 0 for symbol in letters)


def held_by_stages(
    model: ModelConfig, layout: Layout, sequence_length: int, muon: MuonConfig | PackageMatrices | None = None
) -> tuple[StageShare, ...]:
    """What one rank of each pipeline stage holds, in stage order; `muon`: settings of what steps whole matrices.

    Norms and routers, which every tensor rank holds whole, count as cut: they are small.
    """
    # Of all that a layout says only what cuts the model: a search asks for the same shares again and again.
    names = "tensor", "expert", "expert_tensor", "pipeline", "virtual_stages", "balance"
    cuts = Layout(0, 0, 1, **{name: getattr(layout, name) for name in names})
    return _held(model, cuts, sequence_length, muon)


def distinct_stages(stages: tuple[StageShare, ...], narrow: Collection[int] = ()) -> tuple[StageShare, ...]:
    """One stage for each distinct content, the first of them; `narrow`: indices of blocks with a recipe of low precision.

    Under 1F1B an earlier stage holds more micro-batches in flight than a later one with the same blocks, and takes as
    long.
    """
    first: dict[object, StageShare] = {}
    for held in stages:
        alike = held.letters, held.has_embedding, held.has_head, held.narrow_letters(narrow)
        first.setdefault(alike, held)
    return tuple(first.values())


@lru_cache(maxsize=1024)
def _held(
    model: ModelConfig, layout: Layout, sequence_length: int, muon: MuonConfig | PackageMatrices | None
) -> tuple[StageShare, ...]:
    """Shares of all pipeline stages; cached, so `layout` must hold nothing but what cuts the model."""
    letters, pattern = model.letters, model.parsed_pattern
    kinds = dict.fromkeys(model.built_letters)
    whole = {symbol: block_parameters(model, symbol)[0] for symbol in kinds}
    routed = {symbol: count_weights(model, symbol).routed for symbol in kinds}
    table, reader = model.vocab_size * model.hidden_size, reader_parameters(model)
    final_reader = reader_parameters(model, is_final=True)
    num_pieces = layout.pipeline * layout.virtual_stages
    cut = cut_pieces(model, num_pieces, sequence_length, layout.balance, layout.pipeline)
    held = []
    for stage in range(layout.pipeline):
        pieces = pieces_of_rank(cut, stage, layout.pipeline)
        indices = tuple(index for piece in pieces for index in piece.blocks)
        own = tuple(letters[index] for index in indices)
        is_first, is_last = any(piece.is_first for piece in pieces), any(piece.is_last for piece in pieces)
        depths = model.num_depths if is_last else 0
        # The last stage holds a copy of the table as its head where they are tied, and for MTP layers.
        embedding = table * (is_first or (is_last and (model.tie_embeddings or depths > 0)))
        head = table * (is_last and not model.tie_embeddings) + (model.hidden_size + final_reader) * is_last
        built = own + (model.built_letters[len(letters) :] if is_last else ())
        joining = (2 * model.hidden_size + 3) * model.hidden_size * (model.num_depth_modules if is_last else 0)
        width_ranks = layout.expert * layout.width_ranks
        parts = [(embedding / layout.tensor, 0.0)] if embedding else []
        dense = [whole[symbol] - routed[symbol] + reader * (place < len(own)) for place, symbol in enumerate(built)]
        parts += [(size / layout.tensor, routed[symbol] / width_ranks) for size, symbol in zip(dense, built)]
        parts += [(size / layout.tensor, 0.0) for size in (joining, head) if size]
        largest = max((whole[symbol] for symbol in built), default=0.0)
        by_piece = [tuple(letters[index] for index in piece.blocks) for piece in pieces]
        by_piece[-1] += depths * pattern.depth_letters
        held.append(
            StageShare(
                stage,
                own + depths * pattern.depth_letters,
                sum(size for size, _ in parts),
                sum(routed for _, routed in parts),
                is_first,
                is_last,
                largest / layout.tensor,
                tuple(parts),
                tuple(by_piece),
                count_matrices(model, built, muon).divided(layout.tensor, width_ranks),
                depths,
                count_routed(model, own + depths * pattern.depth_letters),
                indices,
            )
        )
    return tuple(held)
