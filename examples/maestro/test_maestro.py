"""Maestro's prefixes are near the best maps of their rank, ranks end by matrix while a run trains, and what is left is a model."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from amfm_maestro.__main__ import cut, multiply_out
from amfm_maestro.block import MaestroMixer
from amfm_maestro.spec import HOOK, SPEC, CutOptions, MaestroOptions

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.schema import RegisteredMixers
from amfm.model.mixers.interface import BuildContext
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.file import load_config
from amfm.pretrain.export.import_huggingface import write_model
from amfm.pretrain.inference.evaluate import evaluate_checkpoint
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.train import train
from tests.helpers.examples import (
    ROOT,
    assert_a_cut_changes_nothing,
    install_example,
    metrics_of,
    must,
    run_module,
)
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.tiny_run import MODEL, tiny_config

META = PackMeta.one_document_a_row(1, 12)
RANK, PENALTY, STEPS = 24, 1e-3, 240


def make_mixer(number: int = 0, alike: int = 1, **options: object) -> MaestroMixer:
    section = MaestroOptions(**{"hidden_size": 8, "rank": 6, **options})
    build = BuildContext(8, 1e-5, 0, 1, single_rank_groups(), "torch", RegisteredMixers(), None, number, alike)
    made = MaestroMixer(section, build).double()
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(made.init_parameter(name, tuple(parameter.shape), generator))
    return made.train()


def test_every_prefix_of_a_linear_map_is_near_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q for _ in range(2))
    values = 0.7 ** torch.arange(8).double()
    target, mixer = left @ values.diag() @ right.T, make_mixer()
    optimizer = torch.optim.Adam(mixer.factors("up"), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2400)
    one = torch.eye(8, dtype=torch.float64)
    for step in range(2400):
        mixer.set_step(step, 2400, 0)
        (mixer.multiply(one, "up").T - target).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    first, second = mixer.factors("up")
    for rank in range(1, 7):
        error = float((second[:, :rank] @ first[:rank] - target).square().sum())
        assert error <= 1.15 * float(values[rank:].square().sum()), rank


def test_a_draw_cuts_one_matrix_of_all_blocks_and_follows_from_seed_and_step() -> None:
    ranks = ((6, 2), (3, 6))
    blocks = [make_mixer(number, 2, ranks=ranks) for number in range(2)]
    drawn = []
    for step in range(80):
        for block in blocks:
            block.set_step(step, 80, 5)
        leading = [block.leading[which] for block in blocks for which in ("up", "down")]
        assert sum(a < b for a, b in zip(leading, (6, 2, 3, 6))) <= 1
        drawn.append(leading)
    assert [min(column) for column in zip(*drawn)] == [1, 1, 1, 1], "every matrix, down to one component"
    blocks[0].set_step(7, 80, 5)
    assert [blocks[0].leading[which] for which in ("up", "down")] == drawn[7][:2]
    x_BTD = torch.randn(1, 12, 8, dtype=torch.float64)
    blocks[0].leading = {"up": 2, "down": 1}
    up, down = (blocks[0].factors(which) for which in ("up", "down"))
    inner = (x_BTD @ up[0][:2].T @ up[1][:, :2].T).relu().square()
    expected = inner @ down[0][:1].T @ down[1][:, :1].T
    torch.testing.assert_close(blocks[0](x_BTD, META).y_BTD, expected, rtol=1e-12, atol=1e-12)
    whole = (x_BTD @ up[0].T @ up[1].T).relu().square() @ down[0].T @ down[1].T
    torch.testing.assert_close(blocks[0].eval()(x_BTD, META).y_BTD, whole, rtol=1e-12, atol=1e-12)


def test_the_penalty_is_the_sum_over_tails_with_gradients_and_none_where_they_are_gone() -> None:
    mixer = make_mixer(penalty=0.1, activation="swiglu")
    with torch.no_grad():
        mixer.up_first[4:] = 0
        mixer.up_second[:, 4:] = 0
    found = mixer(torch.randn(1, 12, 8, dtype=torch.float64), META).auxiliary["tails"]
    terms = []
    for first, second in (mixer.factors("up"), mixer.factors("down")):
        rank = 4 if first is mixer.up_first else 6
        terms += [first[b:rank].norm() + second[:, b:rank].norm() for b in range(rank)]
    expected, leaves = 0.1 * torch.stack(terms).sum(), list(mixer.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for actual, right in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)):
        assert torch.isfinite(actual).all()
        torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-12)


def test_its_entry_points_name_the_specs_and_wrong_options_are_refused() -> None:
    points = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]["entry-points"]
    for group, spec in (("amfm.mixers", SPEC), ("amfm.hooks", HOOK)):
        module, _, name = points[group]["maestro"].partition(":")
        assert getattr(importlib.import_module(module), name) is spec
        spec.load()
    wrong = MaestroOptions(hidden_size=4, rank=6, ranks=((7, 2),))
    assert [field for field, _ in [*wrong.broken_rules(), *wrong.broken_widths(8)]] == ["ranks", "rank"]
    with pytest.raises(ValueError, match=r"ranks has 1 entries, and model\.pattern 2 blocks"):
        make_mixer(0, 2, ranks=((6, 2),))
    assert CutOptions(start_step=1, every_steps=1).threshold == 0.01
    assert callable(cut) and callable(multiply_out)


def write_run(folder: Path, data: DataConfig, steps: int, seed: int = 0, **section: object) -> Path:
    folder.mkdir(exist_ok=True)
    tree = tiny_config(data, folder / "run").model_dump(mode="json", exclude_unset=True)
    tree["model"] = {**MODEL, "pattern": "*{maestro}*{maestro}"}
    tree["model"]["mixers"] = {"maestro": {"hidden_size": 64, "rank": RANK, "penalty": PENALTY, **section}}
    tree["train"] |= {
        "steps": steps,
        "seed": seed,
        "log_every_steps": 50,
        "validate_every_steps": steps,
        "validation_batches": 8,
        "micro_batch_size": 8,
        "global_batch_size": 8,
    }
    if section.get("penalty") != 0.0:
        cut_steps = {"start_step": max(2, steps // 2), "every_steps": max(1, steps // 8)}
        tree["hooks"] = {"maestro": {**cut_steps, "threshold": 0.03}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


@pytest.mark.slow
def test_a_run_is_cut_evaluated_trained_on_and_exported(tmp_path: Path) -> None:
    packages = install_example("maestro", tmp_path / "packages")
    data = make_tiny_store(tmp_path / "data", num_documents=200, mean_words=12)
    config = write_run(tmp_path, data, 8, penalty=2e-4)
    assert_a_cut_changes_nothing(config, tmp_path, packages, stop=5)
    assert len(metrics_of(tmp_path / "whole")[-1]["maestro_ranks"]) == 4
    for name, more in (("small", []), ("dense", ["dense"])):
        done = run_module("amfm_maestro", tmp_path / "whole", tmp_path / name, *more, packages=packages)
        assert done.returncode == 0 and "logits differ by" in done.stdout, done.stdout + done.stderr
    section = yaml.safe_load((tmp_path / "small" / "model.yaml").read_text())["model"]
    assert len(section["mixers"]["maestro"]["ranks"]) == 2
    store = yaml.safe_load(config.read_text())["data"]["store"]
    must("evaluate", tmp_path / "small", "--data", store, "--length", "48", "--json", packages=packages)
    must("export", tmp_path / "dense", tmp_path / "export", packages=packages)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["architectures"]


def nearest(weights: Weights, ranks: Sequence[int]) -> Weights:
    """The nearest matrices of these ranks, of up and down of each block: singular values from there on left out."""
    state = dict(weights.state)
    names = [f"blocks.{index}.mixer.{which}_proj.weight" for index in (1, 3) for which in ("up", "down")]
    for name, rank in zip(names, ranks, strict=True):
        left, values, right = torch.linalg.svd(state[name], full_matrices=False)
        state[name] = left[:, :rank] * values[:rank] @ right[:rank]
    return replace(weights, state=state)


def compare_ranks(folder: Path, seed: int) -> tuple[list[int], dict[str, float]]:
    """The ranks that a run finds, and held-out losses: its own; of a run with all components, and of the nearest matrices
    of the ranks found; of a run whose matrices have one rank and as many weights. In a process that finds the package.
    """
    data = make_tiny_store(folder / "data", num_documents=2000, mean_words=40)
    models: dict[str, Weights] = {}

    def run(name: str, **section: object) -> None:
        assert train(load_config(write_run(folder / name, data, STEPS, seed, **section), [])) == 0
        models[name] = multiply_out(read_weights(folder / name / "run"))

    run("found")
    ranks = [line["maestro_ranks"] for line in metrics_of(folder / "found" / "run") if "maestro_ranks" in line][-1]
    run("all", penalty=0.0, orders=False)
    models["nearest"] = nearest(models["all"], ranks)
    # Each component has as many weights, so that one rank for all is the mean.
    run("one", penalty=0.0, orders=False, rank=round(sum(ranks) / len(ranks)))
    losses = {}
    for name, weights in models.items():
        write_model(folder / f"{name}_weights", weights)
        found = evaluate_checkpoint(folder / f"{name}_weights", store=data.store, sequence_length=48)
        losses[name] = found.loss
    return ranks, losses


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_that_are_found_lose_less_than_the_nearest_matrices_of_these_ranks(tmp_path: Path, seed: int) -> None:
    packages = install_example("maestro", tmp_path / "packages")
    done = run_module("test_maestro", tmp_path, str(seed), packages=[*packages, ROOT])
    assert done.returncode == 0, done.stdout + done.stderr
    ranks, losses = json.loads(done.stdout.splitlines()[-1])
    print(f"\nseed {seed}: {ranks} of {RANK}; " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    # Not that they cost nothing: a rank for all, from the start, has the lower loss (docs/log/2026-11.md).
    assert len(set(ranks)) > 1 and sum(ranks) <= 0.75 * RANK * len(ranks)
    assert losses["found"] < losses["nearest"] - 0.1


if __name__ == "__main__":
    print(json.dumps(compare_ranks(Path(sys.argv[1]), int(sys.argv[2]))))
