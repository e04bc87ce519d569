"""The envelope's step is the minimum that it should be, and as a hook it prunes a run that a cut does not change."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from amfm_envelope.hook import EnvelopeHook, proximal_step, shrink_factors
from amfm_envelope.spec import SPEC, EnvelopeOptions
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.tiny_run import MODEL, read_events, tiny_config, tiny_data

OPTIONS = EnvelopeOptions(keep=0.5, strength=2.0, start_step=1, end_step=3)


def energy(x: Tensor, z: Tensor, prices: Tensor, budget: float, strength: float) -> Tensor:
    """|x - z|^2 / 2 + strength / 2 min over u of sum x_i^2 / u_i, in the form that sorts (after arXiv 1204.5043, with prices).

    The largest |x_i| / sqrt(d_i) have u_i = 1, the others share what these leave in proportion to it.
    """
    order = (x.abs() / prices.sqrt()).argsort(descending=True)
    size, d = x.abs()[order], prices[order]
    best = torch.tensor(torch.inf, dtype=x.dtype)
    for whole in range(len(x)):
        left = budget - d[:whole].sum()
        share = left / (d[whole:].sqrt() * size[whole:]).sum()
        if left > 0 and share * size[whole] / d[whole].sqrt() <= 1 + 1e-12:
            # Feasible, and of all such the least is the minimum.
            squared = size[:whole].square().sum() + (d[whole:].sqrt() * size[whole:]).sum().square() / left
            best = torch.minimum(best, squared)
    return 0.5 * (x - z).square().sum() + 0.5 * strength * best


@pytest.mark.parametrize("priced", [False, True])
@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0])
def test_a_step_is_the_minimum_of_the_penalised_distance(strength: float, priced: bool) -> None:
    z = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs()
    prices = torch.ones_like(z)
    if priced:
        prices = torch.rand(13, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3 + 0.2
    x = proximal_step(z, prices, 4.0, strength)
    least = energy(x, z, prices, 4.0, strength)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-3):
        for _ in range(50):
            other = (x + size * torch.randn(13, dtype=torch.float64, generator=generator)).clamp(min=0)
            # Strictly convex: anything else is higher by half the squared distance.
            assert energy(other, z, prices, 4.0, strength) >= least + 0.5 * (other - x).square().sum() - 1e-12
    factors = shrink_factors(z, prices, 4.0, strength)
    torch.testing.assert_close(factors * z, x * (1 + strength), rtol=1e-12, atol=1e-14)
    assert float(factors.max()) <= 1 + 1e-12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data"))


def test_as_a_hook_it_shrinks_and_then_leaves_so_many_channels(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        hook = EnvelopeHook(OPTIONS, run)
        norms = []
        for _ in range(4):
            hook.after_step(train_step(run))
            norms.append(run.model.get_parameter("blocks.3.mixer.up_proj.weight").detach().norm(dim=1))
        close_run(run)
    assert [int((norm == 0).sum()) for norm in norms][2:] == [24, 24], "half of 48, which stay at zero"
    events = read_events(tmp_path, "hook")
    assert [(event["step"], event["name"]) for event in events] == [(step, "envelope") for step in (1, 2, 3)]
    assert events[0]["shrunk"] > 0 and events[2]["zero"] == 24 + 8


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return make_tiny_store(tmp_path_factory.mktemp("words"), num_documents=4000, mean_words=40)


def train_pruned(words: DataConfig, folder: Path, seed: int, *, priced: bool) -> tuple[float, float]:
    """The loss of the last 50 steps, on text never seen, after half of the weights of heads and channels went; the share left."""
    options = EnvelopeOptions(
        groups="heads and channels",
        budget="weights",
        keep=0.5,
        strength=2.0,
        start_step=150,
        every_steps=5,
        end_step=250,
    )
    wide = MODEL | {"pattern": "*-*-", "feed_forward": {"hidden_size": 96}}
    wide["attention"] = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 4}
    config = tiny_config(words, folder, train__steps=350, train__seed=seed, train__global_batch_size=16)
    config = config.model_copy(update={"model": ModelConfig.model_validate(wide)})
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 16})})
    with SignalWatch() as signals:
        run = start_run(config, signals)
        hook = EnvelopeHook(options, run)
        if not priced:
            hook.prices = torch.ones_like(hook.prices)
        losses = []
        for _ in range(350):
            losses.append(train_step(run))
            hook.after_step(losses[-1])
        squares = run.open_masters().sum_groups(hook.plan.groupings, hook.plan.num_groups)
        close_run(run)
    return sum(result.loss for result in losses[-50:]) / 50, float(hook.costs[squares > 0].sum() / hook.costs.sum())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_groups_end_at_the_same_share_of_the_weights_whether_or_not_they_pay_for_theirs(
    words: DataConfig, tmp_path: Path, seed: int
) -> None:
    (priced, left), (alike, left_alike) = (
        train_pruned(words, tmp_path / str(paid), seed, priced=paid) for paid in (True, False)
    )
    print(f"seed {seed}: {priced:.4f} with {left:.3f} of the weights, {alike:.4f} with {left_alike:.3f}")
    assert 0.48 < left <= 0.5 and 0.48 < left_alike <= 0.5


def run_amfm(*arguments: str, packages: Path) -> str:
    """What a verb prints, with what is installed in `packages`."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (packages, root / "examples" / "envelope", root, os.environ["PYTHONPATH"])))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "amfm.launch", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_installed_it_is_a_section_of_a_run_that_a_cut_does_not_change_and_shrink_takes_out(
    data: DataConfig, tmp_path: Path
) -> None:
    metadata = tmp_path / "packages" / "amfm_envelope-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: amfm-envelope\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[amfm.hooks]\nenvelope = amfm_envelope.spec:SPEC\n")
    tree = tiny_config(data, tmp_path / "whole").model_dump(mode="json", exclude_unset=True)
    tree["hooks"] = {"envelope": {"keep": 0.5, "strength": 2.0, "start_step": 1, "end_step": 3}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    for name, stops in {"whole": ([],), "cut": (["train.stop_after_steps=2"], [])}.items():
        for stop in stops:
            overrides = [f"run.dir={tmp_path / name}", *stop]
            run_amfm("train", str(tmp_path / "run.yaml"), *overrides, packages=metadata.parent)
    whole, cut = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    )
    assert len(whole) == 4 and whole == cut
    run_amfm("compact", str(tmp_path / "cut"), str(tmp_path / "small"), packages=metadata.parent)
    section = yaml.safe_load((tmp_path / "small" / "model.yaml").read_text())["model"]
    assert section["feed_forward"]["hidden_size"] == 24


def test_its_entry_point_names_the_spec_and_what_does_not_fit_is_refused(data: DataConfig, tmp_path: Path) -> None:
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["amfm.hooks"]["envelope"].partition(":")
    assert getattr(importlib.import_module(module), name) is SPEC and SPEC.load() is EnvelopeHook
    prune = {"groups": "heads", "keep": 0.5, "start_step": 1, "every_steps": 1, "end_step": 2}
    tree = tiny_config(data, tmp_path).model_dump(mode="json", exclude_unset=True)
    config = RunConfig.model_validate(tree | {"model": MODEL, "prune": prune})
    wrong = EnvelopeOptions(groups="experts", keep=0.3, start_step=4, end_step=9 - 5)
    broken = [field for field, _, _ in wrong.broken_rules(config, 3)]
    assert broken == ["start_step", "end_step", "groups", "groups", "keep", "keep"]
