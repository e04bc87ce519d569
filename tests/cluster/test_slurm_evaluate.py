"""An evaluation over two nodes of Slurm, as a job that amfm evaluate submits."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster.cluster import PATIENCE_SECONDS, amfm, cluster, missing, wait_until
from tests.cluster.conftest import write_run
from tests.cluster.test_slurm import state

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing("slurm")), reason=missing("slurm")),
]


def loss_of(text: str) -> float:
    found = re.search(r'"loss": ([\d.]+)', text)
    assert found, text
    return float(found[1])


def test_an_evaluation_over_two_nodes_finds_the_loss_of_one_rank(folder: Path) -> None:
    write_run(folder, folder / "run", train__steps=4, schedule__warmup_steps=1, launch__slurm={"gpus": False})
    subprocess.run(amfm("train", folder / "run.yaml"), check=True, capture_output=True)
    asked = amfm("evaluate", folder / "run", "--max-tokens", "2000", "--precision", "float32", "--json")
    alone = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    with cluster(2, "slurm", folder=folder) as nodes:
        job = nodes.run(0, *asked, "--on", "slurm", "--nodes", "2").split()[-1]
        log = folder / "run" / "logs" / f"slurm-{job}.log"
        wait_until(lambda: state(nodes, job) not in ("PENDING", "RUNNING", "COMPLETING"), PATIENCE_SECONDS, log)
        assert state(nodes, job) == "COMPLETED", log.read_text()
    assert loss_of(log.read_text()) == pytest.approx(loss_of(alone), rel=1e-5)
