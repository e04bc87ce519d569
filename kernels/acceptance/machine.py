"""The GPU and the versions of what runs on it, and whether they can serve."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

import torch

from amfm.kernels.attention.varlen import activate_newest, restore

FIRST_FP8 = 89  # compute capability from which products take FP8
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "mamba_ssm",
    "causal_conv1d",
    "flash-linear-attention",
    "flash_attn",
    "liger_kernel",
)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """GPU, driver and versions, as the report has them; `capability` is 0 without a GPU."""
    found: dict[str, Any] = {"card": "none: Triton's interpreter", "capability": 0}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "card": properties.name,
            "capability": properties.major * 10 + properties.minor,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver_version(),
        } | describe_presence(properties.major * 10 + properties.minor)
    return found | {"python": platform.python_version(), "cuda": torch.version.cuda, "versions": _versions()}


def describe_presence(capability: int) -> dict[str, str]:
    """Which FlashAttention PyTorch's attention would run on such a GPU, and whether its products take FP8; for a log line."""
    name, reason = activate_newest(capability // 10)
    restore()
    takes_fp8 = hasattr(torch, "_scaled_mm") and capability >= FIRST_FP8
    return {"flash_attention": f"{name} ({reason})" if reason else name, "fp8": "yes" if takes_fp8 else "no"}


def _versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _driver_version() -> str | None:
    """Version of the driver, None if nvidia-smi is missing."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split()[0] if answer.split() else None
