"""Describe the processor that a benchmark ran on."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from amfm.pretrain.monitor.environment import read_processor_name


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products; a CPU without them emulates them many times slower."""
    return device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())


def describe_hardware() -> dict[str, Any]:
    """Processor, threads and versions that the numbers were taken with."""
    return {
        "processor": read_processor_name(),
        "threads": torch.get_num_threads(),
        "bf16_products": multiplies_bf16(torch.device("cpu")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
