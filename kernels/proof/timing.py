"""Times work on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from triton.testing import do_bench


def measure_milliseconds(work: Callable[[], object], *, warmup_ms: int = 25, repeat_ms: int = 100) -> float:
    """Median milliseconds of `work` on the current CUDA device, the L2 cache emptied before each run.

    Raises RuntimeError without a CUDA device.

    The median, because clocks and other work make single runs slow but never fast.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("kernels are timed on a CUDA device; this machine has none")
    return float(do_bench(work, warmup=warmup_ms, rep=repeat_ms, return_mode="median"))
