"""Counts of what kernels move and multiply, against counts by hand."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.causal_conv1d.op import causal_conv1d, convolution_bytes
from amfm.kernels.decay_scan.op import mamba2_scan
from amfm.kernels.delta_scan.op import delta_flops
from amfm.kernels.linear_cross_entropy.op import linear_cross_entropy
from amfm.kernels.swiglu.op import swiglu, swiglu_bytes
from benchmarks.kernels.audit import count_named
from benchmarks.kernels.counting import count_launches
from tests.helpers.deltas import DeltaCase, call_delta, make_delta_inputs


def test_elementwise_kernel_moves_each_byte_once() -> None:
    x = torch.randn(5, 34, dtype=torch.bfloat16)
    with count_launches() as launches:
        swiglu(x, backend="triton")
    (launch,) = launches
    assert launch.kernel == "swiglu_forward_kernel"
    assert launch.distinct_bytes == launch.requested_bytes == swiglu_bytes(5 * 17, 2, backward=False)
    assert launch.traffic["gate_up"].distinct_read == 5 * 34 * 2
    assert launch.traffic["y"].distinct_written == 5 * 17 * 2
    assert (launch.dots, launch.dot_flops) == (0, 0)


def test_addresses_read_again_count_once_as_distinct_and_each_time_as_requested() -> None:
    x, weight = torch.randn(1, 48, 32, dtype=torch.bfloat16), torch.randn(32, 4, dtype=torch.bfloat16)
    with count_launches() as launches:
        causal_conv1d(x, weight, None, backend="triton")
    (launch,) = launches
    taps = 32 * 4 * 2
    assert launch.distinct_bytes == convolution_bytes(1, 48, 32) + taps
    # Token t reads itself and up to three before it: 4 * 48 - 6 rows.
    assert launch.traffic["x"].requested_read == (4 * 48 - 6) * 32 * 2


def test_products_of_the_scan_are_counted() -> None:
    T, H, P, N, Q = 32, 2, 16, 16, 16
    x, dt, B, C = torch.randn(1, T, H, P), torch.randn(1, T, H), torch.randn(1, T, 1, N), torch.randn(1, T, 1, N)
    with count_launches() as launches:
        mamba2_scan(x, dt, torch.zeros(H), B, C, torch.ones(H), torch.zeros(H), chunk_size=Q, backend="triton")
    (launch,) = launches
    # For each head and chunk: C B^T, C S, (C B^T) x, and B^T x.
    assert launch.dot_flops == H * (T // Q) * 2 * Q * (Q * N + N * P + Q * P + N * P)
    assert launch.dots == 4 * H * (T // Q)
    assert launch.traffic["v"].distinct_read == x.numel() * 4
    assert launch.traffic["k"].requested_read == H * B.numel() * 4


def test_shares_of_one_memory_are_one_argument() -> None:
    halves = torch.randn(2, 4, 64)
    with count_launches() as launches:
        causal_conv1d(halves[1:], torch.randn(64, 2), None, backend="triton")
    assert launches[0].traffic["x"].distinct_read == 4 * 64 * 4


def test_counting_ends_with_its_block_even_when_a_launch_fails() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="stop"), count_launches() as launches:
        swiglu(x, backend="triton")
        raise ValueError("stop")
    swiglu(x, backend="triton")
    assert len(launches) == 1


def test_cross_entropy_reads_each_logit_once() -> None:
    hidden, weight = torch.randn(70, 32, requires_grad=True), torch.randn(90, 32, requires_grad=True)
    with count_launches() as launches:
        linear_cross_entropy(hidden, weight, torch.randint(0, 90, (70,)), backend="triton")
    reads = sum(launch.traffic["logits"].requested_read for launch in launches if "logits" in launch.traffic)
    assert reads == 70 * 90 * 4


# The quick one, of swiglu, is in tests/benchmarks/kernels/test_audit.py.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal_conv1d", "swiglu"])
def test_streaming_kernels_stay_near_their_minimum(name: str) -> None:
    rows = list(count_named([name]))
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    for row in rows:
        assert row["holds"], row
        assert row["bytes"] >= row["minimum_bytes"]
        assert row["milliseconds"] == pytest.approx(row["bytes"] / 3.0e12 * 1e3)


def test_unknown_operations_are_refused() -> None:
    with pytest.raises(ValueError, match="--op nonsense: there is no such operation; use attention"):
        list(count_named(["nonsense"]))


def test_products_of_channel_gates_are_those_of_the_formula_but_for_keys_taken_by_halves() -> None:
    chunk, size, width, levels = 16, 32, 64, 4
    case = DeltaCase(B=1, T=2 * chunk, G=1, H=1, K=size, V=width, chunk=chunk, channels=True, erases=True)
    with count_launches() as launches:
        call_delta(case, make_delta_inputs(case, torch.bfloat16), "triton")
    counted = {launch.kernel: launch.dot_flops for launch in launches}
    keys, inverse = case.T * 4 * chunk * size, case.T * chunk**2
    values = delta_flops(1, case.T, 1, 1, 1, size, width, chunk_size=chunk) - keys - inverse
    assert counted["vector_walk_kernel"] == values
    # The inverse's products are of whole squares, also by halves: (4 levels - 16) chunk^2 a token.
    assert counted["vector_prepare_kernel"] == levels * keys + case.T * (4 * levels - 16) * chunk**2
