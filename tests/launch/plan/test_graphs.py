"""Graphs of blocks in a plan: three launches for a pass, and memory that stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.launch.plan.graphs import REPLAY_LAUNCHES, graph_bytes, pass_launches, with_graphs
from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.launch.plan.memory import block_sizes, estimate_memory
from amfm.launch.plan.search import is_allowed, with_layout
from amfm.launch.plan.time import estimate_step
from amfm.pretrain.hooks.cuda_graphs import CudaGraphs
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.launch.plan.presets import H100, preset
from tests.pretrain.hooks.recorded_graph import record
from tests.pretrain.tiny_run import tiny_config, tiny_data

LAYOUT = Layout(8, 1, 4)


def test_a_replayed_pass_has_few_launches_where_kernels_find_documents_on_the_device() -> None:
    config = preset("ladder_20m", "train.cuda_graphs=blocks")
    for letter in "ME*":
        block = block_bytes(config.model, letter, storage_of(config))
        assert pass_launches(config, block, is_main=True) == (REPLAY_LAUNCHES, REPLAY_LAUNCHES)
        assert min(block.launches) > REPLAY_LAUNCHES
        assert pass_launches(preset("ladder_20m"), block, is_main=True) == block.launches
    attention = block_bytes(config.model, "*", replace(storage_of(config), backend="torch"))
    assert pass_launches(config, attention, is_main=True) == attention.launches


def test_blocks_of_depths_are_no_graphs() -> None:
    given = ("train.cuda_graphs=blocks", "model.pattern=MM/MM", "model.mtp={loss_weight: 0.3}")
    with_depth, without = preset("ladder_20m", *given), preset("ladder_20m", given[0], "model.pattern=MM")
    held = []
    for config in (with_depth, without):
        storage = storage_of(config)
        (share,) = held_by_stages(config.model, LAYOUT, config.train.sequence_length)
        sizes = block_sizes(config, LAYOUT, storage, 1.0, set(share.letters))
        held.append(graph_bytes(config, LAYOUT, storage, share, sizes))
    assert held[0] == held[1]
    block = block_bytes(with_depth.model, "M", storage_of(with_depth))
    assert pass_launches(with_depth, block, is_main=False) == block.launches


def test_a_small_model_waits_less_for_its_host() -> None:
    plain, graphs = (
        estimate_step(config, LAYOUT, H100, storage_of(config), overlap=0.5)
        for config in (preset("ladder_20m"), preset("ladder_20m", "train.cuda_graphs=blocks"))
    )
    assert graphs.host < plain.host and graphs.total() < plain.total()


def test_sums_stay_and_graphs_hold_a_delta_and_gradients_of_what_flows_in() -> None:
    config = preset("ladder_20m", "train.cuda_graphs=blocks", "model.pattern=MM*M", "model.residual_in_fp32=false")
    storage = storage_of(config)
    (held,) = held_by_stages(config.model, LAYOUT, config.train.sequence_length)
    sizes = block_sizes(config, LAYOUT, storage, 1.0, set(held.letters))
    stream = 2 * LAYOUT.tokens(config) * config.model.hidden_size
    # Each block's delta and the gradient of the sum that flows in; the first holds what flows in too, without a delta; the last
    # one, gradients of what flows out.
    expected = (4 * 2 + 1 + 2) * stream
    assert graph_bytes(config, LAYOUT, storage, held, sizes) == expected
    plain = estimate_memory(preset("ladder_20m", "model.pattern=MM*M"), LAYOUT, storage, margin=0.0)
    memory = estimate_memory(config, LAYOUT, storage, margin=0.0)
    assert memory.parts["graphs"] == pytest.approx(expected)
    assert memory.total() - plain.total() >= memory.parts["graphs"]


@pytest.mark.parametrize("is_wide", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graphs_hold_the_bytes_that_the_plan_says(tmp_path: Path, is_wide: bool) -> None:
    given = {"pattern": "MM*M", "moe": None, "residual_in_fp32": is_wide}
    given = {f"model__{key}": value for key, value in given.items()} | {"train__precision": "bf16"}
    config = tiny_config(tiny_data(tmp_path), tmp_path / "run", **given)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        hook = CudaGraphs(run, record)
        run.hooks = (hook, *run.hooks)
        run_steps(run)
        held_bytes = {}
        for index, graphs in hook.graphs.items():
            own = [graphs.outputs[1], *graphs.input_gradients]
            own += graphs.inputs if index - 1 not in hook.graphs else []
            own += graphs.output_gradients if index + 1 not in hook.graphs else []
            held_bytes |= {tensor.data_ptr(): tensor.nbytes for tensor in own}
        close_run(run)
    layout = Layout(1, 1, config.train.micro_batch_size)
    storage = storage_of(config)
    (held,) = held_by_stages(config.model, layout, config.train.sequence_length)
    sizes = block_sizes(config, layout, storage, 1.0, set(held.letters))
    assert graph_bytes(config, layout, storage, held, sizes) == sum(held_bytes.values())


def test_what_captured_passes_keep_stays_while_the_optimizer_steps() -> None:
    config = preset("ladder_20m", "train.cuda_graphs=blocks")
    storage = storage_of(config)
    (held,) = held_by_stages(config.model, LAYOUT, config.train.sequence_length)
    sizes = block_sizes(config, LAYOUT, storage, 1.0, set(held.letters))
    parts = [
        with_graphs(config, LAYOUT, storage, held, sizes, {"working space": 0.0}, {}, is_captured=is_captured)
        for is_captured in (True, False)
    ]
    tokens = LAYOUT.tokens(config)
    kept = tokens * sum(sizes[letter].kept for letter in held.letters)
    working = tokens * max(size.working for size in sizes.values())
    (passes, step), (_, eager) = parts
    assert step["activations"] == pytest.approx(kept) and step["working space"] == passes["working space"] == working
    assert "activations" not in eager and step["gradients"] == eager["gradients"] > passes["gradients"]


def test_a_search_keeps_to_layouts_that_have_graphs() -> None:
    config = preset("ladder_20m", "train.cuda_graphs=blocks")
    for layout in (LAYOUT, replace(LAYOUT, tensor=2), replace(LAYOUT, expert=2)):
        assert is_allowed(with_layout(config, layout), 8)
    for layout in (replace(LAYOUT, zero_stage=2), replace(LAYOUT, context=2)):
        assert not is_allowed(with_layout(config, layout), 8)
        assert is_allowed(with_layout(preset("ladder_20m"), layout), 8)
