"""Cases as they are timed: those for GPUs compute what float32 does, those for a CPU what transformers does."""

from __future__ import annotations

import time

import pytest
import torch

from amfm.kernels.acceptance.child import time_problem
from amfm.kernels.cases import GpuSizes, HostSizes
from amfm.kernels.runtime.backend import INTERPRETED
from benchmarks.kernels.case import host_case
from benchmarks.kernels.cpu_rounds import compare_variants
from benchmarks.kernels.operations import ON_CARD, ON_HOST

ROW = {"op", "pass", "shape", "dtype", "backend", "milliseconds", "roofline_fraction", "ratio"}


SMALL = GpuSizes(
    tokens=64, model=32, heads=2, head_dim=16, state=16, experts=4, top_k=2, expert_width=16,
    attention_heads=2, kv_heads=1, attention_dim=16, vocabulary=64,
)  # fmt: skip


def measure(work) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


@pytest.mark.parametrize("op", ON_CARD)
def test_cases_for_cards_compute_what_float32_does(op: str) -> None:
    """On CPU through the torch backend; what needs a GPU or a package stays out, named in the warnings."""
    found = time_problem(op, ON_CARD[op], torch.device("cpu"), SMALL, measure)
    assert {row["op"] for row in found["rows"]} == {op}
    for row in found["rows"]:
        assert set(row) >= ROW
        # bfloat16 keeps eight bits at each of some ten steps; e2m1 keeps two.
        assert row["relative_error"] < (0.25 if op.startswith("nvfp4") else 5e-2), row
    if not INTERPRETED and not op.endswith("_linear"):  # which are emulated if no GPU multiplies by them
        assert any(f"{op}: triton cannot run here" in remark for remark in found["remarks"])
        assert any(fault.startswith(f"{op} did not run: ") for fault in found["faults"])


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_transformers_computes_what_every_case_of_a_cpu_does(dtype: torch.dtype) -> None:
    sizes = HostSizes(rows=2, tokens=96, model=64, heads=2, head_dim=16, state=16, experts=4, top_k=2, vocabulary=64)
    for op in ON_HOST:
        differences = compare_variants(host_case(op, dtype, sizes))
        assert "transformers" in differences or op == "decay_scan_vector"
