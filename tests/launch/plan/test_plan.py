"""The plan: sums that must hold, memory against a measured run, and what wrong input is told."""

import json
from pathlib import Path

import pytest

from launch.cli import run
from launch.plan.activations import Split, block_bytes
from launch.plan.communication import all_to_all_seconds, ring_seconds
from launch.plan.hardware import HARDWARE, load_hardware
from launch.plan.layout import Layout, held_by_stages
from launch.plan.memory import estimate_memory, in_flight, reduction_bytes, storage_of
from launch.plan.plan import Assumptions, advise, make_plan, plan_as_dict
from launch.plan.time import estimate_step
from model.flops import count_parameters, flops_per_token
from pretrain.checks.check_run import load_checked

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
H100 = HARDWARE["h100"]


def preset(name, *overrides, ranks=None):
    return load_checked(CONFIGS / f"{name}.yaml", overrides, world_size=ranks)


def plan_of(name, *overrides, ranks=8):
    return make_plan(preset(name, *overrides, ranks=ranks), H100, ranks, Assumptions())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_planned(name):
    found = plan_as_dict(plan_of(name, ranks=1024 if name == "turbos_560b" else 2))
    assert found["parameters"]["total"] == count_parameters(preset(name).model).total
    assert found["memory"]["total_bytes"] == pytest.approx(sum(found["memory"]["by_part"].values()), abs=20)
    assert 0 < found["step"]["mfu"] < 1
    assert found["step"]["seconds"] > 0
    assert found["fits"] == (found["memory"]["total_bytes"] <= H100.memory_gib * 2**30)
    assert json.loads(json.dumps(found)) == found


def test_memory_of_states_follows_the_zero_stage():
    config = preset("ladder_1b_a300m")
    total = count_parameters(config.model).total
    parts = {
        stage: estimate_memory(config, Layout(8, stage, 1), storage_of(config), margin=0.0).parts for stage in range(4)
    }
    assert [parts[stage]["weights"] for stage in range(4)] == [2 * total, 2 * total, 2 * total, 2 * total / 8]
    assert [parts[stage]["moments"] for stage in range(4)] == [8 * total, total, total, total]
    # bf16 gradients of several micro-batches are also summed in float32, whole on every rank, at any stage.
    assert all(parts[stage]["gradients"] == 6 * total for stage in range(4) if "activations" in parts[stage])


def test_activations_grow_with_rows_and_one_micro_batch_needs_no_float32_sums():
    config = preset("ladder_1b_a300m")
    one, two = (estimate_memory(config, Layout(8, 2, rows), storage_of(config), margin=0.0) for rows in (1, 2))
    assert two.parts["activations"] == pytest.approx(2 * one.parts["activations"])
    single = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 8})})
    alone = estimate_memory(single, Layout(8, 2, 1), storage_of(single), margin=0.0)
    assert alone.total() < one.total()


def test_recomputed_blocks_keep_their_input_alone():
    layout = Layout(8, 2, 1)
    activations = {}
    for overrides in ((), ("train.recompute=selective", "train.recompute_blocks=M"), ("train.recompute=full",)):
        config = preset("ladder_1b_a300m", *overrides)
        activations[overrides] = estimate_memory(config, layout, storage_of(config), margin=0.0).parts["activations"]
    kept, some, least = activations.values()
    assert least < some < kept
    blocks = len(config.model.letters)
    assert least >= 2 * config.train.sequence_length * config.model.hidden_size * blocks
    assert least < 0.1 * kept


def test_recomputed_blocks_pass_forward_twice():
    plain, again = preset("ladder_1b_a300m"), preset("ladder_1b_a300m", "train.recompute=full")
    before, after = (
        estimate_step(config, Layout(8, 2, 1), H100, storage_of(config), overlap=1.0).compute
        for config in (plain, again)
    )
    assert after.pop("head") == before.pop("head")
    for kind, seconds in before.items():
        # A forward pass is a third of three, or one of three and a half in attention and scans.
        assert 1 + 1 / 3.5 <= after[kind] / seconds <= 1 + 1 / 3 + 1e-9


