"""Cases as they are timed: those for cards compute what float32 does, those for a CPU what transformers does."""

from __future__ import annotations

import time

import pytest
import torch

from kernels.backend import INTERPRETED
from kernels.proof.cases.case import CardSizes, HostSizes
from kernels.proof.cases.operations import ON_CARD, ON_HOST
from launch.bench.kernels.case import card_case, host_case
from launch.bench.kernels.cpu_rounds import compare_variants
from launch.bench.kernels.cuda import find_faults, time_case

ROW = {"op", "pass", "shape", "dtype", "backend", "milliseconds", "roofline_fraction", "ratio"}


SMALL = CardSizes(
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
    for op in ON_CARD:
        rows += time_case(card_case(op, torch.device("cpu"), SMALL), measure, remarks)
    assert {row["op"] for row in rows} == set(ON_CARD)
    for row in rows:
        assert set(row) >= ROW
        # bfloat16 keeps eight bits at each of some ten steps.
        assert row["relative_error"] < 5e-2, row
    if not INTERPRETED:
        assert any("decay_scan: triton cannot run here" in remark for remark in remarks)
        assert find_faults([*ON_CARD], rows) == [f"{op} did not run" for op in ON_CARD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_computes_what_every_case_of_a_cpu_does(dtype: torch.dtype) -> None:
    sizes = HostSizes(rows=2, tokens=96, model=64, heads=2, head_dim=16, state=16, experts=4, top_k=2, vocabulary=64)
    for op in ON_HOST:
        differences = compare_variants(host_case(op, dtype, sizes))
        assert "transformers" in differences or op == "decay_scan_vector"
