"""Runs whose indexers learn from dense attention and then choose: bitwise identical results wherever they are cut, and what is rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.pretrain.tiny_run import MODEL, collect_weights, read_metrics, tiny_config

INDEXER = {"top_k": 5, "head_dim": 8}
LATENT = {"num_heads": 4, "latent_size": 12, "nope_head_dim": 6, "rope_head_dim": 4, "value_head_dim": 5}
CHOOSING = MODEL | {
    "pattern": "M*E+",
    "attention": MODEL["attention"] | {"indexer": INDEXER},
    "mixers": {"mla": LATENT | {"query_latent_size": 10, "positions": "rope", "indexer": INDEXER}},
}
STAGES = [{"name": "dense", "steps": 3, "indexer": "warm_up"}, {"name": "sparse", "steps": 3, "indexer": "sparse"}]


def choosing_config(
    data: DataConfig,
    run_dir: Path,
    stages: list[dict[str, Any]] = STAGES,
    model: dict[str, Any] = CHOOSING,
    **more: Any,
) -> RunConfig:
    tree = tiny_config(data, run_dir, **more).model_dump(mode="json", exclude_unset=True) | {"stages": stages}
    tree["train"].pop("steps")
    return RunConfig.model_validate(tree | {"model": model})


def run_to(config: RunConfig) -> dict[str, torch.Tensor]:
    with SignalWatch() as signals:
        run = start_run(config, signals)
        run_steps(run)
        weights = collect_weights(run)
        close_run(run)
    return weights


def test_both_stages_give_the_same_bits_wherever_they_are_cut(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run_to(choosing_config(data, tmp_path / "whole", train__checkpoint_every_steps=1, train__keep_last=9))
    for stop in (2, 5, None):  # within either stage
        found = run_to(choosing_config(data, tmp_path / "cut", train__stop_after_steps=stop))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    whole, cut = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "cut")
    for key in ("loss", "grad_norm", "auxiliary"):
        assert [line[key] for line in cut] == [line[key] for line in whole]
    assert all(line["auxiliary"]["indexer"] > 0 for line in whole)
    told = capsys.readouterr()
    assert "amfm export will reject it" not in told.out + told.err
    for step, stage in ((3, "warm_up"), (4, "sparse")):
        model = read_weights(tmp_path / "whole" / "checkpoints" / f"step-{step:08d}").model
        assert model.attention is not None and model.attention.indexer is not None
        assert (model.attention.indexer.stage, model.mixers.mla.indexer.stage) == (stage, stage)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL}, r"stages\.0\.indexer = warm_up: has no effect: no block of model\.pattern has an indexer"),
        (
            {"low_precision__recipe": "fp8_block", "low_precision__emulate": True},
            r"low_precision\.recipe = fp8_block: was not tried with an indexer",
        ),
        (
            {"model": CHOOSING | {"pattern": "M*E", "mup": {"base_hidden_size": 16}}},
            r"model\.mup has no rule for an indexer",
        ),
        ({"export__target": "kimi_linear"}, r"model\.attention\.indexer: kimi_linear has no indexer"),
    ],
)
def test_what_does_not_go_with_an_indexer_is_refused_by_name(
    changes: dict[str, Any], message: str, data: DataConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(choosing_config(data, tmp_path, **changes), 1)