def test_margin_is_a_part_of_the_rest():
    config = preset("ladder_150m")
    plain, wide = (estimate_memory(config, Layout(1, 1, 1), storage_of(config), margin=m).total() for m in (0.0, 0.2))
    assert wide == pytest.approx(1.2 * plain)


def test_gradients_on_their_way_take_a_bucket_and_what_is_sent():
    config = preset("ladder_1b_a300m")
    parameters = count_parameters(config.model).total
    bucket = 200_000_000
    for precision, ranks, communication in (
        ("float32", 1, 4 * bucket),  # the buffer alone
        ("bf16", 1, 4 * bucket),  # what is sent, in float32
        ("bf16", 8, 6 * bucket),  # and the ranks' slices, joined
    ):
        run = preset("ladder_1b_a300m", f"train.precision={precision}")
        layout, storage = Layout(ranks, 1, 1), storage_of(run)
        (held,) = held_by_stages(run.model, layout, run.train.sequence_length)
        parts = reduction_bytes(held, layout, storage)
        left = max(0.0, storage.element_bytes * (parameters / ranks - bucket))  # this rank's share of earlier buckets
        assert parts["communication"] == communication
        assert parts["gradients"] == pytest.approx(storage.element_bytes * parameters + left)


def test_a_single_rank_gathers_no_weights_under_zero_3():
    config = preset("ladder_150m")
    alone, two = (estimate_memory(config, Layout(ranks, 3, 1), storage_of(config), margin=0.0) for ranks in (1, 2))
    assert "gathered weights" not in alone.parts
    total = count_parameters(config.model).total
    assert two.parts["gathered weights"] == pytest.approx(2 * (total + 50_000_000))


def test_what_tensor_ranks_do_not_cut_stays_whole():
    # One group of B and C for two ranks: their channels are on both, and a norm of y that lies on both keeps more.
    config = preset("ladder_20m")
    storage = storage_of(config)
    whole, half = (block_bytes(config.model, "M", storage, Split(tensor=size)) for size in (1, 2))
    stream = 256 * 2 * 2 + 4
    assert (half.kept - stream) > 0.5 * (whole.kept - stream) + 2 * 64 * storage.element_bytes
    wide = config.model.model_copy(update={"mamba": config.model.mamba.model_copy(update={"num_groups": 2})})
    whole, half = (block_bytes(wide, "M", storage, Split(tensor=size)) for size in (1, 2))
    assert half.kept - stream == pytest.approx(0.5 * (whole.kept - stream))


def test_a_step_is_never_faster_than_its_arithmetic_at_peak():
    for name in PRESETS:
        config = preset(name)
        step = estimate_step(config, Layout(1, 1, 1), H100, storage_of(config), overlap=1.0)
        train = config.train
        flops = sum(flops_per_token(config.model, train.sequence_length).values())
        tokens = train.global_batch_size * train.sequence_length
        assert step.total() > flops * tokens / H100.peak_flops(train.precision)
        assert step.reduction == step.exposed_gathers == 0.0


def test_overlap_hides_gathers_but_no_more_than_there_is_compute():
    config = preset("ladder_8b_a1b")
    steps = [
        estimate_step(config, Layout(64, 3, 1), H100, storage_of(config), overlap=part) for part in (0.0, 0.5, 1.0)
    ]
    assert steps[0].exposed_gathers > steps[1].exposed_gathers > steps[2].exposed_gathers >= 0
    hidden = steps[0].exposed_gathers - steps[2].exposed_gathers
    assert hidden <= sum(steps[2].compute.values()) * (1 + 1e-9)


def test_a_ring_across_nodes_is_bound_by_the_network():
    assert ring_seconds(1e9, 1, H100, calls=1) == 0
    inside, across = ring_seconds(1e12, 8, H100, calls=1), ring_seconds(1e12, 16, H100, calls=1)
    assert inside == pytest.approx(1e12 * 7 / 8 / (0.8 * 450e9), rel=1e-3)
    assert across == pytest.approx(1e12 * 15 / 16 / (0.8 * 400e9), rel=1e-3)


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


