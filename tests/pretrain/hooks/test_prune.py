"""Groups go to zero on the ramp, smallest first, stay there without anyone holding them, and alike on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.init import initial_values, named_seed
from amfm.model.moe.block import PRUNED_BIAS
from amfm.pretrain.checkpoint.engine_layout import MasterView
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.hook_sections import PRUNED_GROUPS, PruneConfig
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.hooks.prune import plan_groups, pruned_share, prunes_after
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.launcher_protocol import DONE
from amfm.pretrain.monitor.anomalies import EXPERT_STEPS
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL, collect_weights, read_events, read_metrics, tiny_config

STEPS = 6
MODELS: dict[str, Any] = {
    "swiglu": MODEL
    | {
        "attention": MODEL["attention"] | {"qk_norm": True, "positions": "rope", "gate": "element"},
        "feed_forward": {"hidden_size": 48, "activation": "swiglu", "bias": True},
    },
    "squared_relu": MODEL,
}


def pruning(groups: str, keep: float = 0.5) -> dict[str, Any]:
    return {"groups": groups, "keep": keep, "start_step": 1, "every_steps": 1, "end_step": 3}


def pruning_config(data: DataConfig, run_dir: Path, shape: str = "swiglu", **changes: Any) -> RunConfig:
    settings = {name: changes.pop(name) for name in list(changes) if "__" in name}
    tree = tiny_config(data, run_dir, **{"train__steps": STEPS, **settings}).model_dump(mode="json", exclude_unset=True)
    return RunConfig.model_validate(tree | {"model": MODELS[shape]} | changes)


def run_and_collect(config: RunConfig) -> dict[str, torch.Tensor]:
    with SignalWatch() as signals:
        run = start_run(config, signals)
        assert run_steps(run) == DONE
        weights = collect_weights(run)
        close_run(run)
    return weights


def test_the_ramp_is_cubic_and_a_function_of_the_step():
    section = PruneConfig(groups="heads", keep=0.2, start_step=10, every_steps=5, end_step=32)
    assert [step for step in range(40) if prunes_after(section, step)] == [10, 15, 20, 25, 30, 32]
    assert pruned_share(section, 9) == pruned_share(section, 10) == 0
    assert pruned_share(section, 21) == pytest.approx(0.8 * (1 - 0.5**3))
    assert pruned_share(section, 32) == pruned_share(section, 99) == 0.8


def test_experts_that_were_pruned_are_no_collapse(data: DataConfig, tmp_path: Path) -> None:
    run_and_collect(pruning_config(data, tmp_path, prune=pruning("experts"), train__steps=EXPERT_STEPS))
    assert read_events(tmp_path, "pruned")[-1]["zero"] == 2
    assert read_events(tmp_path, "experts_collapsed") == []


ZEROS = {
    "channels": [
        ("blocks.3.mixer.up_proj.weight", 0, 48),
        ("blocks.3.mixer.up_proj.bias", 0, 48),
        ("blocks.1.mixer.shared.down_proj.weight", 1, 8),
    ],
    "experts": [("blocks.1.mixer.experts.up", 0, 2), ("blocks.1.mixer.experts.down", 0, 2)],
    "heads": [("blocks.2.mixer.k_proj.weight", 0, 8), ("blocks.2.mixer.o_proj.weight", 1, 16)],
}


def count_zeros(tensor: torch.Tensor, dim: int) -> int:
    return int((tensor == 0).transpose(0, dim).reshape(tensor.shape[dim], -1).all(dim=1).sum())


@pytest.mark.parametrize(
    "groups", ["channels", *(pytest.param(name, marks=pytest.mark.slow) for name in ("experts", "heads"))]
)
def test_groups_stay_zero_while_the_rest_trains_and_a_cut_run_gives_the_same_bits(
    data: DataConfig, tmp_path: Path, groups: str
) -> None:
    weights = run_and_collect(pruning_config(data, tmp_path / "whole", prune=pruning(groups)))
    for name, dim, expected in ZEROS[groups]:
        assert count_zeros(weights[name], dim) == expected, name
    # Steps 4 to 6 had no one to hold the zeros.
    events = read_events(tmp_path / "whole", "pruned")
    assert [event["step"] for event in events] == [2, 3]
    if groups == "experts":
        bias = weights["blocks.1.mixer.expert_bias"]
        dead = (weights["blocks.1.mixer.experts.up"] == 0).flatten(1).all(dim=1)
        assert (bias[dead] == PRUNED_BIAS).all() and (bias[~dead].abs() < 1).all()
        counts = [line["expert_load"] for line in read_metrics(tmp_path / "whole")]
        assert counts[-1]["1"] >= 1.99  # two of four experts share all tokens: at least twice the mean
    for stop in (2, STEPS):
        cut = run_and_collect(
            pruning_config(data, tmp_path / "cut", prune=pruning(groups), train__stop_after_steps=stop)
        )
    assert all(torch.equal(cut[name], value) for name, value in weights.items())


def test_the_smallest_go_and_norms_are_those_of_the_whole_parameters(data: DataConfig, tmp_path: Path) -> None:
    config = pruning_config(data, tmp_path, "squared_relu", prune=pruning("channels"), train__stop_after_steps=1)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        assert run_steps(run) == DONE
        plan = plan_groups(config.model, "channels")
        view = MasterView(run.saver.layout, run.saver.writers, 0)
        squares = view.sum_groups(plan.groupings, plan.num_groups)
        up, down = (run.model.get_parameter(f"blocks.3.mixer.{name}_proj.weight") for name in ("up", "down"))
        expected = up.double().square().sum(1) + down.double().square().sum(0)
        close_run(run)
    (unit,) = [unit for unit in plan.units if unit.place == "blocks.3.mixer."]
    torch.testing.assert_close(squares[unit.first : unit.first + unit.count], expected.detach(), rtol=1e-12, atol=0)


def test_forgetting_gives_the_embedding_new_first_values_and_no_moments(data: DataConfig, tmp_path: Path) -> None:
    forget = {"every_steps": 2, "until_step": 4}
    config = pruning_config(data, tmp_path / "run", forget=forget, train__stop_after_steps=4)
    weights = run_and_collect(config)
    seed = named_seed(config.train.seed, "forget.2")
    model = config.model
    values = initial_values("embedding.weight", (model.vocab_size, model.hidden_size), model, seed)
    assert torch.equal(weights["embedding.weight"], values)
    assert [event["step"] for event in read_events(tmp_path / "run", "forgot")] == [2, 4]
    whole = run_and_collect(pruning_config(data, tmp_path / "whole", forget=forget))
    rest = run_and_collect(pruning_config(data, tmp_path / "run", forget=forget))
    assert all(torch.equal(rest[name], value) for name, value in whole.items())
    assert not torch.equal(whole["embedding.weight"], values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prune": pruning("channels", 0.3)},
            r"prune.keep = 0.3: of model.feed_forward.hidden_size=48 is not an integer",
        ),
        ({"prune": pruning("heads", 0.4)}, r"of model.attention.num_kv_heads=2 is not an integer; use 0.5"),
        ({"prune": pruning("experts", 0.25)}, r"leaves fewer than model.moe.top_k=2; use at least 0.5"),
        ({"prune": pruning("channels") | {"end_step": 9}}, r"prune.end_step = 9: is beyond the 6 steps"),
        (
            {"prune": pruning("channels") | {"start_step": 3}},
            r"prune.start_step = 3: must be less than prune.end_step=3",
        ),
        (
            {"prune": pruning("heads"), "model": MODEL | {"pattern": "ME-"}},
            "model.pattern has no block with heads that can go",
        ),
        (
            {"prune": pruning("experts"), "model": MODEL | {"moe": MODEL["moe"] | {"expert_bias": False}}},
            r"needs model.moe.expert_bias=true",
        ),
        (
            {"prune": pruning("experts"), "model": MODEL | {"moe": MODEL["moe"] | {"bias": True}}},
            r"does not go with model.moe.bias=true",
        ),
        (
            {
                "prune": pruning("channels"),
                "model": MODEL | {"feed_forward": {"hidden_size": 48, "linear_kind": "lowrank", "linear_rank": 4}},
            },
            r"needs dense matrices, and model.feed_forward has lowrank ones",
        ),
        ({"forget": {"every_steps": 4, "until_step": 2}}, r"forget.every_steps = 4: is more than forget.until_step=2"),
        ({"forget": {"every_steps": 2, "until_step": 6}}, r"forget.until_step = 6: must be less than the 6 steps"),
    ],
)
def test_what_cannot_be_pruned_or_forgotten_is_refused(data: DataConfig, tmp_path: Path, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(pruning_config(data, tmp_path, **changes))


LAYOUTS: list[dict[str, Any]] = [
    {"zero_stage": 0},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2},
    {"expert": 2},
]


def run_layouts(data: DataConfig, folder: str) -> None:
    forget = {"every_steps": 2, "until_step": 2}
    for number, layout in enumerate(LAYOUTS):
        for groups in PRUNED_GROUPS:
            config = pruning_config(
                data, Path(folder, f"{number}-{groups}"), prune=pruning(groups), forget=forget, parallel=layout
            )
            run_and_collect(config)


@pytest.mark.slow
def test_every_axis_prunes_and_forgets_as_one_rank(data: DataConfig, tmp_path: Path) -> None:
    run_ranks(run_layouts, data, str(tmp_path), num_ranks=2)
    forget = {"every_steps": 2, "until_step": 2}
    for groups in PRUNED_GROUPS:
        run_and_collect(pruning_config(data, tmp_path / groups, prune=pruning(groups), forget=forget))
        expected, weights = read_metrics(tmp_path / groups), read_weights(tmp_path / groups).state
        for number, layout in enumerate(LAYOUTS):
            folder = tmp_path / f"{number}-{groups}"
            losses = [line["loss"] for line in read_metrics(folder)]
            # float32 sums in another order.
            assert losses == pytest.approx([line["loss"] for line in expected], rel=2e-4), (layout, groups)
            found = read_weights(folder).state
            for name, _, _ in ZEROS[groups]:
                assert torch.equal(found[name] == 0, weights[name] == 0), (layout, name)
