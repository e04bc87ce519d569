"""Report of one rank about itself and its host, to be compared with the others; nothing here communicates."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

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
