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
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from tests.pretrain.tiny_run import MODEL, read_events, tiny_config, tiny_data

OPTIONS = EnvelopeOptions(keep=0.5, strength=2.0, start_step=1, end_step=3)


def energy(x: Tensor, z: Tensor, kept: int, strength: float) -> Tensor:
    """|x - z|^2 / 2 + strength / 2 |x|^2 of the k-support norm, in the form that sorts (Argyriou et al. 2012, arXiv 1204.5043)."""
    size = x.abs().sort(descending=True).values
    for r in range(kept):
        rest = size[kept - r - 1 :].sum() / (r + 1)
        before = torch.inf if r == kept - 1 else size[kept - r - 2]
        if before > rest >= size[kept - r - 1]:
            break
    squared = size[: kept - r - 1].square().sum() + (r + 1) * rest.square()
    return 0.5 * (x - z).square().sum() + 0.5 * strength * squared


@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0])
def test_a_step_is_the_minimum_of_the_penalised_distance(strength: float) -> None:
    z = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs()
    x = proximal_step(z, 4, strength)
    least = energy(x, z, 4, strength)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-3):
        for _ in range(50):
            other = (x + size * torch.randn(12, dtype=torch.float64, generator=generator)).clamp(min=0)
            # Strictly convex: anything else is higher by half the squared distance.
            assert energy(other, z, 4, strength) >= least + 0.5 * (other - x).square().sum() - 1e-12
    factors = shrink_factors(z, 4, strength)
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


def run_amfm(*arguments: str, packages: Path) -> str:
    """What a verb prints, with what is installed in `packages`."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (packages, root / "examples" / "envelope", root)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "amfm.launch", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(2000)
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
    run_amfm("shrink", str(tmp_path / "cut"), str(tmp_path / "small"), packages=metadata.parent)
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
