"""Layouts: what each stage holds, and how one is written."""

import pytest
from amfm_simulate.step_traffic import built_stage

from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.model.config.schema import MtpConfig
from amfm.model.flops import count_parameters
from amfm.pretrain.config.schema import ParallelConfig
from tests.launch.plan.presets import preset

LAYOUTS = [
    Layout(8, 1, 1),
    Layout(64, 1, 1, tensor=4, sequence_parallel=True),
    Layout(64, 1, 1, tensor=2, expert=8, pipeline=2),
    Layout(64, 1, 1, tensor=4, expert=4, expert_tensor=2, pipeline=4, virtual_stages=2, schedule="interleaved"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parts_of_all_ranks_make_the_model(layout):
    model = preset("nemotron3_nano_30b").model
    held = held_by_stages(model, layout, 4096)
    assert len(held) == layout.pipeline
    total = sum(
        entry.dense * layout.tensor
        + entry.routed * (layout.expert * layout.expert_tensor if layout.expert > 1 else layout.tensor)
        for entry in held
    )
    # Without an expert axis experts are cut over the tensor ranks.
    assert total == pytest.approx(count_parameters(model).total, rel=1e-6)
    assert sum(len(entry.letters) for entry in held) == len(model.letters)


@pytest.mark.parametrize(("balance", "difference"), [("chunks", 2), ("ranks", 8)])
def test_the_plan_cuts_as_the_run_does(balance, difference):
    given = {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 4, "balance": balance}
    config = preset("ladder_1b_a300m", *(f"parallel.{name}={value}" for name, value in given.items()), ranks=8)
    layout = Layout.of(config, 8)
    assert layout.settings().get("balance", "chunks") == balance
    held = held_by_stages(config.model, layout, config.train.sequence_length)
    for entry in held:
        built = built_stage(config, entry.stage)
        assert entry.indices == tuple(index for piece in built.pieces for index in piece.blocks)
    # The rank without the head has more blocks.
    assert len(held[0].indices) - len(held[1].indices) == difference


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_the_last_stage_has_the_depths_and_a_copy_of_the_embedding(layout, shared):
    model = preset("nemotron3_nano_30b").model
    deep = model.model_copy(update={"pattern": f"{model.pattern}/*E/*E", "mtp": MtpConfig(shared=shared)})
    held = held_by_stages(deep, layout, 4096)
    total = sum(
        entry.dense * layout.tensor + entry.routed * layout.expert * max(1, layout.expert_tensor) for entry in held
    )
    copy = deep.vocab_size * deep.hidden_size
    assert total == pytest.approx(count_parameters(deep).total + copy, rel=1e-6)
    assert held[-1].letters[-4:] == tuple("*E*E") and (held[-1].depths, held[-1].heads) == (2, 3)
    assert {entry.depths for entry in held[:-1]} == {0}


def test_a_layout_is_described_by_what_is_not_at_its_smallest():
    assert Layout(1, 0, 2).describe() == "zero_stage=0 micro_batch_size=2"
    halves = Layout(16, 1, 1, expert=4, overlap_experts=True)
    assert halves.describe() == "expert=4 zero_stage=1 overlap_experts=true micro_batch_size=1"
    assert ParallelConfig.model_validate(halves.settings()).overlap_experts
    layout = Layout(16, 1, 1, tensor=2, sequence_parallel=True, pipeline=4, schedule="zero_bubble")
    assert layout.describe() == (
        "tensor=2 sequence_parallel=true pipeline=4 zero_stage=1 schedule=zero_bubble micro_batch_size=1"
    )
