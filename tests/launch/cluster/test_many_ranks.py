"""64 real ranks on one machine: they start, save, lose one and go on from the checkpoint; no rank talks to many others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from amfm.pretrain.config.file import resolved_yaml
from tests.pretrain.tiny_run import tiny_config, tiny_data

RANKS = 64

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_sixty_four_ranks_start_save_lose_one_and_go_on(tmp_path: Path) -> None:
    config = tiny_config(
        tiny_data(tmp_path / "data"),
        tmp_path / "run",
        train__steps=8,
        train__global_batch_size=RANKS,
        train__micro_batch_size=1,
        train__checkpoint_every_steps=3,
        train__num_threads=1,
        train__timeout_seconds=1800,
    )
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    words = ["launch", str(tmp_path / "run.yaml"), "--on", "torchrun", "--nproc-per-node", str(RANKS)]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "amfm.launch", *words, "--master", "localhost:29811"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 1800
    while not list((tmp_path / "run").glob("checkpoints/step-*/manifest.json")):
        assert launcher.poll() is None and time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.2)
    ranks = {process.name(): process for process in psutil.Process(launcher.pid).children(recursive=True)}
    peers = {}
    for rank in range(RANKS):
        connections = ranks[f"amfm-rank-{rank}"].net_connections("tcp")
        # Of each two that talk, both ends have one; what listens has no peer.
        peers[rank] = sum(1 for connection in connections if connection.raddr)
    ranks[f"amfm-rank-{RANKS - 1}"].kill()
    _, errors = launcher.communicate(timeout=1800)
    assert launcher.returncode == 0, errors[-4000:]
    assert [line["event"] for line in lines_of(tmp_path / "run/events.jsonl")].count("restarted") == 1
    assert sorted({line["step"] for line in lines_of(tmp_path / "run/metrics.jsonl")}) == list(range(1, 9))
    # Rank 0 serves the store to all; nobody else has a socket to every other.
    assert max(count for rank, count in peers.items() if rank) < RANKS, peers
