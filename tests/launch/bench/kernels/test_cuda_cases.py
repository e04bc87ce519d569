"""Every case for cards computes what float32 does, on a CPU too."""

from __future__ import annotations

import time

import torch

from kernels.backend import INTERPRETED
from launch.bench.kernels.cuda import find_faults, time_case
from launch.bench.kernels.cuda_cases import CUDA_OPERATIONS, Sizes, build_cuda_case

ROW = {"op", "pass", "shape", "dtype", "backend", "milliseconds", "roofline_fraction", "ratio"}
SMALL = Sizes(
    tokens=64, model=32, heads=2, head_dim=16, state=16, experts=4, top_k=2, expert_width=16,
    attention_heads=2, kv_heads=1, attention_dim=16, vocabulary=64,
)  # fmt: skip


def test_cases_for_cards_compute_what_float32_does() -> None:
    """On CPU through the torch backend; what needs a card or a package stays out, named in the remarks."""

    def measure(work) -> float:
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3

    remarks: list[str] = []
    rows = []
    for op in CUDA_OPERATIONS:
        rows += time_case(build_cuda_case(op, torch.device("cpu"), SMALL), measure, remarks)
    assert {row["op"] for row in rows} == set(CUDA_OPERATIONS)
    for row in rows:
        assert set(row) >= ROW
        # bfloat16 keeps eight bits at each of some ten steps.
        assert row["relative_error"] < 5e-2, row
    if not INTERPRETED:
        assert any("decay_scan: triton cannot run here" in remark for remark in remarks)
        assert find_faults([*CUDA_OPERATIONS], rows) == [f"{op} did not run" for op in CUDA_OPERATIONS]
