"""Collapse of experts: what counts as one, and when a run says that nothing prevents it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.config.file import load_config
from amfm.pretrain.monitor.experts import EXPERT_STEPS, describe_unbalanced, find_collapsed
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.pretrain.tiny_run import MODEL, read_events, tiny_config

CONFIGS = Path(__file__).parents[3] / "configs"


def test_a_block_collapses_when_its_fullest_expert_takes_nearly_every_token() -> None:
    counts = {1: [50, 50, 50, 50], 4: [100, 97, 2, 1], 7: [85, 85, 15, 15]}
    assert find_collapsed(counts, top_k=2) == {4: 1.0}
    assert find_collapsed({1: [10, 10, 10, 9]}, top_k=4) == {}, "every expert takes every token by design"
    assert find_collapsed({1: [0, 0, 0, 0]}, top_k=2) == {}


def model_with(**changes: Any) -> ModelConfig:
    """The tiny model without any balancing, changed."""
    plain = {"expert_bias": False, "auxiliary_loss_weight": 0.0}
    return ModelConfig.model_validate({**MODEL, "moe": {**MODEL["moe"], **plain, **changes}})


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_bias": True},
        {"auxiliary_loss_weight": 1e-3},
        {"sequence_loss_weight": 1e-4},
        {"top_k": 4},
        {"capacity_factor": 1.5, "overflow": "recycle"},
    ],
)
def test_settings_that_balance_are_left_alone(changes: dict[str, Any]) -> None:
    assert describe_unbalanced(model_with(**changes)) is None


def test_what_would_balance_is_named_as_the_router_allows() -> None:
    assert "model.moe.expert_bias=true" in str(describe_unbalanced(model_with()))
    assert describe_unbalanced(model_with(expert_bias=True, bias_update_rate=0.0)) is not None
    softmax = str(describe_unbalanced(model_with(router="softmax")))
    assert "auxiliary_loss_weight" in softmax and "expert_bias" not in softmax


def test_a_run_says_at_its_start_that_nothing_balances_and_once_that_a_block_collapsed(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = model_with(expert_bias=True, bias_update_rate=0.0).model_dump(mode="json")["moe"]
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, tmp_path, train__steps=2 * EXPERT_STEPS, model__moe=moe), signals)
        bias = next(buffer for name, buffer in run.model.named_buffers() if name.endswith("expert_bias"))
        bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
        assert run_steps(run) == 0
        close_run(run)
    said = capsys.readouterr().err
    assert "warning: nothing balances the 4 experts" in said
    assert (
        said.count("routing has collapsed: the same experts receive nearly all tokens in block 1 (100% of tokens)") == 1
    )
    assert len(read_events(tmp_path, "unbalanced_experts")) == 1
    collapsed = read_events(tmp_path, "experts_collapsed")
    assert [(event["step"], event["token_share"]) for event in collapsed] == [(EXPERT_STEPS, {"1": 1.0})]


def test_every_preset_balances_its_experts() -> None:
    for path in sorted(CONFIGS.glob("*.yaml")):
        assert describe_unbalanced(load_config(path).model) is None, path.name
