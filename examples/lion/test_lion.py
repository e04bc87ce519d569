"""The update is that of the paper's algorithm, and an installed package's optimizer trains and resumes with bitwise identical results under ZeRO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from amfm_lion import Options, update

from tests.helpers.examples import amfm, install_example
from tests.pretrain.tiny_run import tiny_config, tiny_data


def test_the_update_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient, momentum = (torch.randn(63, generator=generator) for _ in range(3))
    before, kept = weight.double(), momentum.double()
    update(
        weight, gradient, {"momentum": momentum}, 1, {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.5}, Options()
    )
    direction = torch.sign(0.9 * kept + 0.1 * gradient.double())
    torch.testing.assert_close(weight.double(), before - 0.01 * (direction + 0.5 * before), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(momentum.double(), 0.99 * kept + 0.01 * gradient.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_installed_it_trains_and_resumes_bit_for_bit_with_one_moment_and_is_named_where_it_is_not(
    tmp_path: Path,
) -> None:
    packages = install_example("lion", tmp_path / "packages")
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "whole", train__steps=6, train__precision="bf16")
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["optimizer"] = {"kind": "lion", "learning_rate": 3e-4, "options": {"lion": {"beta": 0.8}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))

    def train(*overrides: str) -> str:
        done = amfm("train", "run.yaml", *overrides, packages=packages, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def losses(run: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    train()
    train("run.dir=cut", "train.stop_after_steps=3")
    train("run.dir=cut")
    assert losses("cut") == losses("whole") and losses("whole")[-1] < losses("whole")[0]
    (manifest,) = (tmp_path / "whole" / "checkpoints").glob("*6/manifest.json")
    saved = json.loads(manifest.read_text())
    assert set(saved["groups"]) == {"one_decay", "one_no_decay"}
    assert saved["packages"] == {"optimizer.kind": "amfm-lion 1.0"}
    missing = amfm("evaluate", "whole", packages=[], cwd=tmp_path)
    assert (
        missing.returncode == 2
        and "the saved optimizer lion is of amfm-lion 1.0, which is not installed" in missing.stderr
    )
