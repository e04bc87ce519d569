"""The cycles have the values of the paper's equation, and an installed package's schedule trains and resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from amfm_sgdr import Options, factor

from amfm.pretrain.config.schema import ScheduleConfig
from tests.pretrain.tiny_run import tiny_config, tiny_data


def test_each_cycle_falls_from_the_peak_to_the_floor() -> None:
    schedule = ScheduleConfig(warmup_steps=2, min_ratio=0.2)
    curve = [factor(step, 10, schedule, Options(cycles=2)) for step in range(2, 11)]
    half = [1.0, 0.2 + 0.8 * 0.853553390593, 0.6, 0.2 + 0.8 * 0.146446609407]
    assert curve == pytest.approx([*half, *half, 0.2])


@pytest.mark.slow
def test_installed_it_trains_and_resumes_and_is_named_where_it_is_not(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    metadata = tmp_path / "packages" / "amfm_sgdr-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: amfm-sgdr\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[amfm.schedules]\nsgdr = amfm_sgdr:SPEC\n")
    tree = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run", train__steps=6).model_dump(
        mode="json", exclude_unset=True
    )
    tree["schedule"] = {"kind": "sgdr", "warmup_steps": 2, "min_ratio": 0.0, "options": {"sgdr": {"cycles": 2}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))

    def train(
        *overrides: str,
        file: str = "run.yaml",
        packages: tuple[Path, ...] = (metadata.parent, root / "examples" / "sgdr"),
    ) -> str:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*packages, root))), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "amfm.launch", "train", str(tmp_path / file), *overrides]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if packages else 2), done.stderr
        return done.stderr

    train("train.stop_after_steps=4")
    train()
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1.5e-3, 3e-3, 1.5e-3, 3e-3, 1.5e-3, 0.0])
    assert "sgdr" in train(packages=())
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree | {"schedule": {"kind": "constant", "warmup_steps": 2}}))
    resumed = train(file="other.yaml", packages=())
    assert "the saved schedule sgdr is of amfm-sgdr 1.0, which is not installed here" in resumed
