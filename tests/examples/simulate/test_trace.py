"""Simulated ranks of a small run vs. the plan, the waits that are allowed, and what wrong input is
told.
"""

import json
from itertools import pairwise

import pytest
import torch
import yaml
from amfm_simulate.trace import check_torch, predicted_bytes, trace_run, traced_bytes, traced_config

from amfm.launch.cli import run
from amfm.launch.plan.hardware import HARDWARE
from amfm.pretrain.checks.load import load_checked
from benchmarks.small_steps import DEFAULTS
from benchmarks.traced import compare_bytes
from tests.examples.simulate.allowed_waits import expected_waits, unnumbered
from tests.examples.simulate.test_timeline import assert_trace_events

H100 = HARDWARE["h100"]


@pytest.fixture
def small(tmp_path):
    """A path of a run with every core kind of block, once."""
    path = tmp_path / "small.yaml"
    settings = DEFAULTS | {"kernels": {"backend": "triton"}, "model": DEFAULTS["model"] | {"pattern": "*-ME"}}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def trace(path, ranks, *overrides):
    config = load_checked(path, overrides, world_size=ranks)
    return trace_run(config, ranks, H100, only_rank=None, stage_name=None, report=lambda *_: None)


def assert_all_compiled_first(entry):
    """No step launches a kernel that Triton had to compile for it: what a run needs is compiled before all ranks meet."""
    assert entry.traced["compiled"]["late"] == []
    assert entry.traced["compiled"]["first"] > 30, "a block of each kind, forward and backward"


@pytest.mark.slow
def test_a_composed_layout_sends_the_bytes_of_the_formulas_and_waits_where_it_may(small):
    layout = ("parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.expert=2", "parallel.context=2")
    layout += (
        "model.moe.top_k=1",
        "model.moe.normalize_probabilities=false",
    )  # so that how many rows are sent to experts is no matter of draws
    (entry,) = trace(small, 8, *layout)
    # The plan counts norms and routers, which every tensor rank holds, as cut.
    assert entry.traced["parameters"] == pytest.approx(entry.held_parameters(), rel=0.01)
    assert entry.traced["mismatches"] == {}
    assert unnumbered(entry.traced["host_waits"]) == expected_waits(entry.config)
    assert compare_bytes(entry) == "equal"
    (read,) = entry.traced["capture"]["E"]["forward"]["host_reads"]
    assert read.startswith("model/moe/by_rank.py"), "splits of rows that are counted"
    assert_all_compiled_first(entry)


@pytest.mark.parametrize(
    ("setting", "sums"),
    [("model.moe.capacity_factor=1.5", "hook"), ("parallel.expert_buffer_factor=1.3", "product")],
    ids=["capacity_factor", "expert_buffer_factor"],
)
@pytest.mark.slow
def test_experts_whose_rows_need_no_counting_wait_for_nothing(small, setting, sums):
    (entry,) = trace(small, 4, "parallel.expert=4", setting, f"train.gradient_sums={sums}")
    waits = unnumbered(entry.traced["host_waits"])
    assert waits == expected_waits(entry.config)
    assert not [line for line in waits if line.startswith("model/moe/")]
    found = {key: sum(sizes.values()) for key, sizes in traced_bytes(entry).items()}
    assert found == predicted_bytes(entry)
    assert_all_compiled_first(entry)
    # So a CUDA graph could hold every block: with other documents all launches, scalars, sizes and addresses are the
    # same, but for the sums of weight gradients, which each step allocates, where products add to them.
    for letter in "M*-E":
        for which, found in entry.traced["capture"][letter].items():
            assert found["launches"] > 5 and not found["host_reads"], (letter, which, found)
            assert bool(found["changed"]) == (which == "backward" and sums == "product"), (letter, which, found)
            others = [line for line in found["changed"] if ": other memory of pretrain/engine/buckets.py:" not in line]
            assert others == [], (letter, which)


@pytest.mark.slow
def test_graphs_of_blocks_hold_what_a_step_of_data_ranks_launches(small):
    (entry,) = trace(small, 2, "train.cuda_graphs=blocks", "model.mamba.chunk_size=128", "train.precision=bf16")
    for letter in "M*-E":
        for which, found in entry.traced["capture"][letter].items():
            assert found["launches"] > 5 and not found["host_reads"] and not found["changed"], (letter, which, found)
    assert_all_compiled_first(entry)  # a capture loads no kernel
    assert entry.traced["peak_bytes"] == pytest.approx(entry.predicted.total(), rel=0.04)


