"""Hosts behind a real sshd, or with a torchrun each: cut, half-open and slow links, stopped ranks, spares, nodes that are wrong."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from amfm.pretrain import stages
from tests.cluster.cluster import (
    FAKE_CLOCK,
    PATIENCE_SECONDS,
    START_SECONDS,
    Cluster,
    amfm,
    cluster,
    cut_for_a_while,
    end_well,
    events,
    metrics,
    missing,
    signal_ranks,
    wait_for_steps,
    wait_until,
    wrong_clock,
)
from tests.cluster.conftest import WatchRun, check_losses, write_run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing("ssh")), reason=missing("ssh")),
]

needs_fake_clock = pytest.mark.skipif(FAKE_CLOCK is None, reason="needs Debian's libfaketime")


def launch(
    nodes: Cluster,
    root: Path,
    *options: str,
    hosts: str = "node1\nnode2\n",
    count: int | None = None,
    ranks: int = 1,
) -> subprocess.Popen[bytes]:
    """`amfm launch --on torchrun` on the login node, its output in root/launch.log."""
    (root / "hostfile").write_text(hosts)  # `hosts` there is the nodes' /etc/hosts
    shell = f"ssh -F {root}/ssh_config -tt -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15"  # short: a node that is away is tried once more
    words = ("--on", "torchrun", "--hosts", root / "hostfile", "--nodes", str(count or len(hosts.split())))
    command = amfm(
        "launch", root / "run.yaml", *options, *words, "--nproc-per-node", str(ranks), "--remote-shell", shell
    )
    return nodes.start(0, root / "launch.log", *command)


@contextmanager
def training(
    folder: Path, num_nodes: int, *, count: int | None = None, steps: int = 13, **overrides: Any
) -> Iterator[tuple[Cluster, subprocess.Popen[bytes], Path]]:
    """A run on hosts of its own that has taken these steps: the cluster, the launcher, and the launcher's log."""
    write_run(folder, folder / "run", **overrides)
    log, hosts = folder / "launch.log", "".join(f"node{number}\n" for number in range(1, num_nodes + 1))
    with cluster(num_nodes, "ssh", folder=folder) as nodes:
        launcher = launch(nodes, folder, hosts=hosts, count=count)
        wait_for_steps(folder / "run", steps, log)
        yield nodes, launcher, log


