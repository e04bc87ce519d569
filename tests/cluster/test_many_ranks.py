"""64 ranks on the cores of this machine, 8 on each of eight hosts: they start, save, lose one and continue."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.cluster import (
    PATIENCE_SECONDS,
    Cluster,
    amfm,
    cluster,
    end_well,
    events,
    metrics,
    missing,
    wait_until,
)
from tests.cluster.conftest import WatchRun, check_losses, write_run
from tests.cluster.test_ssh import launch

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing("ssh")), reason=missing("ssh")),
]
NODES, RANKS, STEPS = 8, 8, 12
LOST = 37
NEEDED_BYTES = 8 * 2**30  # half a GiB for each rank of a node, which its check asks for, and the servers of all nodes


def memory_of_rank(nodes: Cluster, rank: int) -> int:
    """Bytes of memory that a rank holds, with its share of each page that others hold too."""
    pid = nodes.run(1 + rank // RANKS, "pgrep", "-x", f"amfm-rank-{rank}")
    text = nodes.run(1 + rank // RANKS, "grep", "^Pss:", f"/proc/{pid}/smaps_rollup")
    return 1024 * int(text.split()[1])


def test_sixty_four_ranks_save_lose_one_and_continue(folder: Path, watch: WatchRun) -> None:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    if (free := 1024 * int(fields["MemAvailable"].split()[0])) < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES / 2**30:.0f} GiB of free memory, {free / 2**30:.1f} are")
    settings = {
        "train__steps": STEPS,
        "train__global_batch_size": NODES * RANKS,
        "train__micro_batch_size": 1,
        "train__sequence_length": 64,
        "train__checkpoint_every_steps": 2,
        "train__timeout_seconds": 900,
        "launch__heartbeat_seconds": 600.0,
    }
    write_run(folder, folder / "alone" / "run", **settings | {"train__micro_batch_size": RANKS})
    subprocess.run(amfm("train", folder / "alone" / "run.yaml"), check=True, capture_output=True)
    expected = [line["loss"] for line in metrics(folder / "alone" / "run")]
    write_run(folder, folder / "run", **settings)
    log = folder / "launch.log"
    with cluster(NODES, "ssh", folder=folder) as nodes:
        hosts = "".join(f"node{number}\n" for number in range(1, NODES + 1))
        launcher = launch(nodes, folder, hosts=hosts, ranks=RANKS)
        wait_until(lambda: len(metrics(folder / "run")) > 1, PATIENCE_SECONDS, log)
        held = sum(memory_of_rank(nodes, rank) for rank in range(1, NODES * RANKS, RANKS)) / NODES / 2**20
        wait_until(lambda: len(metrics(folder / "run")) > 2, PATIENCE_SECONDS, log)
        what = f"rank {LOST} of {NODES * RANKS} killed; each holds {held:.0f} MiB"
        with watch("ssh", what, expected=expected) as row:
            nodes.run(1 + LOST // RANKS, "pkill", "-KILL", "-x", f"amfm-rank-{LOST}")
            end_well(launcher, log)
    (restarted,) = events(folder / "run", "restarted")
    assert f"node{1 + LOST // RANKS}" in restarted["cause"]
    assert row.ranks == (NODES * RANKS, NODES * RANKS)
    check_losses(folder / "run", expected)