def test_pipelines_hold_what_their_schedule_has_in_flight():
    plain, interleaved = (
        Layout(4, 1, 1, pipeline=4),
        Layout(4, 1, 1, pipeline=4, virtual_stages=2, schedule="interleaved"),
    )
    assert [in_flight(plain, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(plain, 0, 2) == 2
    assert [in_flight(interleaved, stage, 8) for stage in range(4)] == [5.5, 4.5, 3.5, 2.5]


def test_an_axis_takes_its_part_of_memory_and_adds_its_exchange():
    config = preset("ladder_8b_a1b", "train.global_batch_size=512")
    storage = storage_of(config)
    alone = estimate_memory(config, Layout(64, 1, 1), storage, margin=0.0).parts
    cut = estimate_memory(
        config, Layout(64, 1, 1, tensor=4, sequence_parallel=True, expert_tensor=4), storage, margin=0.0
    )
    assert cut.parts["weights"] == pytest.approx(alone["weights"] / 4)
    assert alone["activations"] / 4 < cut.parts["activations"] < 0.5 * alone["activations"]
    spread = estimate_memory(config, Layout(64, 1, 1, expert=8), storage, margin=0.0, imbalance=1.0)
    uneven = estimate_memory(config, Layout(64, 1, 1, expert=8), storage, margin=0.0, imbalance=2.0)
    assert spread.parts["weights"] < 0.3 * alone["weights"]
    assert uneven.total() > spread.total()
    for layout, axis in (
        (Layout(64, 1, 1, tensor=4, sequence_parallel=True, expert_tensor=4), "tensor"),
        (Layout(64, 1, 1, expert=8), "expert"),
        (Layout(64, 1, 1, context=2), "context"),
    ):
        assert set(estimate_step(config, layout, H100, storage, overlap=0.5).communication) == {axis}
    staged = estimate_step(config, Layout(64, 1, 1, pipeline=4), H100, storage, overlap=0.5)
    busy = sum(staged.compute.values()) + sum(staged.communication.values())
    assert staged.bubble == pytest.approx(3 * busy / (512 / 16))


def test_a_layout_is_described_by_what_is_not_at_its_smallest():
    assert Layout(1, 0, 2).describe() == "zero_stage=0 micro_batch_size=2"
    layout = Layout(16, 1, 1, tensor=2, sequence_parallel=True, pipeline=4, schedule="zero_bubble")
    assert layout.describe() == (
        "tensor=2 sequence_parallel=true pipeline=4 zero_stage=1 schedule=zero_bubble micro_batch_size=1"
    )


def test_all_to_all_is_bound_by_the_network_once_it_leaves_the_node():
    assert all_to_all_seconds(1e9, 1, H100) == 0
    assert all_to_all_seconds(8e9, 8, H100) == pytest.approx(7e9 / 450e9 / 0.8, rel=1e-3)
    assert all_to_all_seconds(64e9, 64, H100) == pytest.approx(56e9 / 50e9 / 0.8, rel=1e-3)


def test_a_search_over_all_axes_finds_what_zero_alone_cannot_fit(capsys):
    arguments = ["plan", str(CONFIGS / "turbos_560b.yaml"), "--gpus", "2048", "--search", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["layouts"]
    seconds = [item["step"]["seconds"] for item in found["layouts"]]
    assert seconds == sorted(seconds)
    best = found["layouts"][0]["parallel"]
    overrides = [f"parallel.{name}={str(value).lower()}" for name, value in best.items()]
    overrides.append(f"train.micro_batch_size={found['layouts'][0]['train']['micro_batch_size']}")
    config = preset("turbos_560b", *overrides, ranks=2048)  # obeys every rule of a run
    assert config.parallel.tensor == best["tensor"]
    assert [stage["name"] for stage in found["stages"]] == ["pretraining", "annealing", "context_32k", "context_256k"]
    assert found["run"]["days"] == pytest.approx(sum(stage["days"] for stage in found["stages"]))
    assert all("of 79.1" in item["reason"] for item in found["near_misses"])


def test_layouts_fit_are_ranked_and_near_misses_say_why():
    plan = plan_of("ladder_8b_a1b", ranks=64)
    seconds = [item.step.total() for item in plan.layouts]
    assert seconds == sorted(seconds)
    assert all(item.fits() for item in plan.layouts)
    assert all("GiB" in item.reason for item in plan.near_misses)
    for item in (*plan.layouts, *plan.near_misses):
        assert plan.config.train.global_batch_size % (item.layout.micro_batch_size * 64) == 0


@pytest.mark.parametrize("name", ["nemotron3_super_120b", "nemotron3_ultra_550b"])
def test_what_zero_cannot_fit_is_said_plainly(name):
    plan = plan_of(name, ranks=1024)
    assert plan.layouts == ()
    assert "cut the model by parallel.tensor, expert or pipeline; --search finds how" in advise(plan)


def test_a_model_whose_rows_are_what_does_not_fit_is_told_so():
    plan = plan_of("granite4_h_small", ranks=1024)
    assert plan.layouts == ()
    assert "spares the float32 sums of gradients" in advise(plan)


def test_days_follow_from_tokens(capsys):
    command = ["plan", str(CONFIGS / "ladder_150m.yaml"), "--gpus", "8", "--json"]
    found = []
    for tokens in ("1e12", "2e12"):
        assert run([*command, "--tokens", tokens]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["run"]["days"] == pytest.approx(2 * found[0]["run"]["days"])
    assert found[0]["run"]["gpu_hours"] == pytest.approx(found[0]["run"]["days"] * 24 * 8)
    assert found[0]["run"]["days"] == pytest.approx(1e12 / found[0]["run"]["tokens_per_day"])


def test_the_tables_and_the_picture(capsys, tmp_path):
    picture = tmp_path / "memory.svg"
    arguments = ["plan", str(CONFIGS / "ladder_150m.yaml"), "--gpus", "8", "--gpu", "a100", "--picture", str(picture)]
    assert run(arguments) == 0
    text = capsys.readouterr().out
    assert "A100 80GB SXM" in text
    assert "zero_stage=1 micro_batch_size=4" in text
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8", "--gpu", "h10"], "--gpu h10 is not in the table (a100, h100, h200, b200); use h100"),
        (["--gpus", "7"], "must be a multiple of train.micro_batch_size=4 x 7 data ranks = 28; use 252 or 280"),
        (["parallel.offload_optimizer=true", "--gpus", "8"], "parallel.offload_optimizer=true is not modelled"),
        (["--gpus", "8", "--tokens", "-1"], "--tokens -1 must be greater than 0"),
        (["--gpus", "8", "--picture", "memory.txt"], "must end in one of .png, .svg, .pdf; use memory.png"),
        (["--gpus", "8", "--picture", "nowhere/memory.png"], "nowhere is no folder"),
        (["--gpus", "8", "--gpu", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--gpus", "0"], ""),
    ],
)
def test_wrong_input_is_told_the_rule_and_the_nearest_value(arguments, message, capsys):
    assert run(["plan", str(CONFIGS / "ladder_150m.yaml"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_hardware_can_come_from_a_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "name: own\nbf16_flops: 1e14\nfloat32_flops: 1e13\nmemory_gib: 24\nmemory_bytes_per_second: 1e12\n"
        "gpus_per_node: 1\nnode_link_bytes_per_second: 3e10\nnetwork_bytes_per_second: 1e10\n"
    )
    hardware = load_hardware(str(path))
    assert (hardware.memory_gib, hardware.gpus_per_node) == (24, 1)
    path.write_text("name: own\nbf16_flop: 1e14\nfloat32_flops: -1\n")
    with pytest.raises(ValueError) as refused:
        load_hardware(str(path))
    text = str(refused.value)
    assert f"{path}:2: bf16_flop = 100000000000000: unknown key; did you mean bf16_flops?" in text
    assert "float32_flops = -1: must be greater than 0" in text
    assert "memory_gib: is missing" in text
