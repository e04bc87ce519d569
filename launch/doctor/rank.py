"""What one rank says of itself and of its host, to be compared with the others; nothing here talks to another rank."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.doctor.machine import (
    GIB,
    Finding,
    describe_card,
    examine_compiler,
    examine_devices,
    examine_known_bad,
    examine_memory,
    examine_packages,
    examine_python,
    installed_version,
    usable_cores,
)
from pretrain.identity import ROOT, digest_code

COMPARED_PACKAGES = ("torch", "deepspeed", "megatron-core", "triton")
NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb3", "afs", "9p", "virtiofs", "ceph", "lustre", "gpfs", "beegfs"),
    *("glusterfs", "panfs", "pvfs2", "wekafs", "daos"),
}


@dataclass(frozen=True)
class CacheFolder:
    """Where Triton keeps compiled kernels: file system by its kernel name, and why it can't be written, if so."""

    path: str
    file_system: str
    problem: str | None

    def is_on_network(self) -> bool:
        """Whether other hosts may see the folder; a container's own overlay in user space is none of those."""
        fuse = self.file_system.startswith("fuse.") and self.file_system != "fuse.fuse-overlayfs"
        return fuse or self.file_system in NETWORK_FILE_SYSTEMS


@dataclass(frozen=True)
class RankReport:
    """One rank. `device_id` is the card's own number, none on CPU; `findings` is what is amiss on its host alone."""

    rank: int
    host: str
    versions: dict[str, str]
    device: str
    device_id: str | None
    findings: tuple[Finding, ...]
    cache: CacheFolder
    free_gib: dict[str, float]


def describe_rank(rank: int) -> RankReport:
    """This process, its device and its host."""
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
    """The part of the doctor of one machine that every host answers for itself."""
    return [
        examine_python(),
        *examine_packages(),
        *examine_known_bad(),
        *examine_devices(),
        examine_compiler(),
        examine_memory(),
    ]


def collect_versions() -> dict[str, str]:
    """What must be the same on all ranks, our own code by its content as well."""
    versions = {"python": platform.python_version()}
    versions |= {name: installed_version(name) or "not installed" for name in COMPARED_PACKAGES}
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    else:
        versions["nccl"] = "none (CPU)"
    own = installed_version("amfm-pretrain") or "not installed"
    return versions | {"amfm": f"{own}, code {digest_code(ROOT)}"}


def describe_device() -> tuple[str, str | None]:
    """What this rank computes on, in words, and the card's own number."""
    if not torch.cuda.is_available():
        return f"CPU, {platform.machine()}, {usable_cores()} cores", None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return describe_card(properties), str(properties.uuid)


def triton_cache_folder() -> Path:
    """Where Triton keeps compiled kernels, by its own variables."""
    given = os.environ.get("TRITON_CACHE_DIR")
    if given is not None:
        return Path(given)
    return Path(os.environ.get("TRITON_HOME", os.path.expanduser("~"))) / ".triton" / "cache"


def examine_cache(folder: Path) -> CacheFolder:
    """Whether a folder, or the nearest one above it that exists, can be written, and on which file system it is."""
    place = nearest_existing(folder)
    problem = None
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        problem = f"{place}: {error.strerror}"
    mounts = Path("/proc/mounts")
    table = mounts.read_text(encoding="utf-8", errors="replace") if mounts.exists() else ""
    return CacheFolder(str(folder), file_system_of(place.resolve(), table), problem)


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the first one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def file_system_of(path: Path, mounts: str) -> str:
    """Kind of the file system that holds an absolute path, by a table in the form of /proc/mounts; empty if it has none."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        # Of two mounts on one point the later one is what is seen.
        if path.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), found
    return kind


def free_gib(path: Path) -> float:
    """Free room for this user on the disk of a folder, or of the nearest one above it that exists."""
    return shutil.disk_usage(nearest_existing(path)).free / GIB
