"""One exchange of a stage's ranks, and what a region that tensor ranks share hands in where a stream enters or leaves it.

`exchanges/stage.py` adds them up for a pass, `blocks/` has those of each kind of block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amfm.launch.plan.layout import Layout
from amfm.pretrain.config.schema import RunConfig

FLOAT32, INT64 = 4, 8
DEEPSPEED_BUCKET_ELEMENTS = 200_000_000  # gradients of one reduction of DeepSpeed's own (pretrain/engine/engine.py)
BUCKET_ELEMENTS = 50_000_000  # gradients of one reduction under ZeRO 1 and 2, at least (pretrain/engine/engine.py)


@dataclass(frozen=True)
class Exchange:
    """Calls of one collective over one axis in one dtype, for a pipeline stage.

    `calls`: of each rank. `stage_bytes`: bytes handed in by all ranks of the stage together, over all of these calls.
    """

    axis: str
    collective: str
    dtype: str
    calls: int
    stage_bytes: float


def element_type(config: RunConfig) -> tuple[str, int]:
    """Name and bytes of the dtype that weights and activations have in the run's precision."""
    return {"float32": ("float32", 4), "bf16": ("bfloat16", 2)}[config.train.precision]


def crossing(config: RunConfig, layout: Layout, width: int, *, times: int, regathers: int = 0) -> Iterator[Exchange]:
    """A stream of `width` numbers per token enters or leaves a tensor region `times` times, backward passes included.

    Without sequence parallel a crossing is one sum: forward where a region ends, backward where it begins. With it a
    crossing is a gather and a scatter, and projections gather the residual stream again (`regathers` times) in backward rather than keep it.
    """
    dtype, size = element_type(config)
    whole = layout.stage_ranks * layout.tokens(config) * width * size
    if layout.sequence_parallel:
        gathers = times + regathers
        share = layout.stage_ranks * (layout.tokens(config) // layout.tensor) * width * size
        yield Exchange("tp", "all_gather", dtype, gathers, gathers * share)
        yield Exchange("tp", "reduce_scatter", dtype, times, times * whole)
    else:
        yield Exchange("tp", "all_reduce", dtype, times, times * whole)
