"""The Triton delta product in the interpreter against the step-by-step definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.delta_scan import triton_impl
from kernels.delta_scan.op import delta_scan
from kernels.tuning import Environment, Table, tune
from tests.helpers.deltas import DeltaCase, call_delta, make_delta_inputs, run_delta
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.helpers.registration import assert_registered

# float32 against a float64 reference: rounding of some hundred additions.
FLOAT32 = 1e-5
# Terms of the gradient of beta that are as large as the inverse's powers cancel: 1.3e-5 on a processor whose library adds
# products up in another order than where it is below 1e-5.
CANCELLING = 3e-5

CASES = [
    DeltaCase(B=1, T=1, G=1, H=1, chunk=16, initial=True),
    # Tokens whose steps lie in two chunks, and a chunk in which no token ends.
    DeltaCase(B=1, T=1, N=3, G=1, H=2, chunk=16, transfer=True),
    DeltaCase(B=1, T=2, N=19, G=1, H=1, chunk=16, initial=True),
    DeltaCase(B=2, T=13, N=3, G=1, H=2, K=20, chunk=32, lengths=(1, 2, 10), initial=True),
    DeltaCase(B=2, T=33, G=1, H=2, K=16, V=16, chunk=16, lengths=(3, 23, 7), initial=True),
    DeltaCase(B=1, T=63, G=1, H=1, chunk=64, lengths=(1, 1, 61), transfer=True),
    DeltaCase(B=1, T=50, N=2, G=1, H=2, chunk=64, gated=False, lengths=(20, 30), transfer=True, initial=True),
    DeltaCase(B=1, T=129, G=1, H=1, K=72, V=40, chunk=128, gated=False),
    DeltaCase(B=1, T=100, G=2, H=2, chunk=64, lengths=(64, 35, 1), initial=True),
    # More columns of K and of V than a program takes at once.
    DeltaCase(B=1, T=17, G=1, H=1, K=130, V=136, chunk=32, initial=True),
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


def test_documents_that_forget_at_once_leave_the_next_ones_finite(poisoned_memory: None) -> None:
    case = DeltaCase(B=1, T=50, G=1, H=2, chunk=32, lengths=(20, 3, 27), initial=True)
    inputs, exact = make_delta_inputs(case, torch.float32), make_delta_inputs(case, torch.float64)
    for given in (inputs, exact):
        assert given.g is not None
        with torch.no_grad():
            given.g.sub_(torch.linspace(0.0, 20.0, case.T).flip(0)[:, None])
    expected = run_delta(case, exact, "reference")
    for name, value in run_delta(case, inputs, "triton").items():
        assert_near(value, expected[name], FLOAT32, name)


def test_equal_keys_that_are_written_twice_over_keep_their_digits(poisoned_memory: None) -> None:
    """The inverse then has entries of 2, while powers of its matrix reach millions."""
    case = DeltaCase(B=1, T=64, G=1, H=1, chunk=64, gated=False, initial=True)
    inputs, exact = make_delta_inputs(case, torch.float32), make_delta_inputs(case, torch.float64)
    for given in (inputs, exact):
        with torch.no_grad():
            given.k.copy_(exact.k[:, :1].expand_as(given.k))
            given.beta.fill_(2.0)
    expected = run_delta(case, exact, "reference")
    for name, value in run_delta(case, inputs, "triton").items():
        assert_near(value, expected[name], CANCELLING if name == "d_beta" else FLOAT32, name)


def test_a_document_never_feels_another() -> None:
    case = DeltaCase(B=1, T=30, N=2, G=1, H=2, chunk=16, lengths=(5, 14, 11))
    inputs = make_delta_inputs(case, torch.float32)
    weight = torch.randn(1, 30, 2, 12, dtype=torch.float64)
    before = run_delta(case, inputs, "triton", {"o": weight})
    changed = weight.clone()
    changed[:, 5:19] = 7.0
    with torch.no_grad():
        for tensor in (inputs.q, inputs.v):
            tensor[:, 5:19] = torch.randn_like(tensor[:, 5:19]) * 3
        inputs.k[:, 5:19] = inputs.k[:, 5:19].flip(1)
        inputs.beta[:, 5:19] = 1.9
        assert inputs.g is not None
        inputs.g[:, 5:19] *= 5
    after = run_delta(case, inputs, "triton", {"o": changed})
    for name in ("o", "d_q", "d_k", "d_v", "d_beta", "d_g"):
        assert_bitwise(after[name][:, :5], before[name][:, :5], f"{name} before")
        assert_bitwise(after[name][:, 19:], before[name][:, 19:], f"{name} after")
    assert_bitwise(after["final"], before["final"], "final state")


def test_read_and_transfer_carry_a_state_through_a_row() -> None:
    case = DeltaCase(B=1, T=20, N=2, G=1, H=2, chunk=16, lengths=(14, 6), transfer=True)
    inputs = make_delta_inputs(case, torch.float32)
    start = torch.randn(1, 2, 8, 12)
    empty = call_delta(case, inputs, "triton")
    entered = call_delta(replace(case, transfer=False), replace(inputs, initial=start), "triton")
    assert empty.read_BTHK is not None and empty.transfer_BHKK is not None
    read = torch.einsum("bthk,bhkv->bthv", empty.read_BTHK, start)
    assert_near(empty.o_BTHV + read, entered.o_BTHV, FLOAT32, "o")
    assert_bitwise(empty.read_BTHK[:, 14:], torch.zeros_like(empty.read_BTHK[:, 14:]), "read past a boundary")
    assert_bitwise(empty.transfer_BHKK, torch.zeros_like(empty.transfer_BHKK), "transfer past a boundary")


def test_slices_of_a_wider_projection_are_read_where_they_lie() -> None:
    case = DeltaCase(B=1, T=20, N=2, G=2, H=2, K=16, V=16, chunk=16)
    inputs = make_delta_inputs(case, torch.float32)
    expected = run_delta(case, inputs, "reference")
    wide = torch.cat([inputs.q.flatten(2), inputs.k.flatten(2), inputs.v.flatten(2)], dim=-1).detach()
    q, k, v = wide.split([32, 64, 64], dim=-1)
    with torch.no_grad():
        out = delta_scan(
            q.unflatten(-1, (2, 16)), k.unflatten(-1, (2, 2, 16)), v.unflatten(-1, (2, 2, 16)), inputs.beta, inputs.g,
            chunk_size=16, backend="triton",
        )  # fmt: skip
    assert_near(out.o_BTHV, expected["o"], FLOAT32)


def test_meta_tensors_pass_through() -> None:
    q, k, v = (
        torch.empty(*s, device="meta", requires_grad=True)
        for s in ((2, 40, 2, 16), (2, 40, 3, 2, 16), (2, 40, 3, 4, 8))
    )
    beta, g = torch.empty(2, 40, 3, 4, device="meta"), torch.empty(2, 40, 4, device="meta")
    out = delta_scan(q, k, v, beta, g, chunk_size=16, backend="triton")
    assert (out.o_BTHV.shape, out.final_state_BHKV.shape) == ((2, 40, 4, 8), (2, 4, 16, 8))
    assert [x.shape for x in torch.autograd.grad(out.o_BTHV.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_registration_is_complete() -> None:
    case = DeltaCase(B=1, T=9, N=2, G=1, H=2, chunk=16, lengths=(4, 5), initial=True)
    for given in (case, replace(case, gated=False, initial=False)):
        x = make_delta_inputs(given, torch.float32)
        assert_registered(triton_impl._forward, x.q, x.k, x.v, x.beta, x.g, x.initial, None, 16)


def test_every_kernel_can_be_tuned_and_all_its_candidates_hold() -> None:
    case = DeltaCase(B=1, T=12, G=1, H=1, K=40, V=40, chunk=16)
    inputs = make_delta_inputs(case, torch.float32)
    expected = list(run_delta(case, inputs, "torch").values())
    table = Table(Environment("a card", "3.9.0", "13.4.59"))
    reports: list[str] = []
    tune(
        lambda: list(run_delta(case, inputs, "triton").values()), expected, lambda _: 1.0, table, tolerance=1e-4,
        report=reports.append,
    )  # fmt: skip
    kernels = {"delta_prepare", "delta_walk", "delta_states_walk", "delta_walk_back", "delta_gradients"}
    assert {entry.split()[0] for entry in table.configs} == kernels
    assert not any("left out" in report for report in reports)


def test_sizes_without_a_kernel_are_refused() -> None:
    q, k, v, beta = (
        torch.zeros(1, 8, 1, 16),
        torch.zeros(1, 8, 1, 1, 16),
        torch.zeros(1, 8, 1, 1, 16),
        torch.zeros(1, 8, 1, 1),
    )
    with pytest.raises(ValueError, match="chunk_size of 16, 32 or a multiple of 64; got 24"):
        delta_scan(q, k, v, beta, chunk_size=24, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        delta_scan(q.double(), k.double(), v.double(), beta, backend="triton")
    q, k = torch.zeros(1, 8, 1, 257), torch.zeros(1, 8, 1, 1, 257)
    with pytest.raises(ValueError, match="states of up to 256 rows; got 257 x"):
        delta_scan(q, k, v, beta, backend="triton")
