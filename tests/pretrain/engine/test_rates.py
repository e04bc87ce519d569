"""Rates and weight decay by group: each parameter is in one, factors are those of its steps, under every layout and kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.matrices import list_matrices
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import OptimizerConfig, RunConfig
from amfm.pretrain.engine.optimizer import build_optimizer
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL, Trained, read_metrics, tiny_config, train_and_collect

FACTORS = {"embedding": 3.0, "head": 0.25, "norms": 2.0, "router": 0.5, "matrices": 1.5, "vectors": 4.0}


def with_rates(data: DataConfig, run_dir: Path, optimizer: dict[str, Any], **overrides: Any) -> RunConfig:
    tree = tiny_config(data, run_dir, optimizer__epsilon=1e-3, **overrides).model_dump(mode="json")
    return RunConfig.model_validate(tree | {"optimizer": tree["optimizer"] | optimizer})


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_parameter_has_the_factor_of_its_group(kind: str) -> None:
    model = HybridModel(ModelConfig.model_validate(MODEL), single_rank_groups())
    section = {
        "rates": FACTORS | ({"adamw": 10.0} if kind == "muon" else {}),
        "decays": {"embedding": 0.0, "router": 2.0},
    }
    config = OptimizerConfig.model_validate({"learning_rate": 1.0, "kind": kind, "weight_decay": 0.1} | section)
    stacks = list_matrices(model, single_rank_groups(), per_head=True) if kind == "muon" else ()
    groups = build_optimizer(model, config, stacks).param_groups
    found = {name: group for group in groups for name in group["parameter_names"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    others = 10.0 if kind == "muon" else 1.0
    for name, factor, decay in (
        ("embedding.weight", 3.0 * others, 0.0),
        ("head.weight", 0.25 * others, 0.1),
        ("final_norm.weight", 2.0 * others, 0.0),
        ("blocks.0.mixer.norm.weight", 2.0 * others, 0.0),
        ("blocks.1.mixer.router.weight", 0.5 * others, 0.2),
        ("blocks.1.mixer.experts.up", 1.5, 0.1),
        ("blocks.2.mixer.q_proj.weight", 1.5, 0.1),
        ("blocks.0.mixer.conv.weight", 1.5 * others, 0.1),
        ("blocks.0.mixer.A_log", 4.0 * others, 0.0),
    ):
        assert found[name].get("rate_scale", 1.0) == pytest.approx(factor), name
        assert found[name]["weight_decay"] == pytest.approx(decay), name


def test_the_same_factor_everywhere_is_another_rate_and_none_stands_still(data: DataConfig, tmp_path: Path) -> None:
    half = dict.fromkeys(FACTORS, 0.5)
    assert train(with_rates(data, tmp_path / "factors", {"learning_rate": 4e-3, "rates": half})) == 0
    assert train(with_rates(data, tmp_path / "plain", {"learning_rate": 2e-3})) == 0
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("factors", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert [line["lr"] for line in read_metrics(tmp_path / "factors")][1] == 4e-3
    still = train_and_collect(with_rates(data, tmp_path / "still", {"rates": {"embedding": 0.0}}))
    model = HybridModel(ModelConfig.model_validate(MODEL), single_rank_groups(), seed=0)
    assert torch.equal(still.weights["embedding.weight"], dict(model.named_parameters())["embedding.weight"])


@pytest.mark.parametrize(
    ("optimizer", "model", "message"),
    [
        ({"rates": {"adamw": 2.0}}, {}, "is for weights that Muon does not step, and optimizer.kind is adamw"),
        ({"rates": {"head": 2.0}}, {"tie_embeddings": True}, "matches nothing: model.tie_embeddings"),
        ({"decays": {"router": 2.0}}, {"pattern": "M*-", "moe": None}, "no block of model.pattern has a router"),
    ],
)
def test_a_group_that_matches_nothing_is_named(
    data: DataConfig, tmp_path: Path, optimizer: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    tree = with_rates(data, tmp_path, optimizer).model_dump(mode="json", exclude_unset=True)
    with pytest.raises(ConfigError, match=message):
        check_run(RunConfig.model_validate(tree | {"model": MODEL | model}), 1)


LAYOUTS: list[dict[str, Any]] = [
    {"parallel__zero_stage": 0},
    {"parallel__zero_stage": 3},
    {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    {"parallel__expert": 2, "parallel__zero_stage": 2},
    {"parallel__pipeline": 2},
    {"parallel__context": 2},
]
KINDS: list[dict[str, Any]] = [{"rates": FACTORS}, {"rates": FACTORS | {"adamw": 0.5}, "kind": "muon"}]


def train_all(data: DataConfig, folder: str, layouts: list[dict[str, Any]]) -> list[list[Trained]]:
    return [
        [
            train_and_collect(with_rates(data, Path(folder, f"{n}-{m}"), kind, train__micro_batch_size=1, **layout))
            for m, kind in enumerate(KINDS)
        ]
        for n, layout in enumerate(layouts)
    ]


@pytest.mark.slow
def test_every_layout_trains_as_one_rank(data: DataConfig, tmp_path: Path) -> None:
    ((expected,),) = (run_ranks(train_all, data, str(tmp_path / "one"), [{}], num_ranks=1)[0],)
    for layout, found in zip(LAYOUTS, run_ranks(train_all, data, str(tmp_path / "two"), LAYOUTS)[0]):
        for own, other, tolerance in zip(found, expected, (1e-5, 1e-4)):
            assert own.series("loss") == pytest.approx(other.series("loss"), rel=tolerance), layout
            assert own.series("grad_norm") == pytest.approx(other.series("grad_norm"), rel=10 * tolerance), layout
