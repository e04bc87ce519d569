"""How each fault is done to a cluster, and what an operator repairs afterwards."""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable

from tests.cluster.cluster import SLURM, quietly
from tests.cluster.soak.faults import Fault
from tests.cluster.soak.site import Site, fill, kill
from tests.cluster.test_slurm import field, launch_command
from tests.soak.strike import damage_newest

MINUTE = 60.0


def strike(fault: Fault, site: Site) -> str:
    """Do what a fault says to the job that runs, and return what was hit, in words."""
    nodes, kind, source = site.nodes, fault.kind, random.Random(fault.draw)
    if "rank" in kind and "SIGUSR1" not in kind:
        return strike_rank(site, kind, source)
    if "controller" in kind:
        return kill_controller(site)
    if "clock" in kind:
        return set_clock(site, 20 if "20 s" in kind else 300, source)
    batch_host = int(field(nodes, site.job, "BatchHost").removeprefix("node"))
    others = [node for node in working_nodes(site) if node != batch_host] or [batch_host]
    node = source.choice(others)
    if kind == "power of the batch host lost":
        node = batch_host
        site.lose(node)
    elif kind == "power of a node lost":
        site.lose(node)
    elif "link of a node cut" in kind or "slow link" in kind:
        disturb_link(site, node, kind)
    elif "slurmd" in kind:
        nodes.run(node, "pkill", "-KILL", "-x", "slurmd")
        site.later(5.0, lambda: quietly(SLURM, "node", str(nodes.folder), str(node)))
    elif kind == "disk full for a minute":
        disk = site.root.parent
        fill(disk)
        site.later(MINUTE, (disk / "filler").unlink)
        return "the disk"
    elif kind == "submitted twice":
        return submit_twice(site)
    else:
        return signal_job(site, kind, batch_host)
    return f"node{node}"


def working_nodes(site: Site) -> list[int]:
    """Nodes that have ranks."""
    return sorted({node for node, _ in site.ranks()})


def strike_rank(site: Site, kind: str, source: random.Random) -> str:
    """Kill or stop one rank."""
    if kind == "controller killed and a rank too":
        kill_controller(site)
    node, pid = source.choice(site.ranks())
    if "stopped" in kind:
        kill(site.nodes, node, "STOP", pid)
        if "10 s" in kind:
            site.later(10.0, lambda: kill(site.nodes, node, "CONT", pid))
    elif "damaged" in kind:
        for each, rank in site.ranks():
            kill(site.nodes, each, "KILL", rank)
        return damage_newest(site.run_dir, source.random())
    else:
        kill(site.nodes, node, "KILL", pid)
    return f"the rank on node{node}"


def kill_controller(site: Site) -> str:
    """Kill slurmctld, which comes back after 40 s."""
    site.nodes.run(0, "pkill", "-KILL", "-x", "slurmctld")
    site.later(40.0, lambda: quietly(SLURM, "controller", str(site.nodes.folder)))
    return "slurmctld"


def disturb_link(site: Site, node: int, kind: str) -> None:
    """Cut a node's link, or make it slow, for a while."""
    if "slow" in kind:
        site.nodes.fault("slow", node, "2mbit", "20")
    else:
        site.nodes.fault("cut", node)
    site.later(10.0 if "10 s" in kind else MINUTE, lambda: site.nodes.fault("heal", node))


def set_clock(site: Site, seconds: int, source: random.Random) -> str:
    """Queue the job again, to start where a node's clock is wrong until a minute and a half later."""
    node = source.choice(working_nodes(site)[1:] or [2])
    site.set_clock(node, seconds)
    mark = site.folder / "wrong-clock"
    mark.touch()
    site.nodes.run(0, "scontrol", "requeue", site.job)

    def correct() -> None:
        mark.unlink()
        site.set_clock(node, 0)

    site.later(1.5 * MINUTE, correct)
    return f"node{node}"


def submit_twice(site: Site) -> str:
    """Submit the run again, which is rejected, and then its script as it is, on the node that is free."""
    refused = site.nodes.try_to(0, *launch_command(site.root, 2))
    if refused.returncode != 2 or f"job {site.job} (" not in refused.stderr:
        raise RuntimeError(f"the run could be submitted twice: {refused.returncode}, {refused.stderr[-500:]}")
    copy = site.root / "copy.sbatch"
    copy.write_text((site.run_dir / "launch/job.sbatch").read_text())
    second = site.nodes.run(0, "sbatch", "--parsable", "--nodes=1", "--no-requeue", str(copy))
    return f"as job {second} too"


def signal_job(site: Site, kind: str, batch_host: int) -> str:
    """Signal what Slurm signals, or put the job back into the queue."""
    orders: dict[str, Callable[[], object]] = {
        "SIGTERM to the launcher alone": lambda: site.nodes.run(0, "scancel", "--batch", "--signal=TERM", site.job),
        "SIGUSR1 to the ranks": lambda: site.nodes.run(0, "scancel", "--signal=USR1", site.job),
        "job requeued by hand": lambda: site.nodes.run(0, "scontrol", "requeue", site.job),
        "launcher killed": lambda: site.nodes.run(
            batch_host, "pkill", "-KILL", "-o", "-f", f"^[^ ]+ -P -m amfm.launch launch {shlex.quote(str(site.root))}/"
        ),
    }
    orders[kind]()
    return f"job {site.job}"
