"""What a simulated rank cannot run is one message and exit 2: an operation without a fake function, another torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from amfm_simulate import trace
from amfm_simulate.tracer import Tracer
from amfm_simulate.verbs import PlanTrace
from torch._subclasses.fake_tensor import FakeTensorMode

from amfm.launch.cli import run
from amfm.launch.plan.blocks.measured import lacks_fake
from benchmarks.small_steps import DEFAULTS

ROOT = Path(__file__).parents[3]
SPEC = """
from amfm.model.config.mixer_options import HeadOptions
from amfm.model.config.kinds import Kind


class BlindOptions(HeadOptions):
    \"\"\"Has its own operation.\"\"\"


SPEC = Kind("blind", "blind_mixer:BlindMixer", BlindOptions)
"""
MIXER = """
import torch

from amfm_mixers.retention import LightningMixer


@torch.library.custom_op("blind::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class BlindMixer(LightningMixer):
    def output(self, o_BTHV, parts):
        return double(super().output(o_BTHV, parts))
"""


@torch.library.custom_op("amfm_tests::without_fake", mutates_args=())
def without_fake(x: torch.Tensor) -> torch.Tensor:
    """An operation whose shapes no one told."""
    return x * 2


def test_an_operation_without_a_fake_function_is_named():
    with pytest.raises(ValueError, match=r"amfm_tests.without_fake.default .* has no fake function: register one"):
        with FakeTensorMode(), Tracer(torch.device("cpu")):
            without_fake(torch.empty(2))
    # An operation that fails for another reason fails as it does.
    assert not lacks_fake(RuntimeError("shapes do not fit"))


def test_another_torch_ends_the_command(tmp_path, capsys, monkeypatch):
    path = tmp_path / "small.yaml"
    settings = DEFAULTS | {"model": DEFAULTS["model"] | {"pattern": "-"}}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setattr(trace, "TORCH_RELEASES", ("1.13",))
    assert run(["plan", str(path), "--gpus", "1", "--trace"]) == 2
    said = capsys.readouterr().err
    assert "--trace is written for torch 1.13, and this is" in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_mixer_whose_operation_has_no_fake_function_ends_the_command(backend, tmp_path):
    (tmp_path / "blind_plugin.py").write_text(SPEC)
    (tmp_path / "blind_mixer.py").write_text(MIXER)
    metadata = tmp_path / "blind-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: blind\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[amfm.mixers]\nblind = blind_plugin:SPEC\n")
    model = DEFAULTS["model"] | {"pattern": "({blind}-)*2", "mixers": {"blind": {"num_heads": 2, "head_dim": 16}}}
    settings = DEFAULTS | {"model": model, "kernels": {"backend": backend}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "amfm.launch", "plan", str(path), "--gpus", "1", "--trace"]
    paths = os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"]))  # and amfm_simulate, of conftest.py
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2, done.stderr
    assert "{blind}, which cannot be planned" in done.stderr and "Traceback" not in done.stderr


def test_a_trace_without_triton_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    PlanTrace(None, None, None)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="need Triton, which is not installed; pip install triton"):
        PlanTrace(None, None, None)
