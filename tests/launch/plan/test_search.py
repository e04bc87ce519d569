"""Layouts of all axes, searched."""

import json

import pytest

from amfm.launch.cli import run
from amfm.launch.plan.estimate import Assumptions, estimate, estimate_as_dict
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.search import recomputed
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.stages import resolve_stages
from tests.launch.plan.presets import CONFIGS, H100, preset


def test_a_search_has_each_layout_once_as_it_is_estimated_alone(capsys):
    small = ["train.global_batch_size=4", "model.pattern=(*E)x4"]  # two kinds of blocks to measure
    arguments = ["plan", str(CONFIGS / "ladder_1b_a300m.yaml"), "--gpus", "2", "--search", "--json", *small]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert_once_and_as_alone(found, preset("ladder_1b_a300m", *small), 2, found["layouts"][:2])
    assert {item["parallel"].get("schedule", "1f1b") for item in found["layouts"]} > {"1f1b"}
    why = {entry["what"]: entry for entry in found["left_out"]}
    assert why["parallel.offload_optimizer"]["count"] is None


def assert_once_and_as_alone(found, config, ranks, chosen):
    """A search asks once for what it needs several times; a layout on its own has the same memory and seconds."""
    layouts = [(str(item["parallel"]), item["train"]["micro_batch_size"]) for item in found["layouts"]]
    assert len(layouts) == len(set(layouts)), "once: with the least recomputation that fits"
    for item in chosen:
        train = config.train.model_copy(update=item["train"])
        parallel = ParallelConfig.model_validate(item["parallel"])
        alone = config.model_copy(update={"parallel": parallel, "train": train})
        again = estimate_as_dict(estimate(alone, Layout.of(alone, ranks), H100, Assumptions()))
        assert again["memory"] == item["memory"] and again["step"] == item["step"]


@pytest.mark.slow
def test_a_search_recomputes_no_more_than_it_must_and_tries_every_schedule(capsys):
    small = "train.global_batch_size=32"  # fewer sizes of micro-batches to try than of its 3,072 rows
    arguments = ["plan", str(CONFIGS / "nemotron3_nano_30b.yaml"), "--gpus", "16", "--search", "--json", small]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layouts"]
    schedules = {item["parallel"].get("schedule", "1f1b") for item in found["layouts"]}
    assert schedules == {"1f1b", "interleaved", "zero_bubble"}
    assert {item["train"]["recompute"] for item in found["layouts"]} == {"none", "selective", "full"}
    # Experts in halves, and two-batch overlap, only where experts are spread, and where that is faster.
    ways = {item["parallel"].get("overlap_experts", False): item for item in found["layouts"]}
    assert {False} < ways.keys() <= {False, True, "two_batch"}
    assert all(item["parallel"]["expert"] > 1 for way, item in ways.items() if way)
    turns = [item for item in found["layouts"] if item["parallel"].get("overlap_experts") == "two_batch"]
    assert all(item["train"]["micro_batch_size"] % 2 == 0 for item in turns)
    assert_once_and_as_alone(found, preset("nemotron3_nano_30b", small), 16, ways.values())
    # Why not the others: counted, with an example, or not tried, with a reason.
    why = {entry["what"]: entry for entry in found["left_out"]}
    broken = [entry for what, entry in why.items() if what.startswith("breaks a rule of parallel.")]
    large = [entry for what, entry in why.items() if what.startswith("out of memory, most of it ")]
    assert broken and large
    assert all(entry["count"] > 0 and "zero_stage" in entry["example"] for entry in (*broken, *large))
    assert all("; use" in entry["example"] for entry in broken)
    assert all("of 79.1" in entry["example"] for entry in large)
    assert why["parallel.offload_optimizer"]["count"] is None
    assert why["parallel.tensor above 8"]["example"].startswith("a block waits for its sums")


@pytest.mark.slow
def test_each_stage_is_searched_and_stays_in_a_layout_that_is_as_good(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""extends: {CONFIGS}/ladder_1b_a300m.yaml
run: {{dir: run}}
train: {{steps: null, validate_every_steps: null}}
schedule: {{kind: constant, warmup_steps: 0, decay_steps: null}}
stages:
  - {{name: short, tokens: 1.0e+9}}
  - {{name: again, steps: 100}}  # the same rows: nothing to gain
  - {{name: long, steps: 2000, sequence_length: 131072, global_batch_size: 4}}
""",
        encoding="utf-8",
    )
    assert run(["plan", str(path), "--gpus", "16", "--search", "--json"]) == 0
    short, again, long = json.loads(capsys.readouterr().out)["stages"]
    assert short["chosen"]["parallel"] == again["chosen"]["parallel"]
    assert long["chosen"]["parallel"] != short["chosen"]["parallel"]  # four rows for 16 ranks
    assert short["chosen"]["train"]["recompute"] == "none"
    assert all(stage["chosen"]["fits"] and len(stage["layouts"]) > 1 for stage in (short, again, long))
    assert run(["plan", str(path), "--gpus", "16", "--search", "--write-layout"]) == 0
    printed = capsys.readouterr()
    assert "layouts were left out; --why lists the reasons" in printed.err and "Left out" not in printed.out
    stages = resolve_stages(load_config(path, ()))
    assert stages[0].config.parallel == stages[1].config.parallel != stages[2].config.parallel
    assert stages[2].config.parallel == ParallelConfig.model_validate(long["chosen"]["parallel"])
    assert "# the same rows: nothing to gain" in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_search_over_all_axes_finds_what_zero_alone_cannot_fit(capsys):
    arguments = ["plan", str(CONFIGS / "turbos_560b.yaml"), "--gpus", "4096", "--search", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["layouts"]
    seconds = [item["step"]["seconds"] for item in found["layouts"]]
    assert seconds == sorted(seconds)
    best = found["layouts"][0]["parallel"]
    chosen = {"": found["layouts"][0]} | {f"stages.{place}.": s["chosen"] for place, s in enumerate(found["stages"])}
    overrides = [f"{where}parallel={json.dumps(layout['parallel'])}" for where, layout in chosen.items()]
    for where, layout in chosen.items():
        settings = layout["train"].items()
        overrides += [
            f"{where or 'train.'}{name}={json.dumps(value or None)}" for name, value in settings if where or value
        ]
    config = preset("turbos_560b", *overrides, ranks=4096)  # obeys every rule of a run
    assert config.parallel.tensor == best["tensor"]
    assert [stage["name"] for stage in found["stages"]] == ["pretraining", "annealing", "context_32k", "context_256k"]
    assert found["run"]["days"] == pytest.approx(sum(stage["days"] for stage in found["stages"]))
    assert all("of 79.1" in item["reason"] for item in found["near_misses"])


def test_recomputation_names_kinds_of_packages_whole():
    lightnet = "model.mixers.lightnet={num_heads: 4, head_dim: 64}"
    config = preset("ladder_20m", "model.pattern=M{lightnet}*", lightnet, "export.target=own")
    found = [layout.recompute for layout in recomputed(config, Layout(8, 1, 1))]
    assert frozenset(("{lightnet}",)) in found and found[-1] == {"M", "{lightnet}", "*"}
