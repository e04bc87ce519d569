"""The update is that of the paper's algorithms, and an installed package's optimizer of matrices trains and resumes with bitwise identical results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from amfm_soap import Options, shapes, update
from torch import Tensor

from tests.helpers.examples import amfm, install_example
from tests.pretrain.tiny_run import tiny_config, tiny_data

RATE, DECAY, BETA1, BETA2, EPSILON = 0.01, 0.5, 0.9, 0.95, 1e-8


def steps_of_the_paper(weight: Tensor, gradients: list[Tensor], frequency: int) -> Tensor:
    """Algorithms 3 and 4 for one matrix in float64, with eigenvectors from a singular value decomposition at the first step."""
    weight = weight.clone()
    left, right = gradients[0] @ gradients[0].T, gradients[0].T @ gradients[0]
    left_basis, right_basis = torch.linalg.svd(left).U, torch.linalg.svd(right).U
    momentum, squares = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients[1:], 1):
        momentum = BETA1 * momentum + (1 - BETA1) * gradient
        rotated = left_basis.T @ gradient @ right_basis
        squares = BETA2 * squares + (1 - BETA2) * rotated * rotated
        mean, size = momentum / (1 - BETA1**step), squares / (1 - BETA2**step)
        inner = (left_basis.T @ mean @ right_basis) / (torch.sqrt(size) + EPSILON)
        weight = weight - RATE * DECAY * weight - RATE * left_basis @ inner @ right_basis.T
        left = BETA2 * left + (1 - BETA2) * gradient @ gradient.T
        right = BETA2 * right + (1 - BETA2) * gradient.T @ gradient
        if (step + 1) % frequency == 0:
            left_basis, right_basis = torch.linalg.qr(left @ left_basis).Q, torch.linalg.qr(right @ right_basis).Q
    return weight


def test_the_update_is_the_papers() -> None:
    draw = torch.Generator().manual_seed(0)
    # A wide and a tall matrix would have bases of their null spaces, which are anyone's choice: square ones have none.
    weights = torch.randn(2, 7, 7, dtype=torch.float64, generator=draw)
    gradients = [torch.randn(2, 7, 7, dtype=torch.float64, generator=draw) for _ in range(7)]
    options, found = Options(frequency=3), weights.clone()
    state = {name: weights.new_zeros(2, *shape) for name, shape in shapes(7, 7, options).items()}
    group = {"lr": RATE, "weight_decay": DECAY, "betas": (BETA1, BETA2), "eps": EPSILON}
    for step, gradient in enumerate(gradients, 1):
        found = update(found, gradient, state, step, group, options)
    for own, weight, *drawn in zip(found, weights, *gradients):
        torch.testing.assert_close(own, steps_of_the_paper(weight, drawn, 3), rtol=0, atol=1e-10)


def configure(folder: Path) -> list[Path]:
    """Write a run of six steps; returns where the installed package is."""
    config = tiny_config(tiny_data(folder / "data"), folder / "whole", train__steps=6)
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["optimizer"] = {"kind": "soap", "learning_rate": 3e-3, "options": {"soap": {"frequency": 2}}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return install_example("soap", folder / "packages")


def train(folder: Path, packages: list[Path], *overrides: str) -> None:
    done = amfm("train", "run.yaml", *overrides, packages=packages, cwd=folder)
    assert done.returncode == 0, done.stderr


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_installed_it_trains_and_its_state_is_saved(tmp_path: Path) -> None:
    train(tmp_path, configure(tmp_path))
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    (manifest,) = (tmp_path / "whole" / "checkpoints").glob("*6/manifest.json")
    saved = json.loads(manifest.read_text())
    assert set(saved["groups"]) == {"matrices", "decay", "no_decay"}
    assert saved["packages"] == {"optimizer.kind": "amfm-soap 1.0"}
    kept = {name.rpartition("/")[2] for name in saved["buffers"] if name.startswith("optimizer/")}
    assert kept == set(shapes(1, 1, Options()))


@pytest.mark.slow
def test_it_resumes_bit_for_bit_and_exports_weights_alone(tmp_path: Path) -> None:
    packages = configure(tmp_path)
    train(tmp_path, packages)
    train(tmp_path, packages, "run.dir=cut", "train.stop_after_steps=3")
    train(tmp_path, packages, "run.dir=cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    exported = amfm("export", "whole", "out", "--format", "huggingface", packages=packages, cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    packages += install_example("foreign_states", tmp_path / "foreign_states")
    refused = amfm("export", "whole", "other", "--format", "dcp", packages=packages, cwd=tmp_path)
    assert refused.returncode == 2 and "has states of whole matrices" in refused.stderr
