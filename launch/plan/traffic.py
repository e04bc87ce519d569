"""The bytes that ranks hand to collectives in a training step, by formula: what a layout costs before it is run.

Sums over all ranks. Letters: B rows of a micro-batch, T tokens of one on a context rank, D hidden size, K choices a token,
t, c, p, e, x the tensor, context, pipeline, expert and expert-tensor ranks. A term that a group of one rank would send
does not occur.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from launch.plan.context_traffic import exchanged_windows, handed_states
from model.config.schema import MoeConfig
from model.hybrid import HybridModel
from model.moe.balance import auxiliary_names
from model.parallel.groups import AXES, ProcessGroupCollection
from model.parallel.shards import parameter_shards
from model.pipeline_split import cut_pieces, pieces_of_rank
from pretrain.config.schema import RunConfig
from pretrain.engine.optimizer import decays

Key = tuple[str, str, str]
FLOAT32, INT64 = 4, 8


class PlacedGroup:
    """A group as blocks see it while they are built: its size and this rank's place, without other ranks."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        """Ranks in the group."""
        return self._size

    def rank(self) -> int:
        """The place of the rank that is spoken of."""
        return self._rank


@dataclass(frozen=True)
class StepShape:
    """The sizes of a run's step on so many ranks."""

    config: RunConfig
    world_size: int

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world_size // self.config.parallel.pipeline

    @property
    def data_ranks(self) -> int:
        """Shares of the global batch."""
        return self.world_size // self.config.parallel.model_ranks()

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a data rank."""
        return self.config.train.global_batch_size // self.config.train.micro_batch_size // self.data_ranks

    @property
    def rows(self) -> int:
        """B."""
        return self.config.train.micro_batch_size

    @property
    def tokens(self) -> int:
        """B x T: tokens of a micro-batch on one context rank, all tensor ranks together."""
        return self.rows * self.config.train.sequence_length // self.config.parallel.context

    @property
    def dtype(self) -> str:
        """Of weights and activations."""
        return {"float32": "float32", "bf16": "bfloat16"}[self.config.train.precision]

    @property
    def width(self) -> int:
        """Bytes of one of their numbers."""
        return {"float32": 4, "bf16": 2}[self.config.train.precision]

    @property
    def letters(self) -> tuple[str, ...]:
        """Kinds of all blocks."""
        return tuple(self.config.model.letters)

    @cached_property
    def stages(self) -> list[HybridModel]:
        """What the first rank of each pipeline stage holds, without values."""
        section, model = self.config.parallel, self.config.model
        pieces = cut_pieces(model, section.num_pieces(), self.config.train.sequence_length)
        sizes = {
            "tp": section.tensor,
            "cp": section.context,
            "pp": section.pipeline,
            "ep": section.expert,
            "expt_tp": section.expert_tensor_size(),
            "embd": min(2, section.pipeline),
        }
        stages = []
        for stage in range(section.pipeline):
            groups = ProcessGroupCollection(**{axis: PlacedGroup(sizes.get(axis, 1)) for axis in AXES})
            groups.pp, groups.sequence_parallel = PlacedGroup(section.pipeline, stage), section.sequence_parallel
            own = pieces_of_rank(pieces, stage, section.pipeline)
            stages.append(HybridModel(model, groups, backend="torch", device="meta", pieces=own))
        return stages


def expected_bytes(config: RunConfig, world_size: int) -> dict[Key, int]:
    """Bytes handed in by all ranks in one step, by (axis, collective, type of number); terms of nothing are left out.

    Raises ValueError for settings whose bytes follow from more than the layout.
    """
    check_countable(config)
    shape = StepShape(config, world_size)
    totals: Counter[Key] = Counter()
    for terms in (tensor_terms, expert_terms, context_terms, pipeline_terms, gradient_terms, step_terms):
        for key, value in terms(shape).items():
            totals[key] += value
    return {key: value for key, value in sorted(totals.items()) if value}


def check_countable(config: RunConfig) -> None:
    """Refuse what has no formula here."""
    stage, moe = config.parallel.zero_stage, config.model.moe
    if stage == 3:
        raise ValueError(
            "parallel.zero_stage=3 has no formula: DeepSpeed gathers weights as its cache decides; use stage 0, 1 or 2"
        )
    if stage == 0 and config.train.precision == "bf16":
        raise ValueError("parallel.zero_stage=0 in bf16 has no formula: use stage 1 or 2, or train.precision=float32")
    if config.train.recompute != "none":
        raise ValueError(
            f"train.recompute={config.train.recompute} has no formula: a second forward pass ends where nothing more is "
            "needed of it; use none"
        )
    if moe is not None and moe.capacity_factor is not None and config.parallel.expert > 1:
        raise ValueError(
            f"model.moe.capacity_factor={moe.capacity_factor} has no formula with parallel.expert={config.parallel.expert}: "
            "how many choices travel depends on the router; remove it"
        )


def tensor_terms(shape: StepShape) -> Counter[Key]:
    """Regions in and out, embedding, loss: once each way a micro-batch, on every rank of the stage that has them."""
    section, model = shape.config.parallel, shape.config.model
    terms: Counter[Key] = Counter()
    if section.tensor == 1:
        return terms
    calls = shape.stage_ranks * shape.micro_batches
    share = shape.tokens // section.tensor
    moe = model.moe

    def cross(width: int, times: int, again: int = 0) -> None:
        """A stream of `width` numbers a token enters and leaves a region: half forward, half backward.

        Under sequence parallel projections gather it `again` in backward, rather than keep it.
        """
        if section.sequence_parallel:
            terms["tp", "all_gather", shape.dtype] += (times + again) * calls * share * width * shape.width
            terms["tp", "reduce_scatter", shape.dtype] += times * calls * shape.tokens * width * shape.width
        else:
            terms["tp", "all_reduce", shape.dtype] += times * calls * shape.tokens * width * shape.width

    # Without sequence parallel a crossing is one sum, forward where a region ends and backward where it begins.
    for letter in shape.letters:
        if letter != "E":
            cross(model.hidden_size, 2, again=1)
            continue
        assert moe is not None, "E blocks need model.moe"
        if moe.shared_expert_hidden_size:
            cross(model.hidden_size, 2, again=1)
        if section.expert == 1:
            cross(moe.latent_size or model.hidden_size, 2)
            terms["tp", "all_reduce", "float32"] += calls * shape.tokens * moe.top_k * FLOAT32
        elif not section.sequence_parallel:
            terms["tp", "all_gather", shape.dtype] += (
                2 * calls * share * (moe.latent_size or model.hidden_size) * shape.width
            )
            terms["tp", "all_gather", "float32"] += calls * share * moe.top_k * FLOAT32
        if section.sequence_parallel:
            terms["tp", "all_gather", "float32"] += calls * share * moe.num_experts * FLOAT32
    if model.mamba is not None and model.mamba.num_groups < section.tensor:
        norm = 2 * calls * shape.tokens * model.mamba.num_groups * FLOAT32
        terms["tp", "all_reduce", "float32"] += shape.letters.count("M") * norm
    # The embedding, whose sum goes one way, and the head, whose input's gradient does.
    cross(model.hidden_size, 2)
    terms["tp", "all_reduce", "float32"] += calls * 3 * shape.tokens * FLOAT32
    return terms


def expert_terms(shape: StepShape) -> Counter[Key]:
    """Every choice travels there and back, forward and backward, at the width of the experts, whatever the router does.

    With x expert-tensor ranks each row goes to all of them, and x parts of it come back.
    """
    section, moe = shape.config.parallel, shape.config.model.moe
    terms: Counter[Key] = Counter()
    if section.expert == 1 or moe is None:
        return terms
    blocks, beside = shape.letters.count("E"), section.expert_tensor_size()
    train = shape.config.train
    choices = train.global_batch_size * train.sequence_length * moe.top_k
    rows = 4 * blocks * choices * (moe.latent_size or shape.config.model.hidden_size) * shape.width
    numbers = blocks * shape.stage_ranks * shape.micro_batches * moe.num_experts * INT64
    terms["ep", "all_to_all", shape.dtype] = rows
    terms["ep", "all_to_all", "int64"] = numbers
    if beside > 1:
        terms["expt_tp", "all_to_all", shape.dtype] = beside * rows
        terms["expt_tp", "all_gather", "int64"] = numbers
    return terms


def context_terms(shape: StepShape) -> Counter[Key]:
    """Mamba2: states and windows of two segments a row, whatever their length; attention: keys and values; counts of routers."""
    section, model = shape.config.parallel, shape.config.model
    terms: Counter[Key] = Counter()
    ranks, calls = section.context, shape.stage_ranks * shape.micro_batches
    if ranks == 1:
        return terms
    if model.mamba is not None:
        blocks, sizes = shape.letters.count("M"), (model.mamba, shape.rows)
        terms["cp", "all_gather", "float32"] += blocks * calls * handed_states(*sizes, section.tensor)
        windows = exchanged_windows(*sizes, ranks, section.tensor, shape.width)
        terms["cp", "all_to_all", shape.dtype] += blocks * (calls // ranks) * windows
    if model.attention is not None:
        heads = max(1, model.attention.num_kv_heads // section.tensor)
        keys = shape.letters.count("*") * calls * 2 * shape.tokens * heads * model.attention.head_dim * shape.width
        terms["cp", "all_gather", shape.dtype] += keys
        terms["cp", "reduce_scatter", shape.dtype] += ranks * keys
    if model.moe is not None:
        counts = bool(model.moe.auxiliary_loss_weight) + shape.rows * bool(model.moe.sequence_loss_weight)
        terms["cp", "all_reduce", "int64"] += shape.letters.count("E") * calls * counts * model.moe.num_experts * INT64
    return terms


def pipeline_terms(shape: StepShape) -> Counter[Key]:
    """The stream to the next piece and its gradient back, of each micro-batch."""
    section, model = shape.config.parallel, shape.config.model
    tokens = shape.tokens // (section.tensor if section.sequence_parallel else 1)
    dtype, width = ("float32", FLOAT32) if model.residual_in_fp32 else (shape.dtype, shape.width)
    crossings = 2 * (section.num_pieces() - 1) * shape.stage_ranks * shape.micro_batches
    return Counter({("pp", "send", dtype): crossings * tokens * model.hidden_size * width})


def gradient_terms(shape: StepShape) -> Counter[Key]:
    """Once a step: partial gradients over their axis; whole ones over the ranks with the same weights, and weights back.

    DeepSpeed reduces in float32 and pads a parameter group to a multiple of twice the ranks that share its state.
    """
    section = shape.config.parallel
    same = {
        False: ("dp_cp", shape.stage_ranks // section.tensor),
        True: ("expt_dp", shape.stage_ranks // (section.expert * section.expert_tensor_size())),
    }
    terms: Counter[Key] = Counter()
    for model in shape.stages:
        held: Counter[tuple[bool, bool]] = Counter()
        for name, parameter, shard in parameter_shards(model):
            is_spread = shard.per_expert and section.expert > 1
            held[is_spread, decays(name, parameter.shape)] += parameter.numel()
            for axis in shard.partial:
                if getattr(model.groups, axis).size() > 1:
                    assert axis in ("tp", "embd"), f"no formula for partial gradients over {axis}"
                    terms[axis, "all_reduce", "float32"] += shape.stage_ranks * parameter.numel() * FLOAT32
                if axis == "embd" and getattr(model.groups, axis).size() > 1 and same[False][1] > 2:
                    # Over data ranks too, so that both ends of the pipeline get the same bits.
                    terms["dp_cp", "all_reduce", "float32"] += shape.stage_ranks * parameter.numel() * FLOAT32
            for cut in shard.cuts:
                size = getattr(model.groups, cut.axis).size()
                for segment, slices in zip(cut.segments, cut.slices(size)):
                    if slices < size:
                        numel = parameter.numel() // parameter.shape[cut.dim] * segment
                        terms[cut.axis, "all_reduce", "float32"] += shape.stage_ranks * numel * FLOAT32
        for (is_spread, _), numel in held.items():
            holders, ranks = same[is_spread]
            if ranks > 1:
                terms[holders, "all_reduce", "float32"] += shape.stage_ranks * numel * FLOAT32
                if section.zero_stage > 0:
                    padded = -(-numel // (2 * ranks)) * 2 * ranks
                    terms[holders, "all_gather", shape.dtype] += shape.stage_ranks // ranks * padded * shape.width
    return terms


def step_terms(shape: StepShape) -> Counter[Key]:
    """Counts of labels, the step's sums in float64, the agreed signal, the gradient norm, and in bf16 DeepSpeed's flag for
    infinities: a few numbers a rank."""
    config, world = shape.config, shape.world_size
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    terms: Counter[Key] = Counter()
    if world == 1:
        return terms
    if shape.data_ranks > 1:
        terms["dp", "all_reduce", "int64"] += world * INT64
    terms["world", "all_reduce", "float64"] += world * 8 * (2 + _num_router_sums(config.model.moe, shape))
    terms["world", "all_reduce", "int64"] += world * INT64
    if config.parallel.zero_stage > 0:
        terms["world", "all_reduce", "float32"] += world * FLOAT32
    elif model_ranks > 1:
        terms["mp", "all_reduce", "float32"] += world * FLOAT32
    if config.train.precision == "bf16":
        terms["dp_cp", "all_reduce", "uint8"] += world * (world > model_ranks)
        terms["mp", "all_reduce", "uint8"] += world * (model_ranks > 1)
    return terms


def _num_router_sums(moe: MoeConfig | None, shape: StepShape) -> int:
    blocks = shape.letters.count("E")
    return len(auxiliary_names(moe)) + blocks * moe.num_experts if moe is not None and blocks else 0
