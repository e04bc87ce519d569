"""An optimizer of a package in a configuration: what it does not go with is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.launch.plan.activations import storage_of
from amfm.pretrain.checks import sections as checks
from amfm.pretrain.config import optimizers, schema
from amfm.pretrain.config.optimizers import OptimizerSpec
from amfm.pretrain.engine.adamw import moments_of
from tests.pretrain.tiny_run import tiny_config, tiny_data


def test_ours_are_known_without_any_package_and_labels_name_their_moments() -> None:
    assert set(optimizers.OWN_OPTIMIZERS) == {"adamw", "muon"} and not optimizers.optimizer_specs()
    assert moments_of("one_decay") == moments_of("muon") == ("momentum",)
    assert moments_of("decay") == moments_of("no_decay") == ("exp_avg", "exp_avg_sq")


def test_a_packages_optimizer_is_refused_with_mup_and_bf16_states_and_planned_by_its_moments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = OptimizerSpec("mine", "none:update", num_moments=1, options=schema.MuonConfig)
    for module in (checks, schema):
        monkeypatch.setattr(module, "optimizer_specs", lambda: {"mine": spec})
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run", optimizer__state_dtype="bf16")
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"kind": "mine"})})
    assert storage_of(config).num_moments == 1
    problems = [problem for problem in checks.optimizer_problems(config) if "mine" in problem.rule]
    assert [problem.key for problem in problems] == ["optimizer.state_dtype"]
