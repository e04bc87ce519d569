"""What ranks find out for a cluster: each reports itself and its host, then they measure between them; bandwidth and skew of clocks.

How it works: links are tested in rounds of disjoint pairs (`plan_links`), both directions at once, so that the number
of rounds does not grow with the cluster: three within hosts and three between them. All pairs would take the square of
the ranks; a ring still uses every rank's own way out of its host. Times are medians after warm-up, and of a pair's two
ends the slower counts. Clocks are compared by messages to rank 0 and back, as NTP does.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from amfm.data_pipeline.durable.files import file_system_of, read_mounts
from amfm.launch.doctor.machine import (
    GIB,
    Finding,
    describe_gpu,
    examine_compiler,
    examine_devices,
    examine_known_bad,
    examine_memory,
    examine_packages,
    examine_python,
    installed_version,
    usable_cores,
)
from amfm.pretrain.packages import ROOT, digest_code

COMPARED_PACKAGES = ("torch", "deepspeed", "megatron-core", "triton")
NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb3", "afs", "9p", "virtiofs", "ceph", "lustre", "gpfs", "beegfs"),
    *("glusterfs", "panfs", "pvfs2", "wekafs", "daos"),
}


@dataclass(frozen=True)
class CacheFolder:
    """Triton's cache of compiled kernels on this host.

    `file_system`: by the kernel's name for its type. `problem`: why the folder cannot be written, None when it can.
    """

    path: str
    file_system: str
    problem: str | None

    def is_on_network(self) -> bool:
        """Whether other hosts may see the folder.

        Any FUSE file system may be a network's; only the overlay that rootless containers use is known to be local.
        """
        fuse = self.file_system.startswith("fuse.") and self.file_system != "fuse.fuse-overlayfs"
        return fuse or self.file_system in NETWORK_FILE_SYSTEMS


@dataclass(frozen=True)
class RankReport:
    """Everything one rank says of itself. `device_id` is the GPU's UUID, None on CPU.

    `findings`: what is amiss only on its host. `free_gib`: free space by what the folder is for.
    """

    rank: int
    host: str
    versions: dict[str, str]
    device: str
    device_id: str | None
    findings: tuple[Finding, ...]
    cache: CacheFolder
    free_gib: dict[str, float]


def describe_rank(rank: int) -> RankReport:
    """Report of this process, its device and its host."""
    device, device_id = describe_device()
    return RankReport(
        rank,
        socket.gethostname(),
        collect_versions(),
        device,
        device_id,
        tuple(finding for finding in examine_host() if finding.status != "ok"),
        examine_cache(triton_cache_folder()),
        {
            "working directory": free_gib(Path.cwd()),
            "temporary files": free_gib(Path(tempfile.gettempdir())),
        },
    )


def examine_host() -> list[Finding]:
    """Checks that every host runs for itself, without those of the machine where the doctor is called."""
    return [
        examine_python(),
        *examine_packages(),
        *examine_known_bad(),
        *examine_devices(),
        examine_compiler(),
        examine_memory(),
    ]


def collect_versions() -> dict[str, str]:
    """Versions that must agree on all ranks, with a digest of amfm's own code."""
    versions = {"python": platform.python_version()}
    versions |= {name: installed_version(name) or "not installed" for name in COMPARED_PACKAGES}
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    else:
        versions["nccl"] = "none (CPU)"
    own = installed_version("amfm-pretrain") or "not installed"
    return versions | {"amfm": f"{own}, code {digest_code(ROOT)}"}


def describe_device() -> tuple[str, str | None]:
    """This rank's device in words, and the GPU's UUID, None on CPU."""
    if not torch.cuda.is_available():
        return f"CPU, {platform.machine()}, {usable_cores()} cores", None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return describe_gpu(properties), str(properties.uuid)


def triton_cache_folder() -> Path:
    """Folder of Triton's compiled kernels, as its environment variables say."""
    given = os.environ.get("TRITON_CACHE_DIR")
    if given is not None:
        return Path(given)
    return Path(os.environ.get("TRITON_HOME", os.path.expanduser("~"))) / ".triton" / "cache"


def examine_cache(folder: Path) -> CacheFolder:
    """Whether a folder, or its nearest existing parent, can be written, and on which file system it is."""
    place = nearest_existing(folder)
    problem = None
    try:
        # By writing: permission bits say nothing of read-only mounts and quotas.
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        problem = f"{place}: {error.strerror}"
    return CacheFolder(str(folder), file_system_of(place.resolve(), read_mounts()), problem)


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def free_gib(path: Path) -> float:
    """Free GiB for this user on the disk of a folder, or of its nearest existing parent."""
    return shutil.disk_usage(nearest_existing(path)).free / GIB


WARM_UPS, REPEATS = 2, 5
PINGS = 8
# Large enough for a GPU's full rate; on CPU small enough for a slow network.
CUDA_BYTES, CPU_BYTES = 256 * 2**20, 8 * 2**20

Kind = Literal["within hosts", "between hosts"]


@dataclass(frozen=True)
class Link:
    """Bandwidth between a pair of ranks in each direction, both used at the same time, in 1e9 bytes per second."""

    first: int
    second: int
    kind: Kind
    gigabytes_per_second: float


@dataclass(frozen=True)
class Skew:
    """Seconds that a clock is ahead of rank 0's, and the largest error that this may have."""

    seconds: float
    error: float


