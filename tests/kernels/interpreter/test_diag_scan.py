"""The Triton scan of Mamba in the interpreter, against the step-by-step definition."""

from __future__ import annotations

import pytest
import torch
from amfm_mixers.diag_scan import triton_impl

from tests.examples.mixers.diags import DiagCase, call, make, run
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.helpers.registration import assert_registered
from tests.kernels.twice import Twice

# float32 against a float64 reference: rounding of some hundred additions.
FLOAT32 = 1e-5

CASES = [
    DiagCase(B=1, T=1, C=1, N=1, initial=True),
    DiagCase(B=1, T=63, C=3, N=2, chunk=32, lengths=(1, 1, 61)),
    DiagCase(B=2, T=40, C=11, N=3, chunk=32, lengths=(3, 30, 7), initial=True),
    DiagCase(B=1, T=33, C=8, N=4, chunk=16, lengths=(17, 16), initial=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_walk_equals_single_steps_twice_bitwise(case: DiagCase, twice: Twice, poisoned_memory: None) -> None:
    arguments = make(case, torch.float32)
    expected = run(make(case, torch.float64), case, "reference")
    for name, value in twice(lambda: run(arguments, case, "triton")).items():
        assert_near(value, expected[name], FLOAT32, name)


def test_decays_that_vanish_leave_everything_finite_and_near(poisoned_memory: None) -> None:
    case = DiagCase(B=1, T=25, C=3, N=2, lengths=(10, 3, 12), initial=True)
    arguments, exact = make(case, torch.float32), make(case, torch.float64)
    with torch.no_grad():
        for these in (arguments, exact):
            these["dt"][:, :5] = -200.0  # softplus underflows to 0
            these["dt"][:, 5:22] = 50.0  # decays of about e^-50 a token
    expected = run(exact, case, "reference")
    for name, value in run(arguments, case, "triton").items():
        assert_near(value, expected[name], FLOAT32, name)


def test_a_document_never_feels_another() -> None:
    case = DiagCase(B=1, T=40, C=3, N=2, chunk=32, lengths=(5, 14, 21))
    arguments = make(case, torch.float32)
    before = run(arguments, case, "triton")
    with torch.no_grad():
        for name in ("x", "dt", "B", "C"):
            arguments[name][:, 5:19] = torch.randn_like(arguments[name][:, 5:19]) * 3
    after = run(arguments, case, "triton")
    for name in ("y", "d_x", "d_dt", "d_B", "d_C"):
        assert_bitwise(after[name][:, :5], before[name][:, :5], f"{name} before")
        assert_bitwise(after[name][:, 19:], before[name][:, 19:], f"{name} after")
    assert_bitwise(after["final_state"], before["final_state"], "final_state")
    assert not torch.equal(after["y"][:, 5:19], before["y"][:, 5:19])


def test_slices_of_a_wider_projection_are_read_where_they_lie() -> None:
    case = DiagCase(B=2, T=20, C=4, N=2)
    arguments = make(case, torch.float32)
    expected = call(arguments, case, "reference")
    wide = torch.cat([arguments[name].detach() for name in ("B", "x", "C")], dim=-1)
    sliced = dict(zip(("B", "x", "C"), wide.split([2, 4, 2], dim=-1)))
    assert not sliced["x"].is_contiguous()
    for value, exact in zip(call(arguments | sliced, case, "triton"), expected):
        assert_near(value, exact, FLOAT32)


def test_states_are_kept_only_for_backward() -> None:
    case = DiagCase(B=1, T=40, C=3, N=2)
    arguments = make(case, torch.float32)
    y = call(arguments, case, "triton")[0]
    saved = [tuple(x.shape) for x in y.grad_fn.saved_tensors if x is not None]
    assert (1, 3, 2, 3) in saved
    assert sum(len(shape) == 4 for shape in saved) == 1
    with torch.no_grad():
        assert call(arguments, case, "triton")[0].grad_fn is None


def test_meta_tensors_pass_through() -> None:
    case = DiagCase(initial=True)
    meta = {
        n: None if t is None else t.detach().to("meta").requires_grad_() for n, t in make(case, torch.float32).items()
    }
    out = call(meta, case, "triton")
    assert [tuple(each.shape) for each in out] == [(2, 63, 6), (2, 6, 5), (2, 6, 5)]


def test_registration_is_complete() -> None:
    x, dt, B, C = torch.randn(1, 9, 2), torch.rand(1, 9, 2), torch.randn(1, 9, 1), torch.randn(1, 9, 1)
    A, D = -torch.rand(2, 1), torch.randn(2)
    leaves = [each.requires_grad_() for each in (x, dt, A, B, C, D)]
    assert_registered(triton_impl._forward, *leaves, None, None, 16, True)


def test_sizes_without_a_kernel_are_refused() -> None:
    arguments = make(DiagCase(), torch.float32)
    with pytest.raises(ValueError, match="chunk_size of a multiple of 16; got 24"):
        call(arguments, DiagCase(chunk=24), "triton")
    with pytest.raises(ValueError, match="float64"):
        call(make(DiagCase(), torch.float64), DiagCase(), "triton")
    case = DiagCase(N=17)
    with pytest.raises(ValueError, match="states of up to 16 rows; got 17 x 1"):
        call(make(case, torch.float32), case, "triton")