def test_trace_gives_json_a_picture_and_a_timeline(small, tmp_path, capsys):
    picture, timeline = tmp_path / "memory.svg", tmp_path / "step.json"
    arguments = ["plan", str(small), "--gpus", "4", "--trace", "--rank", "3", "--json", "--picture", str(picture)]
    arguments += ["--timeline", str(timeline)]
    # Kernels run in bfloat16, and so few rows and heads would be cut into segments, were there several chunks.
    overrides = ["train.precision=bf16", "model.mamba.chunk_size=128"]
    overrides += ["parallel.pipeline=2", "model.pattern='*-*ME'"]  # Mamba2 and experts on the second stage
    assert run([*arguments, *overrides]) == 0
    (found,) = json.loads(capsys.readouterr().out)["trace"]
    assert (found["rank"], found["stage"], found["pipeline_stage"]) == (3, "training", 1)
    assert found["micro_batches"] == 3
    # What slow tests ask of composed layouts and of graphs, of this one.
    assert found["fake_functions_wrong"] == {}
    assert unnumbered(found["host_waits"]) == expected_waits(load_checked(small, overrides, world_size=4))
    compiled = found["kernels_compiled"]
    assert compiled["late"] == [] and compiled["first"] > 15, "two kinds of blocks, forward and backward"
    names = {"predicted_bytes", "traced_bytes", "build_bytes", "bytes_by_axis", "flops", "launches", "host_waits"}
    assert names <= found.keys()
    assert found["bytes_by_axis"]["pp"]["send"]["passes"] > 0
    captured = found["capture"]["moe"]["backward"]
    assert captured["launches"] > 0 and captured["host_reads"] == []
    # Only the sums of gradients: each step has its own.
    assert captured["changed"] and all("pretrain/engine/buckets.py" in change for change in captured["changed"])
    # Norm and residual included: more launches are more waiting of a GPU for its host.
    launches = found["launches_a_block"]
    assert launches["forward"]["mamba"] <= 10 and launches["backward"]["mamba"] <= 16, launches
    assert launches["forward"]["moe"] <= 14, launches
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    document = json.loads(timeline.read_text(encoding="utf-8"))
    assert_trace_events(document)
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    computed = [event for event in spans if event["tid"] == 0]
    # One stream computes one operation at a time, and every collective is on its axis next to it.
    assert all(ahead["ts"] + ahead["dur"] <= behind["ts"] + 1e-6 for ahead, behind in pairwise(computed))
    assert {event["name"] for event in spans if event["tid"]} >= {"send", "receive", "all_reduce"}
    planned, laid_out = found["seconds"].pop("all")
    assert planned > 0
    assert laid_out == pytest.approx(sum(own for _, own in found["seconds"].values()))


def test_the_schedule_gets_the_micro_batches_that_it_asks_for(small):
    section = ("parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2")
    config = load_checked(small, (*section, "train.global_batch_size=32"), world_size=2)
    assert traced_config(config, 2, None).train.global_batch_size == 4 * config.train.micro_batch_size
    one = load_checked(small, ("train.global_batch_size=2",), world_size=1)
    assert traced_config(one, 1, None).train.global_batch_size == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trace", "--rank", "8"), "use 0 to 7"),
        (("--trace", "--stage", "annealing"), "use one of training"),
        (("--rank", "0"), "has no effect without --trace"),
        (("--timeline", "out.json"), "--timeline has no effect without --trace"),
        (("--trace", "--timeline", "out.txt"), "use a name that ends in .json"),
        (("--trace", "--timeline", "nowhere/out.json"), "there is no folder nowhere"),
        (("--trace", "parallel.offload_optimizer=true"), "offload_optimizer=true is not modeled"),
        (("--trace", "--search"), "give one of them"),
        (("--trace", "parallel.tensor=3"), "must divide"),
    ],
)
def test_wrong_input_is_one_message_and_exit_2(small, capsys, options, message):
    assert run(["plan", str(small), "--gpus", "8", *options]) == 2
    assert message in capsys.readouterr().err


def test_another_torch_is_refused():
    check_torch(torch.__version__)
    with pytest.raises(ValueError, match=r"written for torch 2\.13, 2\.15, and this is 2\.9\.1"):
        check_torch("2.9.1+cu128")
