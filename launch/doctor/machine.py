"""What this machine has and can run: a finding a line, each with a fix where something is amiss.

How it works: every `examine_*` function looks at one thing and returns findings (name, status, found, fix). None of
them raises: a machine that lacks something is what the doctor is for. `cluster.py` asks every host of a run, where
`rank.py` describes a host and times the links between them; it says which hosts differ, and whether a file
written on one is seen by all.

Why before a run: wrong versions, slow links and storage that is not shared show in training as a hang or as a slow step
hours later, without the name of the host.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from amfm.pretrain.packages import DISTRIBUTION, EXTRAS, install_command

GIB = 2**30
MIN_FREE_GIB = 2.0
MIN_MEMORY_GIB = 4.0


@dataclass(frozen=True)
class Finding:
    """Result of one check: `fail` means that amfm cannot work, `warn` that something is slower or missing."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """The finding as JSON values."""
        return asdict(self)


def examine_machine(*, quick: bool = False) -> list[Finding]:
    """All checks of this machine, in the order in which a person would ask: interpreter, packages, devices, room.

    `quick` leaves out the two that import torch, devices and Triton.
    """
    return [
        examine_python(),
        *examine_packages(),
        *examine_known_bad(),
        *([] if quick else [*examine_devices(), examine_triton()]),
        examine_compiler(),
        examine_cores(),
        examine_memory(),
        examine_disk(),
    ]


def examine_python() -> Finding:
    """Check the interpreter: 3.11 to 3.13."""
    found = f"{platform.python_version()} ({sys.executable})"
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding("python", "fail", found, "make a virtual environment with Python 3.11, 3.12 or 3.13")
    return Finding("python", "ok", found)


def declared_packages() -> list[tuple[str, Requirement]]:
    """Requirements that amfm declares, each with its extra ("" for the core): of the installed distribution, else of pyproject.toml."""
    extras = ("", *EXTRAS)
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        import tomllib

        file = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        lists = {"": project["dependencies"]} | project["optional-dependencies"]
        return [(extra, Requirement(text)) for extra in extras for text in lists[extra]]
    found: dict[str, tuple[str, Requirement]] = {}
    for extra in extras:
        for item in declared:
            if item.marker is None or item.marker.evaluate({"extra": extra}):
                found.setdefault(item.name, (extra, item))
    return list(found.values())


def examine_packages() -> list[Finding]:
    """Check that each declared package is installed, in the range that amfm declares; those of extras may be absent."""
    findings = []
    for extra, need in declared_packages():
        version = installed_version(need.name)
        wanted = f'pip install "{need.name}{need.specifier}"'
        if version is None and extra:
            remedy = install_command(extra)
            findings.append(Finding(need.name, "warn", f"not installed; part of the extra `{extra}`", remedy))
        elif version is None:
            findings.append(Finding(need.name, "fail", "not installed", wanted))
        elif not need.specifier.contains(version, prereleases=True):
            findings.append(Finding(need.name, "warn", f"{version}, outside {need.specifier}", wanted))
        else:
            findings.append(Finding(need.name, "ok", version))
    return findings


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, None without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_known_bad() -> list[Finding]:
    """Check for combinations that install silently and then fail or give wrong numbers."""
    findings = []
    kernels = installed_version("kernels")
    if kernels is not None:
        found = f"the Hugging Face distribution `kernels` {kernels} is installed; its package has the name of ours"
        findings.append(Finding("kernels", "warn", found, "pip uninstall kernels"))
    transformers = installed_version("transformers")
    if transformers is not None and Version(transformers) < Version("5.24"):
        found = f"{transformers} carries the state between chunks wrongly in its Mamba2 classes on CPU"
        findings.append(Finding("export check", "warn", found, 'pip install "transformers>=5.24"'))
    return findings


def has_cuda() -> bool:
    """Whether torch is installed and sees a CUDA device."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def examine_devices() -> list[Finding]:
    """Check torch's devices: compute capability, and Triton releases that miscompile on them."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    from amfm.kernels.runtime.backend import refuse_triton
    from amfm.kernels.runtime.native import refuse_native
    from amfm.pretrain.startup.arithmetic import faster_on_processor

    if not torch.cuda.is_available():
        waits = "sleep" if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" else "spin"
        reason = refuse_native(torch.device("cpu"))
        precision, measured = faster_on_processor()
        threads = (
            f"CPU only, {torch.get_num_threads()} threads, which {waits} while they wait (torch {torch.__version__}); "
            f"kernels.backend auto is {f'torch: {reason}' if reason else 'native (Mamba2 in C)'}; "
            f"train.precision auto is {precision} ({measured})"
        )
        return [Finding("devices", "ok", threads)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = describe_gpu(properties)
        status: Literal["ok", "warn"] = "ok" if properties.major >= 8 else "warn"
        remedy = "" if status == "ok" else "bf16 needs capability 8.0 or more: train.precision=float32"
        findings.append(Finding(f"cuda:{index}", status, found, remedy))
    # A miscompiled kernel runs without an error, so the releases that miscompile are told by their number.
    refusals = {refuse_triton(torch.device("cuda", index)) for index in range(torch.cuda.device_count())}
    findings += [Finding("triton on this GPU", "warn", refusal, "see docs/gpu.md") for refusal in refusals if refusal]
    return findings


def describe_gpu(properties: Any) -> str:
    """A GPU's name, memory and compute capability in words."""
    return (
        f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, capability {properties.major}.{properties.minor}"
    )


def examine_triton() -> Finding:
    """Check whether Triton kernels run natively, only in the interpreter, or not at all."""
    version = installed_version("triton")
    if version is None:
        return Finding("triton kernels", "warn", "not installed", "needed on GPUs only: pip install triton")
    if has_cuda():
        return Finding("triton kernels", "ok", f"{version}, native")
    found = f"{version}, interpreter only (no GPU)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Finding("triton kernels", "ok", f"{found}, switched on")
    return Finding("triton kernels", "ok", found, "to test kernels on CPU: TRITON_INTERPRET=1 before the command")


def examine_compiler() -> Finding:
    """Check for a C++ compiler, which only torch.compile and DeepSpeed's own CPU operations need."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return Finding("C++ compiler", "warn", "none", "needed by train.compile=true only: install g++")
    return Finding("C++ compiler", "ok", compiler)


def examine_cores() -> Finding:
    """Number of cores that this process may use."""
    return Finding("cores", "ok", f"{usable_cores()} usable of {os.cpu_count()}, {platform.machine()}")


def usable_cores() -> int:
    """Cores in this process's affinity mask, or all where the system has no masks."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def examine_memory() -> Finding:
    """Check main memory, in total, not what is free."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return Finding("memory", "ok", "unknown on this system")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    if total < MIN_MEMORY_GIB:
        return Finding("memory", "warn", f"{total:.1f} GiB", f"tiny runs need about {MIN_MEMORY_GIB:.0f} GiB")
    return Finding("memory", "ok", f"{total:.1f} GiB")


def examine_disk() -> Finding:
    """Check free space in the working directory, where runs and stores go by default."""
    free = shutil.disk_usage(Path.cwd()).free / GIB
    found = f"{free:.1f} GiB free at {Path.cwd()}"
    if free < MIN_FREE_GIB:
        return Finding(
            "disk", "warn", found, f"a tiny run needs about {MIN_FREE_GIB:.0f} GiB: set run.dir to a larger disk"
        )
    return Finding("disk", "ok", found)
