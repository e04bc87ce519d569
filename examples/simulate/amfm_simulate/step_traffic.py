"""Expected collective traffic of a training step, in bytes handed in by all ranks.

How it works: the exchanges of passes and of whole gradients are those of amfm's `exchanges/stage.py`, which the plan times too,
added up over stages and micro-batches. Only what a built model knows is added here: gradients that are partial sums
over an axis, and the parameter groups that ZeRO pads one by one. So are the few numbers that end a step. Tests count the same
bytes in a real step (`tests/launch/plan/test_real_traffic.py`); they agree to the byte, or the formula is wrong. Cases whose bytes
depend on more than the layout (a router's choices, DeepSpeed's cache) are rejected rather than approximated.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from amfm.launch.plan.blocks.expert_traffic import static_slots
from amfm.launch.plan.exchange import BUCKET_ELEMENTS, FLOAT32, INT64, Exchange
from amfm.launch.plan.exchanges.stage import pass_exchanges, reduction_exchanges
from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.model.config.moe import MoeConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import AXES, ProcessGroupCollection
from amfm.model.parallel.shards import parameter_shards
from amfm.model.pipeline_split import cut_pieces, pieces_of_rank
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.optimizer import group_parameters
from amfm.pretrain.monitor.signals import WATCHED

Key = tuple[str, str, str]

# What only this rank knows at the end of a step, in pretrain/step_sums.py: signals, whether it saves, damaged samples.
STATUS_NUMBERS = len(WATCHED) + 2


def expected_bytes(config: RunConfig, world_size: int) -> dict[Key, int]:
    """Bytes handed in by all ranks in one step, by (axis, collective, dtype); zero entries are left out.

    Raises ValueError for settings whose bytes follow from more than the layout.
    """
    layout = Layout.of(config, world_size)
    check_exact(config, layout)
    totals: Counter[Key] = Counter()
    for stage in range(layout.pipeline):
        totals.update(stage_bytes(config, layout, stage))
    return {key: value for key, value in sorted(totals.items()) if value}


def stage_bytes(config: RunConfig, layout: Layout, stage: int) -> Counter[Key]:
    """Bytes handed in by all ranks of one pipeline stage in one step, of a layout that `check_countable` passed.

    Where rows to experts depend on the router (`depends_on_router`), theirs are expected ones.
    """
    totals: Counter[Key] = Counter()

    def add(exchange: Exchange, times: int = 1) -> None:
        totals[exchange.axis, exchange.collective, exchange.dtype] += times * int(exchange.stage_bytes)

    held = held_by_stages(config.model, layout, config.train.sequence_length)[stage]
    for exchange in pass_exchanges(config, layout, held):
        add(exchange, layout.micro_batches(config))
    for exchange in gradient_exchanges(config, layout, built_stage(config, stage)):
        add(exchange)
    for exchange in step_exchanges(config, layout):
        add(exchange)
    return totals


def check_countable(config: RunConfig, layout: Layout) -> None:
    """Reject settings whose traffic has no closed formula. Raises ValueError with the reason and a fix."""
    stage, moe = config.parallel.zero_stage, config.model.moe
    if stage == 3:
        raise ValueError(
            "parallel.zero_stage=3 has no formula: DeepSpeed gathers weights as its cache decides; use stage 0, 1 or 2"
        )
    if stage == 0 and config.train.precision == "bf16" and layout.tensor * layout.pipeline > 1:
        raise ValueError(
            "parallel.zero_stage=0 in bf16 has no formula with tensor or pipeline ranks: use stage 1 or 2, or "
            "train.precision=float32"
        )
    if config.train.recompute != "none" and max(layout.tensor, layout.expert, layout.context) > 1:
        raise ValueError(
            f"train.recompute={config.train.recompute} has no formula with tensor, expert or context ranks: a second forward "
            "pass ends if nothing more is needed of it; use none"
        )
    if config.optimizer.matrix_settings() is not None:
        raise ValueError(
            f"optimizer.kind={config.optimizer.kind} has no formula: how much is sent depends on who owns which matrix; use adamw, whose passes "
            "and reductions send the same"
        )
    is_limited = moe is not None and moe.capacity_factor is not None and config.parallel.expert > 1
    if moe is not None and is_limited and static_slots(config, layout) is None:
        raise ValueError(
            f"model.moe.capacity_factor={moe.capacity_factor} has no formula with parallel.expert={config.parallel.expert}: "
            "how many choices are sent depends on the router; remove it"
        )
    if config.model.num_depths and config.model.prediction.detach:
        raise ValueError(
            "model.mtp.detach=true has no formula: a backward pass ends if nothing more is needed of it; use false"
        )


def depends_on_router(config: RunConfig, layout: Layout) -> bool:
    """Whether how many rows are sent to experts depends on which the router chooses: not where they are in slots or places."""
    moe = config.model.moe
    if (
        moe is None
        or layout.expert == 1
        or static_slots(config, layout) is not None
        or layout.expert_buffer_factor is not None
    ):
        return False
    return not has_certain_ranks(moe, layout.expert)


def has_certain_ranks(moe: MoeConfig, expert_ranks: int) -> bool:
    """Whether a token's choices are on equally many ranks whatever a router chooses.

    So they do with one choice, with one expert per rank, and with this many choices that no rank is left out.
    """
    held = moe.num_experts // expert_ranks
    return moe.top_k == 1 or held == 1 or moe.top_k > moe.num_experts - held


def check_exact(config: RunConfig, layout: Layout) -> None:
    """Reject what `check_countable` does, and what has only expected bytes. Raises ValueError with reason and fix."""
    check_countable(config, layout)
    moe = config.model.moe
    if moe is not None and depends_on_router(config, layout):
        raise ValueError(
            f"model.moe.top_k={moe.top_k} of {moe.num_experts} experts has no formula with parallel.expert={layout.expert}: "
            "a token's row is sent once to each rank that it has experts on, and on how many depends on the router; count "
            f"with model.moe.num_experts={layout.expert}, or top_k=1 and normalize_probabilities=false"
        )


class PlacedGroup:
    """Stand-in for a process group while a model is built: a size and a rank, without other processes."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        """Ranks in the group."""
        return self._size

    def rank(self) -> int:
        """Rank of the pictured process in the group."""
        return self._rank


def built_stage(config: RunConfig, stage: int) -> HybridModel:
    """The model of the first rank of a pipeline stage, on the meta device (no values, no memory)."""
    section, model = config.parallel, config.model
    length = config.train.sequence_length
    pieces = cut_pieces(model, section.num_pieces(), length, section.balance, section.pipeline)
    sizes = {
        "tp": section.tensor,
        "cp": section.context,
        "pp": section.pipeline,
        "ep": section.expert,
        "expt_tp": section.expert_tensor_size(),
        "embd": min(2, section.pipeline),
    }
    groups = ProcessGroupCollection(**{axis: PlacedGroup(sizes.get(axis, 1)) for axis in AXES})
    groups.pp, groups.sequence_parallel = PlacedGroup(section.pipeline, stage), section.sequence_parallel
    own = pieces_of_rank(pieces, stage, section.pipeline)
    # On the meta device a model of any size is built in a moment; only shapes and shards are read.
    return HybridModel(model, groups, backend="torch", device="meta", pieces=own)


def gradient_exchanges(config: RunConfig, layout: Layout, model: HybridModel) -> list[Exchange]:
    """Gradient exchanges of one stage, once per step.

    First partial sums over their own axis, then each parameter group's reduction over the ranks that share its weights.
    """
    ranks = layout.stage_ranks
    found: list[Exchange] = []
    partial: list[nn.Parameter] = []

    def reduce(axis: str, numel: int) -> None:
        found.append(Exchange(axis, "all_reduce", "float32", 1, ranks * numel * FLOAT32))

    for _, parameter, shard in parameter_shards(model):
        if shard.per_expert and layout.expert > 1:
            parameter.group_name = "spread"  # type: ignore[attr-defined]
        for axis in shard.partial:
            if getattr(model.groups, axis).size() == 1:
                continue
            assert axis in ("tp", "embd"), f"no formula for partial gradients over {axis}"
            reduce(axis, parameter.numel())
            partial.append(parameter)
            if axis == "embd" and layout.dense_sharers > 2:
                # Over data ranks too, so that both ends of the pipeline get bitwise identical results.
                reduce("dp_cp", parameter.numel())
        for cut in shard.cuts:
            size = getattr(model.groups, cut.axis).size()
            for segment, slices in zip(cut.segments, cut.slices(size)):
                if slices < size:
                    reduce(cut.axis, parameter.numel() // parameter.shape[cut.dim] * segment)
                    partial.append(parameter)
    # DeepSpeed pads every parameter group for itself, so groups are counted as the optimizer makes them.
    settings: dict[str, Any] = (
        {"bucket_elements": BUCKET_ELEMENTS, "apart": partial} if layout.zero_stage in (1, 2) else {}
    )
    apart = {id(parameter) for parameter in partial}
    for group in group_parameters(model, 0.0, **settings):
        numel = sum(parameter.numel() for parameter in group["params"])
        once = layout.zero_stage != 2 or any(id(parameter) in apart for parameter in group["params"])
        passes = 1 if once else layout.micro_batches(config)
        found += reduction_exchanges(config, layout, numel, is_spread="moe" in group, passes=passes)
    return found


def step_exchanges(config: RunConfig, layout: Layout) -> list[Exchange]:
    """The few numbers that the ranks of a stage agree on with all others at the end of a step.

    Counts of labels, the step's float64 sums with what only single ranks know, and the gradient norm.
    """
    world, model_ranks = layout.ranks, layout.tensor * layout.pipeline
    if world == 1:
        return []

    def reduce(axis: str, dtype: str, size: int) -> Exchange:
        return Exchange(axis, "all_reduce", dtype, 1, layout.stage_ranks * size)

    num_status = STATUS_NUMBERS + (layout.expert_buffer_factor is not None)
    found = [reduce("world", "float64", 8 * (2 + config.model.num_depths + _num_router_sums(config) + num_status))]
    if layout.data > 1:
        found.append(reduce("dp", "int64", INT64 * (1 + config.model.num_depths)))
    if layout.zero_stage > 0:
        found.append(reduce("world", "float32", FLOAT32))
    elif model_ranks > 1:
        found.append(reduce("mp", "float32", FLOAT32))
    return found


def _num_router_sums(config: RunConfig) -> int:
    """Numbers of the step's float64 sums that routers add: auxiliary losses, and the loads of each block's experts."""
    return len(config.model.auxiliary_names()) + sum(config.model.routed_experts().values())
