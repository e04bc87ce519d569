"""The Triton delta rule with a gate of each key channel in the interpreter, against the step-by-step definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.delta_scan.op import delta_scan
from kernels.delta_scan.vector import triton_impl
from kernels.tuning import Environment, Table, tune
from tests.helpers.deltas import DeltaCase, call_delta, make_delta_inputs, run_delta
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.helpers.registration import assert_registered

# float32 against a float64 reference: rounding of some hundred additions.
FLOAT32 = 1e-5

CASES = [
    DeltaCase(B=1, T=1, G=1, H=1, chunk=16, channels=True, initial=True),
    DeltaCase(B=1, T=63, G=1, H=1, chunk=64, channels=True, lengths=(1, 1, 61), transfer=True),
    DeltaCase(B=2, T=33, G=2, H=2, chunk=16, channels=True, lengths=(3, 23, 7), initial=True),
    # Keys and values over more than one block, neither a power of two.
    DeltaCase(B=1, T=40, G=1, H=1, K=40, V=72, chunk=32, channels=True, initial=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_equal_single_steps_twice_bitwise(case: DeltaCase, poisoned_memory: None) -> None:
    inputs = make_delta_inputs(case, torch.float32)
    expected = run_delta(case, make_delta_inputs(case, torch.float64), "reference")
    once, again = run_delta(case, inputs, "triton"), run_delta(case, inputs, "triton")
    assert set(once) == set(expected)
    for name, value in once.items():
        assert_near(value, expected[name], FLOAT32, name)
        assert_bitwise(again[name], value, f"{name} repeated")


def test_gates_of_minus_twenty_keep_float32(poisoned_memory: None) -> None:
    case = DeltaCase(B=1, T=50, G=1, H=1, chunk=64, channels=True, lengths=(20, 3, 27), initial=True)
    inputs, exact = (make_delta_inputs(case, dtype) for dtype in (torch.float32, torch.float64))
    gates = -20 * torch.rand(1, 50, 1, case.K, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for given in (inputs, exact):
        assert given.g is not None
        given.g.data.copy_(gates)
    expected = run_delta(case, exact, "reference")
    for name, value in run_delta(case, inputs, "triton").items():
        assert_near(value, expected[name], FLOAT32, name)


def test_a_document_never_feels_another() -> None:
    case = DeltaCase(B=1, T=30, G=1, H=1, chunk=16, channels=True, lengths=(5, 14, 11))
    inputs = make_delta_inputs(case, torch.float32)
    weight = torch.randn(1, 30, 1, 12, dtype=torch.float64)
    before = run_delta(case, inputs, "triton", {"o": weight})
    changed = weight.clone()
    changed[:, 5:19] = 7.0
    with torch.no_grad():
        for tensor in (inputs.q, inputs.v):
            tensor[:, 5:19] = torch.randn_like(tensor[:, 5:19]) * 3
        inputs.beta[:, 5:19] = 1.9
        assert inputs.g is not None
        inputs.g[:, 5:19] *= 50
    after = run_delta(case, inputs, "triton", {"o": changed})
    for name in ("o", "d_q", "d_k", "d_v", "d_beta", "d_g"):
        assert_bitwise(after[name][:, :5], before[name][:, :5], f"{name} before")
        assert_bitwise(after[name][:, 19:], before[name][:, 19:], f"{name} after")
    assert_bitwise(after["final"], before["final"], "final state")


def test_meta_tensors_pass_through() -> None:
    q, k, v = (torch.empty(2, 40, 4, size, device="meta", requires_grad=True) for size in (16, 16, 8))
    beta, g = torch.empty(2, 40, 1, 4, device="meta"), torch.empty(2, 40, 4, 16, device="meta")
    out = delta_scan(q, k.unsqueeze(2), v.unsqueeze(2), beta, g, chunk_size=16, backend="triton")
    assert (out.o_BTHV.shape, out.final_state_BHKV.shape) == ((2, 40, 4, 8), (2, 4, 16, 8))
    assert [x.shape for x in torch.autograd.grad(out.o_BTHV.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_registration_is_complete() -> None:
    case = DeltaCase(B=1, T=9, G=1, H=1, chunk=16, channels=True, lengths=(4, 5), initial=True)
    x = make_delta_inputs(case, torch.float32)
    k, v, beta = (tensor.squeeze(2) for tensor in (x.k, x.v, x.beta))
    assert_registered(triton_impl._forward, x.q, k, v, beta, x.g, x.initial, None, 16)


def test_every_kernel_can_be_tuned_and_all_its_candidates_hold() -> None:
    case = DeltaCase(B=1, T=12, G=1, H=1, K=40, V=40, chunk=16, channels=True)
    inputs = make_delta_inputs(case, torch.float32)
    expected = list(run_delta(case, inputs, "torch").values())
    table = Table(Environment("a card", "3.9.0", "13.4.59"))
    reports: list[str] = []
    tune(
        lambda: list(run_delta(case, inputs, "triton").values()), expected, lambda _: 1.0, table, tolerance=1e-4,
        report=reports.append,
    )  # fmt: skip
    kernels = {f"vector_delta_{name}" for name in ("prepare", "walk", "states_walk", "walk_back", "pairs", "gradients")}
    assert {entry.split()[0] for entry in table.configs} == kernels
    assert not any("left out" in report for report in reports)


def test_sizes_without_a_kernel_are_refused() -> None:
    case = DeltaCase(B=1, T=8, G=1, H=1, K=257, channels=True, chunk=8)
    inputs = make_delta_inputs(case, torch.float32)
    with pytest.raises(ValueError, match="chunk_size of 16, 32 or a multiple of 64; got 8"):
        call_delta(case, inputs, "triton")
    with pytest.raises(ValueError, match="states of up to 256 rows; got 257 x"):
        call_delta(replace(case, chunk=16), inputs, "triton")
