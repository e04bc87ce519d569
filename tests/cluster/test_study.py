"""Runs of a study, of a mixer from a folder of `plugins`, as jobs of Slurm and as actors of a Ray cluster."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.cluster.cluster import amfm, cluster, metrics, missing
from tests.cluster.conftest import write_run
from tests.helpers.examples import ROOT, install_example
from tests.launch.test_own_parts import mixer_program
from tests.pretrain.tiny_run import MODEL

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing("slurm")), reason=missing("slurm")),
]
STUDY = """\
dir: {folder}/study
tasks: [{{name: text, config: run.yaml}}]
grid: {{optimizer.learning_rate: [0.001, 0.002, 0.004]}}
halving: {{rungs: [0.5], keep: 0.6}}
"""


def write_study(folder: Path, *lines: str) -> list[str]:
    """A study of three rates, of which two continue at half of four steps; returns its command.

    Its model is a mixer of a folder, which each rank imports.
    """
    config = write_run(folder, folder / "run", train__steps=4, schedule__warmup_steps=1, train__global_batch_size=4)
    parts = folder / "my_parts"
    parts.mkdir()
    (parts / "__init__.py").write_text("from my_parts import halving\n")
    (parts / "halving.py").write_text(mixer_program())
    tree = config.model_dump(mode="json", exclude_unset=True)
    mixers = {"halving": {"num_heads": 4, "head_dim": 8}}
    tree |= {"plugins": [str(parts)], "model": {**MODEL, "pattern": "{halving}-", "mixers": mixers}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    (folder / "study.yaml").write_text(STUDY.format(folder=folder) + "\n".join(lines) + "\n")
    paths = [*install_example("study", folder / "packages"), ROOT / "src"]
    words = amfm("study", "settings", folder / "study.yaml", "--json")
    return ["env", f"PYTHONPATH={os.pathsep.join(map(str, paths))}", *words]


def check_study(folder: Path, printed: str) -> None:
    """All went as the file says, whoever ran them."""
    summary = json.loads(printed[printed.index("{") :])
    assert (summary["finished"], summary["failed"]) == (2, {})
    steps = sorted(len(metrics(run)) for run in (folder / "study" / "runs").iterdir())
    assert steps == [2, 4, 4]
    assert [row["ended_at"] is not None for row in summary["table"]].count(True) == 1


def test_runs_are_jobs_of_slurm(folder: Path) -> None:
    command = write_study(folder, "on: slurm")
    with cluster(2, "slurm", folder=folder) as nodes:
        check_study(folder, nodes.run(0, *command))
        check_study(folder, nodes.run(0, *command))  # submits nothing


def test_runs_are_actors_of_a_ray_cluster(folder: Path) -> None:
    command = write_study(folder, "on: ray", "ray_address: 10.77.0.11:6379")
    with cluster(2, "ray", folder=folder) as nodes:
        check_study(folder, nodes.run(1, "env", "-u", "RAY_AUTH_MODE", *command))
