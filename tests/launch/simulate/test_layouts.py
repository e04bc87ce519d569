"""Traced memory of ladder_20m in bf16 within 4% of the plan, one axis alone and several together.

Rows of 4,096 tokens, pipeline + 1 micro-batches of one row; the first rank of the first and of the last pipeline stage.
"""

import pytest

from launch.simulate.trace import trace_run
from tests.launch.plan.presets import H100, preset

ROWS = ("train.sequence_length=4096", "train.micro_batch_size=1", "train.global_batch_size=64")
SEQUENCE_PARALLEL = ("parallel.tensor=2", "parallel.sequence_parallel=true")
LAYOUTS = {
    "zero 0": ("parallel.zero_stage=0",),
    "zero 1": (),
    "zero 2": ("parallel.zero_stage=2",),
    "tensor": ("parallel.tensor=2",),
    "sequence": SEQUENCE_PARALLEL,
    "expert": ("parallel.expert=4",),
    "sequence, expert, expert tensor": (*SEQUENCE_PARALLEL, "parallel.expert=2", "parallel.expert_tensor=2"),
    "context": ("parallel.context=2",),
    "context, expert": ("parallel.context=4", "parallel.expert=2"),
    "pipeline": ("parallel.pipeline=2",),
    "recompute": ("train.recompute=full",),
    "recompute kinds": ("train.recompute=selective", "train.recompute_blocks=ME"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_traced_memory_is_within_4_percent_of_the_plan(layout):
    config = preset("ladder_20m", *ROWS, *layout, ranks=8)
    for entry in trace_run(config, 8, H100, only_rank=None, stage_name=None, report=lambda *_: None):
        assert entry.error() == pytest.approx(0, abs=0.04), (entry.rank, entry.predicted, entry.traced["by_line"])
        assert entry.traced["mismatches"] == {}
