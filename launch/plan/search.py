"""Candidate layouts for a number of ranks: the configuration's neighbours, or every combination of axes.

How it works: candidates are made in powers of two, filtered by the same rules that reject a configuration before
training (`pretrain/checks`), and handed to `plan.py` one by one. So the search proposes nothing that the run would
reject. Choices that promise nothing are left out (tensor parallelism across nodes, other ZeRO stages than 1 once
experts or pipeline stages are spread), which keeps thousands of ranks searchable. Recomputation is tried only where a
layout does not fit: it costs time and saves nothing but memory. Halves of spread experts (`overlap_experts`) are tried by
`ranking.py` where a layout fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, product

from amfm.launch.plan.layout import Layout
from amfm.launch.plan.left_out import Tally
from amfm.model.flops import block_flops
from amfm.pretrain.checks.blocks import graph_problems
from amfm.pretrain.checks.parallel import layout_problems, micro_batch_problems, pipeline_problems, world_problems
from amfm.pretrain.checks.stages import batch_problems
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import ParallelConfig, RunConfig

ZERO_STAGES = (0, 1, 2, 3)
MICRO_BATCH_SIZES = (1, 2, 4, 8)
# Schedules with the pieces of the pipeline that a rank holds.
SCHEDULES = (("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2), ("interleaved", 4), ("interleaved", 8))
LARGEST_CONTEXT = 16


def neighbour_layouts(config: RunConfig, ranks: int) -> Iterator[Layout]:
    """The configuration's axes with every ZeRO stage and every micro-batch size that divides a data rank's rows."""
    own = Layout.of(config, ranks)
    rows = config.train.global_batch_size // own.data
    for stage, size in product(ZERO_STAGES, [size for size in range(1, min(rows, 64) + 1) if rows % size == 0]):
        layout = replace(own, zero_stage=stage, micro_batch_size=size)
        if is_allowed(with_layout(config, layout), ranks):
            yield layout


def all_layouts(config: RunConfig, ranks: int, gpus_per_node: int, tally: Tally | None = None) -> Iterator[Layout]:
    """Every allowed combination of axes in powers of two, all pipeline schedules included.

    Tensor parallelism stays inside a node and always takes sequence parallelism with it. No block is recomputed yet, and no
    experts overlap: ranking adds that. `tally`: counts what is rejected.
    """
    model = config.model
    experts = model.moe.num_experts if model.moe is not None else 1
    for tensor, context, pipeline in product(
        powers_of_two(min(gpus_per_node, ranks)),
        powers_of_two(min(LARGEST_CONTEXT, ranks)),
        powers_of_two(min(64, ranks)),
    ):
        if ranks % (tensor * context * pipeline):
            continue
        for expert in powers_of_two(min(experts, ranks // pipeline)):
            if experts % expert or ranks % (expert * pipeline):
                continue
            # With experts or stages of its own a rank gains nothing from gathering weights as well.
            zero_stages = (1,) if expert * pipeline > 1 else ZERO_STAGES
            schedules = SCHEDULES if pipeline > 1 else SCHEDULES[:1]
            for stage, size, (schedule, pieces) in product(zero_stages, MICRO_BATCH_SIZES, schedules):
                layout = Layout(
                    ranks,
                    stage,
                    size,
                    tensor,
                    tensor > 1,
                    expert,
                    1 if expert > 1 else tensor,
                    context,
                    pipeline,
                    pieces,
                    schedule,
                )
                problem = find_problem(with_layout(config, layout), ranks)
                if problem is None:
                    yield layout
                elif tally is not None:
                    tally.refuse(layout, problem)


def recomputed(config: RunConfig, layout: Layout) -> Iterator[Layout]:
    """The layout with ever more recomputation: none, one kind of block (fewest FLOPs first), all kinds.

    The first that fits is taken. A zero-bubble schedule cuts backward passes in two and recomputes nothing.
    """
    yield layout
    if layout.schedule == "zero_bubble":
        return
    letters = config.model.built_letters
    kinds = sorted(
        set(letters),
        key=lambda symbol: letters.count(symbol) * block_flops(config.model, symbol, config.train.sequence_length),
    )
    for symbol in kinds[: len(kinds) if len(kinds) > 1 else 0]:
        yield replace(layout, recompute=frozenset((symbol,)))
    yield replace(layout, recompute=frozenset(kinds))


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... up to and including `largest`."""
    return [1 << power for power in range(largest.bit_length()) if 1 << power <= largest]


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    """A copy of the configuration in this layout."""
    section = ParallelConfig.model_validate(layout.settings())
    train = config.train.model_copy(update=layout.train_settings(config.model))
    return config.model_copy(update={"parallel": section, "train": train})


def is_allowed(config: RunConfig, ranks: int) -> bool:
    """Whether a run that is one training stage obeys all rules of layouts for `ranks` ranks."""
    return find_problem(config, ranks) is None


def find_problem(config: RunConfig, ranks: int) -> Problem | None:
    """The first rule of layouts that a run of one training stage breaks on `ranks` ranks; None if it obeys all."""
    # The batch is shared evenly before anyone asks for micro-batches.
    rules = chain(world_problems(config, ranks), layout_problems(config), batch_problems(config, ranks))
    more = chain(micro_batch_problems(config, ranks), pipeline_problems(config), graph_problems(config))
    return next(chain(rules, more), None)
