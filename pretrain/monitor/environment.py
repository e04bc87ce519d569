"""Environment of a run: the record next to its metrics, and the peak that its MFU is measured against.

Model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is the model's arithmetic a second over
the device's peak. For known GPUs the peak is the vendor's number for dense matrices. CPUs have no number that fits (it
depends on cores, clock and library), so there the best matrix product that the ranks reach together is measured, for a
moment, at the start; MFU is then relative to the best of all starts on the machine.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from amfm.pretrain.monitor.panel import plural
from amfm.pretrain.packages import read_version
from amfm.pretrain.parallel import Parallel, describe_environment

LIBRARIES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "triton",
    "numpy",
    "zarr",
    "ray",
    "sentencepiece",
    "safetensors",
    "transformers",
)
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "CUDA_VISIBLE_DEVICES",
    "SLURM_JOB_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
# Dense matrix peaks in TFLOP/s (bf16, float32 as TF32) from the vendors' data sheets, without sparsity.
GPU_TERAFLOPS = {
    "A100": (312.0, 156.0),
    "H100": (989.4, 494.7),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.5, 417.5),
    "H200": (989.4, 494.7),
    "H200 NVL": (835.5, 417.5),
    "GH200": (989.4, 494.7),
    "B200": (2250.0, 1125.0),
    "GB200": (2500.0, 1250.0),
    "L40": (181.0, 90.5),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.5),
    "A10": (125.0, 62.5),
    "A10G": (70.0, 35.0),
}
# Side of the square matrices of the measurement: on a GPU a small product is launch time.
MEASURED_SIZE = {"cpu": 768, "cuda": 8192}


@dataclass(frozen=True)
class Peak:
    """Peak matrix FLOP/s of all ranks together, and where the number comes from."""

    flops_per_second: float
    source: str


def find_peak(parallel: Parallel, precision: str) -> Peak:
    """Look up the GPU's data-sheet number; on a CPU or an unknown GPU measure for a moment on all ranks at once.

    Every rank must call this.
    """
    if parallel.device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(parallel.device))
        if gpu is not None:
            bf16, float32 = GPU_TERAFLOPS[gpu]
            teraflops = bf16 if precision == "bf16" else float32
            return Peak(teraflops * 1e12 * parallel.world_size, f"{precision} data-sheet peak of {gpu}")
    # A CPU without bf16 instructions is faster in float32: a run in bf16 is compared with the faster of the two.
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = MEASURED_SIZE[parallel.device.type]
    from amfm.pretrain.monitor.peaks import keep_best, measure_matmul  # if no GPU of the table is

    own = max(measure_matmul(parallel.device, kind, size) for kind in {dtype, torch.float32})
    name = torch.cuda.get_device_name(parallel.device) if parallel.device.type == "cuda" else read_processor_name()
    own, starts = keep_best(own, f"{precision}, {size}, {name}", parallel.world_size)
    total = torch.tensor(own, dtype=torch.float64, device=parallel.device)
    if parallel.world_size > 1:
        # Over all ranks and not only over data ranks: tensor, context and pipeline ranks compute too.
        torch.distributed.all_reduce(total)
    kinds = "float32" if precision == "float32" else "bf16 or float32, whichever is faster"
    threads = f", {plural(torch.get_num_threads(), 'thread')} per rank" if parallel.device.type == "cpu" else ""
    return Peak(
        float(total),
        f"measured, best of {plural(starts, 'start')} here: matmul of {size}^3 in {kinds}{threads}",
    )


def find_gpu(name: str) -> str | None:
    """The GPU of the table that a driver's name is of, None of another one.

    By whole words, or an RTX A1000 were an A100.
    """
    words = set(re.split(r"[ -]", name))
    return max((gpu for gpu in GPU_TERAFLOPS if words.issuperset(gpu.split())), key=len, default=None)


def read_peak_memory(device: torch.device) -> int:
    """Read the most bytes that this process has held so far: of torch on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB but on macOS


def describe_allocator(statistics: Mapping[str, int]) -> dict[str, int]:
    """What `torch.cuda.memory_stats` says of a process so far that the peak of `read_peak_memory` does not.

    reserved_bytes: the peak of what the allocator has taken of the GPU; more than was allocated is fragmentation.
    alloc_retries: times that it gave back what it kept and tried again, which makes a step slow. ooms: times that it found none.
    """
    names = {
        "reserved_bytes": "reserved_bytes.all.peak",
        "alloc_retries": "num_alloc_retries",
        "ooms": "num_ooms",
    }
    return {name: int(statistics.get(key, 0)) for name, key in names.items()}


def record_environment(
    parallel: Parallel, peak: Peak, model_facts: dict[str, Any], *, keeps_freed_memory: bool
) -> dict[str, Any]:
    """Build the content of environment.json: machine, libraries, ranks, model size and the peak behind `mfu`.

    Describes the rank that calls it; no communication. Secrets of the command line are left out.
    """
    return {
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [hide_secrets(word) for word in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": read_processor_name(),
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "device": str(parallel.device.type),
        "device_name": torch.cuda.get_device_name(parallel.device) if parallel.device.type == "cuda" else None,
        "keeps_freed_memory": keeps_freed_memory,
        "world_size": parallel.world_size,
        "data_world_size": parallel.data_world_size,
        "versions": {library: read_version(library) for library in LIBRARIES},
        "variables": describe_environment(VARIABLES),
        "model": model_facts,
        "peak": asdict(peak),
    }


def hide_secrets(word: str) -> str:
    """Copy a word of the command line without the value of `launch.setup`, which may hold tokens."""
    return "launch.setup=(not recorded)" if word.startswith("launch.setup=") else word


def read_processor_name() -> str:
    """Read the processor's name as the kernel tells it, else what Python knows."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
