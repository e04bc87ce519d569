"""Trains a few steps under PyTorch's profiler: `python -m benchmarks.gpu_job.profile CONFIG.yaml SETTING=VALUE ...`.

Prints the operations that took longest on the device, as JSON: `name`, `calls`, `milliseconds` on the device, or on the CPU
if there is none.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

SHOWN = 40


def profile_run(path: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Train the configuration and return its longest operations, the longest first. Raises RuntimeError if it fails."""
    from amfm.pretrain.checks.load import load_checked
    from amfm.pretrain.train import train

    config = load_checked(path, overrides, world_size=1)
    has_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu else [])]
    with profiler(activities=activities) as found:
        code = train(config)
    if code:
        raise RuntimeError(f"the profiled run ended with exit code {code}")
    rows = [
        {
            "name": event.key,
            "calls": event.count,
            "milliseconds": (event.self_device_time_total if has_gpu else event.self_cpu_time_total) / 1e3,
        }
        for event in found.key_averages()
    ]
    return sorted(rows, key=lambda row: row["milliseconds"], reverse=True)[:SHOWN]


if __name__ == "__main__":
    # The run shows its progress on standard output, which here belongs to the answer.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    json.dump(profile_run(sys.argv[1], sys.argv[2:]), lines)
    lines.close()