@pytest.mark.parametrize(
    ("fault", "what"),
    [(("cut", 2), "link cut for good"), (("oneway", 2, "in"), "link open in one direction")],
    ids=["cut", "open_in_one_direction"],
)
def test_a_link_that_is_cut_for_good_is_named_and_the_other_host_goes_on(
    fault: tuple[Any, ...], what: str, folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    with training(folder, 2, steps=23, launch__heartbeat_seconds=20.0) as (nodes, launcher, log):
        with watch("ssh", what):
            nodes.fault(*fault)
            end_well(launcher, log)
    text = log.read_text()
    assert "continuing with 1 of 2 nodes" in text
    (restarted,) = events(folder / "run", "restarted")
    assert "node2" in restarted["cause"] and (fault[0] != "cut" or "amfm: rank 0 on node1" in restarted["cause"])
    assert "\x1b" not in text and "╭" not in text, "a panel was drawn into the log"
    check_losses(folder / "run", undisturbed)


def test_a_link_that_is_away_for_twenty_seconds_costs_nothing(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    with training(folder, 2, launch__heartbeat_seconds=120.0, train__timeout_seconds=PATIENCE_SECONDS) as (
        nodes,
        launcher,
        log,
    ):
        with watch("ssh", "link away for 20 s"):
            cut_for_a_while(nodes, 2, launcher)
            end_well(launcher, log)
    assert not events(folder / "run", "restarted")
    check_losses(folder / "run", undisturbed)


@needs_fake_clock
def test_a_slow_and_lossy_link_and_a_clock_that_is_slightly_off_cost_nothing(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    # The clock is off by more than the time without a sign of life after which a rank counts as lost.
    write_run(folder, folder / "run", launch__heartbeat_seconds=20.0, launch__setup=wrong_clock(2, -50))
    log = folder / "launch.log"
    with cluster(2, "ssh", folder=folder) as nodes:
        nodes.fault("slow", 2, "20mbit", "10")
        launcher = launch(nodes, folder)
        wait_until(lambda: metrics(folder / "run"), START_SECONDS, log)
        with watch("ssh", "20 Mbit/s, 1% lost, clock 50 s behind"):
            end_well(launcher, log)
    assert not events(folder / "run", "restarted") and "is excluded" not in log.read_text()
    check_losses(folder / "run", undisturbed)


def test_a_stopped_rank_is_named_by_the_other(folder: Path, undisturbed: list[float], watch: WatchRun) -> None:
    with training(folder, 2, launch__heartbeat_seconds=20.0) as (nodes, launcher, log):
        with watch("ssh", "rank stopped (SIGSTOP)"):
            nodes.run(2, "pkill", "-STOP", "amfm-rank")
            end_well(launcher, log)
    (restarted,) = events(folder / "run", "restarted")
    assert "rank 1 on node2" in restarted["cause"]
    check_losses(folder / "run", undisturbed)


def test_a_host_name_that_does_not_resolve_is_said_with_the_name(folder: Path) -> None:
    write_run(folder, folder / "run", launch__node_wait_seconds=1.0, launch__max_restarts=1)
    log = folder / "launch.log"
    with cluster(2, "ssh", folder=folder) as nodes:
        launcher = launch(nodes, folder, "launch.min_nodes=2", hosts="node1\nnowhere\n")
        assert launcher.wait(timeout=PATIENCE_SECONDS) == 3
    text = log.read_text()
    assert "nowhere: ssh: Could not resolve hostname nowhere" in text
    assert "1 node(s) can be used and launch.min_nodes=2" in text


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_hosts_whose_names_resolve_to_ipv6_alone_take_part(folder: Path, undisturbed: list[float]) -> None:
    write_run(folder, folder / "run")
    log = folder / "launch.log"
    with cluster(2, "ssh", folder=folder) as nodes:
        for node, device in enumerate(("br0", "eth0", "eth0")):
            nodes.run(node, "ip", "-6", "addr", "add", f"fd00::1{node}/64", "dev", device, "nodad")
        with (folder / "hosts").open("a") as names:
            names.write("fd00::11 node1six\nfd00::12 node2six\n")
        end_well(launch(nodes, folder, hosts="node1six\nnode2six\n"), log)
    assert [event["world_size"] for event in events(folder / "run", "start")] == [2]
    assert "is excluded" not in log.read_text()
    check_losses(folder / "run", undisturbed)


def test_a_network_interface_that_a_host_lacks_is_named(folder: Path) -> None:
    write_run(folder, folder / "run", launch__environment={"GLOO_SOCKET_IFNAME": "ib7"}, launch__max_restarts=0)
    log = folder / "launch.log"
    with cluster(2, "ssh", folder=folder) as nodes:
        launcher = launch(nodes, folder)
        assert launcher.wait(timeout=PATIENCE_SECONDS) in (2, 3)
    assert "ib7" in log.read_text()


def test_a_spare_takes_the_place_of_a_node_that_loses_its_power(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    with training(folder, 3, count=2, steps=23, launch__heartbeat_seconds=20.0, launch__spare_nodes=1) as (
        nodes,
        launcher,
        log,
    ):
        with watch("ssh", "power lost, a spare waits"):
            nodes.fault("lose", 2)
            end_well(launcher, log)
    text = log.read_text()
    assert "continuing with" not in text, "the run keeps its size"
    (restarted,) = events(folder / "run", "restarted")
    assert "node2" in restarted["cause"]
    check_losses(folder / "run", undisturbed)


@needs_fake_clock
def test_nodes_that_are_not_like_the_launcher_are_excluded_with_their_names_before_ranks_start(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    settings = {"launch__node_wait_seconds": 1.0, "launch__setup": wrong_clock(5, 300), "launch__warm_restarts": False}
    config = write_run(folder, folder / "run", **settings)
    log, stale = folder / "launch.log", folder / "stale"
    stale.mkdir()
    (folder / "run").mkdir()
    source = Path(stages.__file__).resolve()
    (folder / "other.py").write_text(source.read_text() + "\n# another commit\n")
    (folder / "no_names").write_text("127.0.0.1 localhost\n")
    expected = {
        "node2": "amfm's source files is",
        "node3": "does not see the launcher's file",
        "node5": "s ahead; set it (NTP)",
        "node6": "it does not reach node1",
        "node7": "manifest.json: No such file or directory; mount its storage there",
    }
    with cluster(7, "ssh", folder=folder) as nodes:
        nodes.run(2, "mount", "--bind", str(folder / "other.py"), str(source))
        nodes.run(3, "mount", "--bind", str(stale), str(folder / "run"))
        other = other_python()
        nodes.run(4, "mount", "--bind", str(other), str(Path(sys.executable).resolve()))
        if other.name == f"python3.{sys.version_info.minor}":
            expected["node4"] = "python is"
        nodes.run(6, "mount", "--bind", str(folder / "no_names"), "/etc/hosts")
        nodes.run(7, "mount", "--bind", str(stale), config.data.store or "")
        launcher = launch(nodes, folder, hosts="".join(f"node{number}\n" for number in range(1, 8)), count=6)
        with watch("ssh", "other commit, stale mount, other Python, clock 300 s ahead, no names, no store"):
            end_well(launcher, log)
    left = json.loads((folder / "run/launch/excluded_nodes.json").read_text())["excluded"]
    assert left.keys() == expected.keys(), left
    assert all(text in left[name] for name, text in expected.items()), left
    assert "node4" in left or "node4 does not answer: " in log.read_text()
    assert "continuing with 1 of 6 nodes" in log.read_text()
    assert not events(folder / "run", "restarted"), "no attempt was lost"
    check_losses(folder / "run", undisturbed)


def other_python() -> Path:
    """A Python of the system: one of this minor version, which runs what is installed here; else any, which does not start."""
    names = (f"/usr/bin/python3.{sys.version_info.minor}", "/usr/bin/python3")
    found = [path for path in map(Path, names) if path.exists() and path.resolve() != Path(sys.executable).resolve()]
    return found[0] if found else pytest.skip("needs a Python other than this one")


def test_storage_that_goes_stale_under_a_run_costs_no_checkpoint_that_was_whole(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    stale = folder / "stale"
    stale.mkdir()
    with training(folder, 2, launch__node_wait_seconds=1.0) as (nodes, launcher, log):
        with watch("ssh", "mount goes stale under a rank"):
            nodes.run(2, "mount", "--bind", str(stale), str(folder / "run"))
            end_well(launcher, log)
    left = json.loads((folder / "run/launch/excluded_nodes.json").read_text())["excluded"]
    assert "does not see the launcher's file" in left["node2"]
    assert "continuing with 1 of 2 nodes" in log.read_text()
    check_losses(folder / "run", undisturbed)


def test_a_torchrun_on_each_node_starts_all_ranks_again(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    write_run(folder, folder / "run")
    log = folder / "launch.log"
    words = ("launch", folder / "run.yaml", "--on", "torchrun", "--nodes", "2", "--nproc-per-node", "1")
    with cluster(2, folder=folder) as nodes:
        launchers = [
            nodes.start(node, folder / name, *amfm(*words, "--master", "node1", "--node-rank", str(node - 1)))
            for node, name in ((1, log.name), (2, "second.log"))
        ]
        wait_for_steps(folder / "run", 13, log)
        with watch("torchrun per node", "rank killed"):
            signal_ranks(nodes, 2, "KILL")
            codes = [launcher.wait(timeout=PATIENCE_SECONDS) for launcher in launchers]
            assert codes == [0, 0], log.read_text()[-4000:]
    assert len(events(folder / "run", "restarted")) == 1
    check_losses(folder / "run", undisturbed)


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 40 MB, which nodes that are made after it share."""
    path = folder / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_shared_disk_that_is_full_for_a_while_ends_nothing_and_leaves_out_no_host(
    folder: Path, small_disk: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    run_dir, log = small_disk / "run", folder / "launch.log"
    write_run(folder, folder / "run")
    with cluster(2, "ssh", folder=folder) as nodes:
        launcher = launch(nodes, folder, f"run.dir={run_dir}")
        wait_for_steps(run_dir, 12, log)
        with watch("ssh", "shared disk full for a while", "small/run"):
            with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while filler.write(bytes(1 << 12)):
                    pass
            wait_until(lambda: "waiting for the storage" in log.read_text(), START_SECONDS, log)
            assert not list((run_dir / "launch").glob("check-node*"))
            (small_disk / "filler").unlink()
            end_well(launcher, log)
        assert "is excluded" not in log.read_text()
        check_losses(run_dir, undisturbed)
