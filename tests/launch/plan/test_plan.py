"""The plan: sums that must hold, memory against a measured run, and what wrong input is told."""

import json
import re
from dataclasses import replace

import pytest
from amfm_simulate.trace import chosen_ranks, predicted_memory, traced_config

from amfm.launch.cli import run
from amfm.launch.plan.hardware import GIB
from amfm.launch.plan.plan import advise, plan_as_dict
from amfm.model.flops import count_parameters
from tests.launch.plan.presets import CONFIGS, PRESETS, ROOT, ZERO_ALONE, headers, plan_of, preset, preset_gpus


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_on_its_own_cluster_and_says_what_is_planned(name):
    plan = plan_of(name, ranks=preset_gpus(name))
    assert plan.is_own
    assert [entry.estimate.reason for entry in plan.stages] == [""] * len(plan.stages)
    said = {stage: header for header in headers(name) for stage in header.stages or [plan.stages[0].stage.name]}
    assert said.keys() == {entry.stage.name for entry in plan.stages}
    for entry in plan.stages:
        here, ranks = entry.estimate, entry.estimate.layout.ranks
        header = said[entry.stage.name]
        assert (header.gib, header.mfu) == (f"{here.memory.total() / GIB:.1f}", f"{here.mfu:.1%}")
        if header.ranks:
            traced = traced_config(plan.config, ranks, entry.stage.name)
            planned = {rank: predicted_memory(traced, ranks, rank) for rank in chosen_ranks(traced, ranks, None)}
            said_of_ranks = {rank: size for rank, (size, _) in header.ranks.items()}
            assert said_of_ranks == {rank: f"{memory.total() / GIB:.1f}" for rank, memory in planned.items()}
            # A slow test traces them again.
            assert all(float(size) == pytest.approx(found, rel=0.04, abs=0.1) for size, found in header.ranks.values())
    row = re.search(
        rf"^\| `{name}`.*\| ([\d.]+) to ([\d.]+)% \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    if row is not None:
        low, _, high = plan.own.mfu_range
        assert row.groups() == (f"{100 * low.mfu:.1f}", f"{100 * high.mfu:.1f}")
    found = plan_as_dict(plan)
    assert found["parameters"]["total"] == count_parameters(preset(name).model).total
    assert found["memory"]["total_bytes"] == pytest.approx(sum(found["memory"]["by_part"].values()), abs=20)
    assert 0 < found["step"]["mfu"] < 1
    assert found["step"]["seconds"] > 0
    assert found["memory"]["total_bytes"] <= headers(name)[0].hardware.memory_gib * 2**30
    assert json.loads(json.dumps(found)) == found


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
    plan = plan_of(name, *ZERO_ALONE, ranks=1024)
    assert plan.layouts == ()
    assert "cut the model by parallel.tensor, expert or pipeline; --search finds how" in advise(plan)


def test_a_model_that_does_not_fit_while_it_is_built_is_told_so():
    plan = plan_of("granite4_h_small", *ZERO_ALONE, ranks=1024)
    assert plan.layouts == ()
    assert "builds its part of the model in float32 before ZeRO spreads it" in advise(plan)


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
        (["parallel.offload_optimizer=true", "--gpus", "8"], "parallel.offload_optimizer=true is not modeled"),
        (["--gpus", "8", "--tokens", "-1"], "--tokens -1 must be greater than 0"),
        (["--gpus", "8", "--picture", "memory.txt"], "must end in one of .png, .svg, .pdf; use memory.png"),
        (["--gpus", "8", "--picture", "nowhere/memory.png"], "nowhere is not a folder"),
        (["--gpus", "8", "--gpu", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--gpus", "0"], ""),
    ],
)
def test_wrong_input_is_told_the_rule_and_the_nearest_value(arguments, message, capsys):
    assert run(["plan", str(CONFIGS / "ladder_150m.yaml"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_save_that_the_hosts_do_not_have_is_refused_with_its_bytes(capsys):
    overrides = ["train.replica_every_steps=50"]
    plan = plan_of("ladder_8b_a1b", ranks=64)
    # Master weights and two moments of an eighth of all weights, in tensors that are rounded up.
    assert plan.host.save_bytes == pytest.approx(1.44 * 12 * plan.counts.total / 8, rel=0.01)
    assert plan.host.problem() is None and advise(plan) == ""
    averaged = plan_of("ladder_8b_a1b", "ema={}", ranks=64).host
    assert averaged.rank_bytes == pytest.approx(plan.host.rank_bytes * 16 / 12, rel=1e-6)
    little = replace(plan, hardware=plan.hardware.model_copy(update={"host_memory_gib": 15.0}))
    assert re.fullmatch(
        r"a save holds 1\d GiB of each host \(1\.\d GiB per rank, 8 ranks, .*\), more than 90% of its 15 GiB: use more .*",
        advise(little),
    )
    assert plan_as_dict(little)["host"]["room_bytes"] == 15 * 2**30
    replicated = plan_of("ladder_8b_a1b", *overrides, ranks=64)
    assert replicated.host.replica_bytes == replicated.replicas.node_bytes
    assert run(["plan", str(CONFIGS / "ladder_8b_a1b.yaml"), "--gpus", "64"]) == 0
    assert "the copy that a save makes and keeps" in capsys.readouterr().out


def test_replicas_cost_memory_of_two_nodes_and_are_printed(capsys):
    assert plan_of("ladder_8b_a1b", ranks=64).replicas is None
    overrides = ["train.checkpoint_every_steps=1000", "train.replica_every_steps=50"]
    plan = plan_of("ladder_8b_a1b", *overrides, ranks=64)
    cost, step = plan.replicas, plan.own.step.total()
    assert cost.nodes == 8
    # Master weights and two moments of all weights, on two nodes, in two generations, over eight nodes.
    assert cost.node_bytes == pytest.approx(2 * 2 * 12 * plan.counts.total / 8, rel=0.01)
    assert (cost.staged_bytes, cost.sent_bytes) == (cost.node_bytes / 4, cost.node_bytes / 4)
    assert 50 * step < cost.most_lost_seconds < cost.most_lost_without_seconds == 1000 * step
    one = plan_of("ladder_150m", *overrides, ranks=8).replicas
    assert (one.nodes, one.sent_bytes) == (1, 0)
    assert run(["plan", str(CONFIGS / "ladder_8b_a1b.yaml"), *overrides, "--gpus", "64"]) == 0
    printed = capsys.readouterr().out
    assert "Replicas every 50 steps on 8 hosts" in printed and "sent by each host to the next" in printed
    assert run(["plan", str(CONFIGS / "ladder_8b_a1b.yaml"), *overrides, "--gpus", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replicas"] == cost.to_json()