def gather(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order. Every rank must call this."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def group_by_host(hosts: Sequence[str]) -> dict[str, list[int]]:
    """Ranks of each host, in the order of each host's first rank."""
    groups: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        groups.setdefault(host, []).append(rank)
    return groups


def plan_links(hosts: Sequence[str]) -> list[tuple[Kind, list[tuple[int, int]]]]:
    """Rounds of disjoint pairs of ranks to measure: a ring within each host, and rings over the hosts.

    Ranks of the same place in their hosts form a ring over the hosts, so every rank's own way out of its host is used
    once on each side. The pairs of a round run at the same time.
    """
    groups = list(group_by_host(hosts).values())
    places = range(max(len(group) for group in groups))
    across = [[group[place] for group in groups if place < len(group)] for place in places]
    kinds: list[tuple[Kind, list[list[int]]]] = [("within hosts", groups), ("between hosts", across)]
    rounds = []
    for kind, rings in kinds:
        for number in range(3):
            pairs = [pair for ring in rings for pair in ring_rounds(ring)[number]]
            if pairs:
                rounds.append((kind, pairs))
    return rounds


def ring_rounds(ring: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Neighbours of a ring as three rounds in which no rank appears twice; the third is for odd rings."""
    links = [(ring[place], ring[(place + 1) % len(ring)]) for place in range(len(ring))]
    if len(ring) < 3:
        links = links[: len(ring) - 1]
    last = [links.pop()] if len(links) > 1 and len(links) % 2 else []
    return [links[::2], links[1::2], last]


def link_tensor(device: torch.device) -> Tensor:
    """Message of zeros that links are timed with, uint8, of a size that suits the device."""
    return torch.zeros(CUDA_BYTES if device.type == "cuda" else CPU_BYTES, dtype=torch.uint8, device=device)


def time_median(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a piece of work over `REPEATS` runs after warm-up, the device synchronized each time."""
    seconds = []
    for _ in range(WARM_UPS + REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UPS:])


def measure_all_reduce(device: torch.device) -> float:
    """Bus bandwidth of an all-reduce over all ranks, in 1e9 bytes per second; the same on every rank.

    Each rank of a ring sends 2 (n - 1) / n of the tensor; the slowest rank's median counts. Every rank must call this,
    and there must be two at least.
    """
    num_ranks = torch.distributed.get_world_size()
    tensor = link_tensor(device)
    # The slowest rank decides how long a collective takes for all.
    seconds = max(gather(time_median(lambda: torch.distributed.all_reduce(tensor), device)))
    return float(2 * (num_ranks - 1) / num_ranks * tensor.numel() / seconds / 1e9)


def measure_links(hosts: Sequence[str], device: torch.device) -> list[Link]:
    """Bandwidth of every link of `plan_links`; the same on every rank. Every rank must call this.

    Pairs of a round exchange at the same time; a gather after each round keeps rounds apart.
    """
    rank = torch.distributed.get_rank()
    out, into = link_tensor(device), link_tensor(device)
    found: list[Link] = []
    for kind, pairs in plan_links(hosts):
        mine = next((pair for pair in pairs if rank in pair), None)
        link = None
        if mine is not None:
            other = mine[1] if rank == mine[0] else mine[0]
            seconds = time_median(partial(exchange, out, into, other), device)
            link = Link(*mine, kind, out.numel() / seconds / 1e9)
        # Gathering also keeps rounds apart. Of the two ends' times the longer one counts.
        ends: dict[tuple[int, int], Link] = {}
        for end in gather(link):
            if end is not None:
                slower = ends.get((end.first, end.second), end)
                ends[end.first, end.second] = min(end, slower, key=lambda item: item.gigabytes_per_second)
        found += ends.values()
    return found


def exchange(out: Tensor, into: Tensor, other: int) -> None:
    """Send `out` to another rank and receive `into` from it at the same time; that rank must call this too."""
    # As one batch: two blocking calls, each side sending first, would wait for each other.
    sends = [
        torch.distributed.P2POp(torch.distributed.isend, out, other),
        torch.distributed.P2POp(torch.distributed.irecv, into, other),
    ]
    for work in torch.distributed.batch_isend_irecv(sends):
        work.wait()


def measure_skews(hosts: Sequence[str]) -> dict[str, Skew]:
    """Clock skew of every host against rank 0's; the same on every rank. Every rank must call this.

    Rank 0 pings the first rank of each other host, one after the other.
    """
    rank = torch.distributed.get_rank()
    leaders = {host: ranks[0] for host, ranks in group_by_host(hosts).items()}
    skews = {hosts[0]: Skew(0.0, 0.0)}
    for host, leader in leaders.items():
        if leader == 0:
            continue
        if rank == 0:
            skews[host] = estimate_skew([ping(leader) for _ in range(PINGS)])
        elif rank == leader:
            for _ in range(PINGS):
                answer_ping()
    answer: dict[str, Skew] = gather(skews)[0]
    return answer


def ping(other: int) -> tuple[float, float, float]:
    """(before, other, after) in seconds: our clock, the other's, and ours again around one message."""
    stamp = torch.zeros(1, dtype=torch.int64)
    before = time.time_ns()
    torch.distributed.send(stamp, other)
    torch.distributed.recv(stamp, other)
    after = time.time_ns()
    return before / 1e9, int(stamp) / 1e9, after / 1e9


def answer_ping() -> None:
    """Answer rank 0's ping with this host's clock."""
    stamp = torch.zeros(1, dtype=torch.int64)
    torch.distributed.recv(stamp, 0)
    stamp.fill_(time.time_ns())
    torch.distributed.send(stamp, 0)


def estimate_skew(pings: Sequence[tuple[float, float, float]]) -> Skew:
    """Skew of the other clock from (before, other, after) of several pings; the quickest has the smallest error.

    Source: Mills 1991, Internet Time Synchronization (half of the delay bounds the error).
    """
    before, other, after = min(pings, key=lambda item: item[2] - item[0])
    return Skew(other - (before + after) / 2, (after - before) / 2)
