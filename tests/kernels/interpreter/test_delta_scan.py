"""The Triton delta rules, with a gate for each head and for each key channel, in the interpreter against single steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from amfm.kernels.delta_scan import triton_impl
from amfm.kernels.delta_scan.op import delta_scan
from amfm.kernels.delta_scan.vector import triton_impl as vector_triton
from amfm.kernels.runtime import tuning
from amfm.kernels.runtime.tuning import Environment, Table, tune
from tests.helpers.deltas import DeltaCase, call_delta, make_delta_inputs, run_delta
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.helpers.registration import assert_registered
from tests.kernels.twice import Twice

# float32 against a float64 reference: rounding of some hundred additions.
FLOAT32 = 1e-5
# Terms of the gradient of beta that are as large as the inverse's powers cancel: 1.3e-5 on a processor whose library adds
# products up in another order than where it is below 1e-5.
CANCELLING = 3e-5
# Gates: one for each head, one for each key channel.
GATES = pytest.mark.parametrize("channels", [False, True], ids=["heads", "channels"])

CASES = [
    DeltaCase(B=1, T=1, G=1, H=1, chunk=16, initial=True),
    # Tokens whose steps are in two chunks, and a chunk in which no token ends.
    DeltaCase(B=1, T=1, N=3, G=1, H=2, chunk=16, transfer=True),
    DeltaCase(B=1, T=2, N=19, G=1, H=1, chunk=16, initial=True),
    pytest.param(
        DeltaCase(B=2, T=13, N=3, G=1, H=2, K=20, chunk=32, lengths=(1, 2, 10), initial=True), marks=pytest.mark.slow
    ),
    DeltaCase(B=1, T=33, G=1, H=1, K=16, V=16, chunk=16, lengths=(3, 23, 7), initial=True),
    DeltaCase(B=1, T=63, G=1, H=1, chunk=64, lengths=(1, 1, 61), transfer=True),
    pytest.param(
        DeltaCase(B=1, T=50, N=2, G=1, H=2, chunk=64, gated=False, lengths=(20, 30), transfer=True, initial=True),
        marks=pytest.mark.slow,
    ),
    pytest.param(DeltaCase(B=1, T=129, G=1, H=1, K=72, V=40, chunk=128, gated=False), marks=pytest.mark.slow),
    DeltaCase(B=1, T=70, G=2, H=2, chunk=64, lengths=(64, 5, 1), initial=True),
    # More columns of K and of V than a program takes at once.
    DeltaCase(B=1, T=17, G=1, H=1, K=130, V=136, chunk=32, initial=True),
    DeltaCase(B=1, T=1, G=1, H=1, chunk=16, channels=True, initial=True),
    DeltaCase(B=1, T=63, G=1, H=1, chunk=64, channels=True, lengths=(1, 1, 61), transfer=True),
    pytest.param(
        DeltaCase(B=2, T=20, G=2, H=2, chunk=16, channels=True, lengths=(3, 10, 7), initial=True),
        marks=pytest.mark.slow,
    ),
    # Keys and values over more than one block, neither a power of two.
    DeltaCase(B=1, T=18, G=1, H=1, K=40, V=72, chunk=16, channels=True, initial=True),
    DeltaCase(B=1, T=19, G=2, H=2, K=40, V=20, chunk=16, channels=True, erases=True, lengths=(3, 16), initial=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_equal_single_steps_twice_bitwise(case: DeltaCase, twice: Twice, poisoned_memory: None) -> None:
    inputs = make_delta_inputs(case, torch.float32)
    expected = run_delta(case, make_delta_inputs(case, torch.float64), "reference")
    once = twice(lambda: run_delta(case, inputs, "triton"))
    assert set(once) == set(expected)
    for name, value in once.items():
        assert_near(value, expected[name], FLOAT32, name)


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


def test_channels_with_gates_of_minus_twenty_keep_float32(poisoned_memory: None) -> None:
    case = DeltaCase(B=1, T=50, G=1, H=1, chunk=64, channels=True, lengths=(20, 3, 27), initial=True)
    inputs, exact = (make_delta_inputs(case, dtype) for dtype in (torch.float32, torch.float64))
    gates = -20 * torch.rand(1, 50, 1, case.K, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for given in (inputs, exact):
        assert given.g is not None
        given.g.data.copy_(gates)
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


@GATES
def test_a_document_never_feels_another(channels: bool) -> None:
    case = DeltaCase(B=1, T=30, G=1, H=1, chunk=16, lengths=(5, 14, 11), channels=channels)
    if not channels:
        case = replace(case, N=2)
    inputs = make_delta_inputs(case, torch.float32)
    weight = torch.randn(1, 30, case.H, 12, dtype=torch.float64)
    before = run_delta(case, inputs, "triton", {"o": weight})
    changed = weight.clone()
    changed[:, 5:19] = 7.0
    with torch.no_grad():
        for tensor in (inputs.q, inputs.v):
            tensor[:, 5:19] = torch.randn_like(tensor[:, 5:19]) * 3
        inputs.k[:, 5:19] = inputs.k[:, 5:19].flip(1)
        inputs.beta[:, 5:19] = 1.9
        assert inputs.g is not None
        inputs.g[:, 5:19] *= 50 if channels else 5
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


@GATES
def test_meta_tensors_pass_through(channels: bool) -> None:
    keys, steps, gate = ((4, 16), 1, (4, 16)) if channels else ((2, 16), 3, (4,))
    shapes = (2, 40, *keys), (2, 40, steps, *keys), (2, 40, steps, 4, 8)
    q, k, v = (torch.empty(*shape, device="meta", requires_grad=True) for shape in shapes)
    beta, g = torch.empty(2, 40, steps, 4, device="meta"), torch.empty(2, 40, *gate, device="meta")
    out = delta_scan(q, k, v, beta, g, chunk_size=16, backend="triton")
    assert (out.o_BTHV.shape, out.final_state_BHKV.shape) == ((2, 40, 4, 8), (2, 4, 16, 8))
    assert [x.shape for x in torch.autograd.grad(out.o_BTHV.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_registration_is_complete() -> None:
    case = DeltaCase(B=1, T=9, N=2, G=1, H=2, chunk=16, lengths=(4, 5), initial=True)
    for given in (case, replace(case, gated=False, initial=False)):
        x = make_delta_inputs(given, torch.float32)
        assert_registered(triton_impl._forward, x.q, x.k, x.v, x.beta, x.g, x.initial, None, 16)


def test_registration_of_the_rule_with_channels_is_complete() -> None:
    case = DeltaCase(B=1, T=9, G=1, H=1, chunk=16, channels=True, erases=True, initial=True)
    x = make_delta_inputs(case, torch.float32)
    k, v, beta = (tensor.squeeze(2) for tensor in (x.k, x.v, x.beta))
    for erase in (None, x.erase):
        assert_registered(vector_triton._forward, x.q, k, v, beta, x.g, erase, x.initial, None, 16)


KERNELS = pytest.mark.parametrize(
    ("channels", "kernels"),
    [
        (False, "delta_prepare delta_walk delta_states_walk delta_walk_back delta_gradients"),
        (
            True,
            "vector_delta_prepare vector_delta_walk vector_delta_states_walk vector_delta_walk_back vector_delta_pairs "
            "vector_delta_gradients",
        ),
    ],
    ids=["heads", "channels"],
)


@KERNELS
def test_all_candidates_of_every_kernel_hold_together(channels: bool, kernels: str) -> None:
    """The first of each, the second of each, and so on: as many calls as the longest list is long."""
    case = DeltaCase(B=1, T=12, G=1, H=1, K=20, V=12, chunk=16, channels=channels)
    inputs = make_delta_inputs(case, torch.float32)
    expected = run_delta(case, inputs, "torch")
    with tuning._session() as session:
        run_delta(case, inputs, "triton")
        assert {entry.split()[0] for entry in session.asked} == set(kernels.split())
        for number in range(1, max(map(len, session.asked.values()))):
            session.forced |= {entry: each[number % len(each)] for entry, each in session.asked.items()}
            for name, value in run_delta(case, inputs, "triton").items():
                assert_near(value, expected[name], 1e-4, f"{name} of candidates {number}")


@pytest.mark.slow
@KERNELS
def test_every_kernel_can_be_tuned_and_all_its_candidates_hold(channels: bool, kernels: str) -> None:
    case = DeltaCase(B=1, T=12, G=1, H=1, K=20, V=12, chunk=16, channels=channels)
    inputs = make_delta_inputs(case, torch.float32)
    expected = list(run_delta(case, inputs, "torch").values())
    table = Table(Environment("a GPU", "3.9.0", "13.4.59"))
    reports: list[str] = []
    tune(
        lambda: list(run_delta(case, inputs, "triton").values()), expected, lambda _: 1.0, table, tolerance=1e-4,
        report=reports.append,
    )  # fmt: skip
    assert {entry.split()[0] for entry in table.configs} == set(kernels.split())
    assert not any("left out" in report for report in reports)


@GATES
def test_sizes_without_a_kernel_are_refused(channels: bool) -> None:
    case = DeltaCase(B=1, T=8, G=1, H=1, channels=channels)
    inputs = make_delta_inputs(case, torch.float32)
    with pytest.raises(ValueError, match="chunk_size of 16, 32 or a multiple of 64; got 8"):
        call_delta(replace(case, chunk=8), inputs, "triton")
    with pytest.raises(ValueError, match="float64"):
        call_delta(case, make_delta_inputs(case, torch.float64), "triton")
    with pytest.raises(ValueError, match="states of up to 256 rows; got 257 x"):
        call_delta(case, make_delta_inputs(replace(case, K=257), torch.float32), "triton")
