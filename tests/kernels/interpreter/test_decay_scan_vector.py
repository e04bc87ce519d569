"""The Triton scan with a gate of each key channel in the interpreter, against the step-by-step definition."""

from __future__ import annotations

import pytest
import torch

from kernels.decay_scan.op import decay_scan
from kernels.decay_scan.vector import triton_impl as vector_triton
from kernels.decay_scan.vector.triton_impl import scan_vector_triton
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.helpers.registration import assert_registered
from tests.helpers.scans import ScanCase, make_inputs, run_scan

# float32 against a float64 reference: rounding of some hundred additions.
FLOAT32 = 1e-5

CASES = [
    ScanCase(B=1, T=1, H=1, kind="vector", chunk=16, initial=True),
    ScanCase(B=1, T=63, H=1, kind="vector", chunk=32, lengths=(1, 1, 61)),
    ScanCase(B=2, T=40, H=2, kind="vector", chunk=16, lengths=(3, 30, 7), initial=True),
    # Keys and values over more than one block, neither a power of two.
    ScanCase(B=1, T=100, H=1, P=40, N=72, kind="vector", chunk=64, lengths=(70, 30), initial=True),
    ScanCase(B=1, T=65, H=2, P=5, N=7, kind="vector", chunk=128),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_walk_equals_single_steps_twice_bitwise(case: ScanCase, poisoned_memory: None) -> None:
    inputs = make_inputs(case, torch.float32)
    exact = make_inputs(case, torch.float64)
    expected = run_scan(case, exact, "reference")
    once, again = run_scan(case, inputs, "triton"), run_scan(case, inputs, "triton")
    for name, value in once.items():
        assert_near(value, expected[name], FLOAT32, name)
        assert_bitwise(again[name], value, f"{name} repeated")


@pytest.mark.parametrize("lengths", [(), (20, 27)])
def test_segments_and_states_made_again_equal_one_walk(lengths: tuple[int, ...], poisoned_memory: None) -> None:
    case = ScanCase(B=1, T=47, H=1, chunk=16, lengths=lengths, initial=True, kind="vector")
    inputs = make_inputs(case, torch.float32)
    assert inputs.initial is not None
    leaves = [*inputs.tensors, inputs.initial]
    results = []
    for segment_tiles, keep_states in ((0, True), (0, False), (1, True), (2, False)):
        o, final = scan_vector_triton(
            *leaves, inputs.documents, 16, segment_tiles=segment_tiles, keep_states=keep_states
        )
        total = (o * inputs.weights[0]).sum() + (final * inputs.weights[1]).sum()
        results.append([o, final, *torch.autograd.grad(total, leaves)])
    for other in results[1:]:
        for i, (one, many) in enumerate(zip(results[0], other)):
            assert_near(many, one, FLOAT32, f"tensor {i}")


def test_gates_that_forget_at_once_stay_finite(poisoned_memory: None) -> None:
    """Sums of a tile's gates beyond what e^-b could hold, next to channels that keep everything.

    One gate of -1e4 in a document takes no digits from the sums around it.
    """
    case = ScanCase(B=1, T=50, H=1, chunk=64, lengths=(20, 3, 27), initial=True, kind="vector")
    inputs, exact = make_inputs(case, torch.float32), make_inputs(case, torch.float64)
    for given in (inputs, exact):
        with torch.no_grad():
            given.tensors[3].mul_(torch.tensor([0.0, 1.0, 30.0, 100.0]).repeat(4))
            given.tensors[3][:, 30, :, 1] = -1e4
    expected = run_scan(case, exact, "reference")
    for name, value in run_scan(case, inputs, "triton").items():
        assert_near(value, expected[name], FLOAT32, name)


def test_a_document_never_feels_another() -> None:
    case = ScanCase(B=1, T=40, H=1, chunk=16, lengths=(5, 14, 21), kind="vector")
    inputs = make_inputs(case, torch.float32)
    before = run_scan(case, inputs, "triton")
    with torch.no_grad():
        for tensor in inputs.tensors:
            tensor[:, 5:19] = -torch.rand_like(tensor[:, 5:19]) * 3
        inputs.weights[0][:, 5:19] = 7.0
    after = run_scan(case, inputs, "triton")
    for name in ("y", "d_q", "d_k", "d_v", "d_g"):
        assert_bitwise(after[name][:, :5], before[name][:, :5], f"{name} before")
        assert_bitwise(after[name][:, 19:], before[name][:, 19:], f"{name} after")
    assert_bitwise(after["final_state"], before["final_state"], "final_state")


def test_slices_of_a_wider_projection_are_read_where_they_lie() -> None:
    wide = torch.randn(1, 20, 3 * 32)
    q, k, v = (part.unflatten(-1, (2, 16)) for part in wide.split(32, dim=-1))
    g = -torch.rand(1, 20, 2, 16)
    out = decay_scan(q, k, v, g, chunk_size=16, backend="triton")
    expected = decay_scan(q.double(), k.double(), v.double(), g.double(), backend="reference")
    assert_near(out.o_BTHV, expected.o_BTHV, FLOAT32)


def test_meta_tensors_pass_through() -> None:
    q, k, v, g = (torch.empty(2, 40, 4, 16, device="meta", requires_grad=True) for _ in range(4))
    out = decay_scan(q, k, v, g, chunk_size=16, backend="triton")
    assert out.o_BTHV.shape == (2, 40, 4, 16)
    assert out.final_state_BHKV.shape == (2, 4, 16, 16)


def test_registration_is_complete() -> None:
    case = ScanCase(B=1, T=17, H=1, chunk=16, kind="vector")
    assert_registered(vector_triton._forward, *make_inputs(case, torch.float32).tensors, None, None, 16, 0, True)


def test_sizes_without_a_kernel_are_refused() -> None:
    q, k, v, g = (torch.zeros(1, 8, 1, 16) for _ in range(4))
    with pytest.raises(ValueError, match="chunk_size of 16, 32 or a multiple of 64; got 24"):
        decay_scan(q, k, v, g, chunk_size=24, backend="triton")
    with pytest.raises(ValueError, match="states of up to 256 rows; got 300 x"):
        decay_scan(torch.zeros(1, 8, 1, 300), torch.zeros(1, 8, 1, 300), v, torch.zeros(1, 8, 1, 300), backend="triton")
    with pytest.raises(ValueError, match="float64"):
        decay_scan(q.double(), k.double(), v.double(), g, backend="triton")
