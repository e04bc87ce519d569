"""The peak of a device that is in no table: measured at each start, and the best of all starts on the machine kept."""

from __future__ import annotations

import hashlib
import os
import socket
import time

import torch

from amfm.data_pipeline.durable.json_files import parse_line
from amfm.kernels.runtime.user_cache import can_write, user_folder, write_whole

MEASURED_SECONDS = 0.1


def keep_best(measured: float, what: str, ranks: int) -> tuple[float, int]:
    """The best peak that starts on this machine have measured, and how many did, kept in the user's cache.

    By what was measured, on which device, with which library and so many threads and ranks: what other programs leave of a
    machine in one moment is less than the peak. If there is no cache, or a damaged one, it is that of this start.
    """
    folder = user_folder("peaks")
    if folder is None or not can_write(folder):
        return measured, 1
    facts = (what, torch.__version__, os.cpu_count(), torch.get_num_threads(), ranks)
    path = folder / f"{hashlib.sha256(repr((socket.gethostname(), *facts)).encode()).hexdigest()[:16]}.json"
    known = parse_line(path.read_bytes()) if path.is_file() else None
    before, starts = (number((known or {}).get(key)) for key in ("flops_per_second", "starts"))
    best = {"flops_per_second": max(measured, before), "starts": int(starts) + 1}
    write_whole(path, best | {"of": [str(fact) for fact in facts]})
    return best["flops_per_second"], int(starts) + 1


def number(value: object) -> float:
    """A positive finite number as it is, 0 for anything else."""
    return float(value) if isinstance(value, int | float) and 0 < value < float("inf") else 0.0


def measure_matmul(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Measure the FLOP/s of the best square product within MEASURED_SECONDS, and of one product at least.

    The best and not the mean: the first product pays for allocation and for starting threads.
    """
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best_seconds = float("inf")
    deadline = time.perf_counter() + MEASURED_SECONDS
    while best_seconds == float("inf") or time.perf_counter() < deadline:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        synchronize(device)
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return float(2 * size**3 / best_seconds)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
