"""The scan with a gate of each key channel against the step-by-step definition."""

from __future__ import annotations

import pytest
import torch

from kernels.decay_scan.op import decay_scan, decay_step
from tests.helpers.numbers import assert_near
from tests.helpers.scans import ScanCase, make_inputs, run_scan

# float64: rounding of some 100 additions; the chunked form and the definition differ in order only.
FLOAT64 = 1e-12

CASES = [
    ScanCase(T=1, H=1, kind="vector"),
    ScanCase(T=1, kind="vector", initial=True),
    ScanCase(T=63, H=1, kind="vector", lengths=(1, 1, 61)),
    ScanCase(T=100, H=3, P=5, N=7, kind="vector", lengths=(1, 39, 1, 59), initial=True),
    ScanCase(T=129, kind="vector", chunk=64, lengths=(40, 70, 19)),
    ScanCase(T=129, H=2, kind="vector", initial=True),
    ScanCase(T=64, kind="vector", lengths=(32, 32), initial=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_equal_single_steps(case: ScanCase, poisoned_memory: None) -> None:
    inputs = make_inputs(case, torch.float64)
    expected = run_scan(case, inputs, "reference")
    for name, value in run_scan(case, inputs, "torch").items():
        assert_near(value, expected[name], FLOAT64, name)


@pytest.mark.parametrize("kind", ["decay", "vector"])
def test_steps_continue_a_scan(kind: str) -> None:
    case = ScanCase(T=9, H=3, P=5, N=7, kind=kind, initial=True)
    inputs = make_inputs(case, torch.float64)
    q, k, v, g = inputs.tensors
    whole = decay_scan(q, k, v, g, initial_state_BHKV=inputs.initial)
    state = decay_scan(*(t[:, :4] for t in inputs.tensors), initial_state_BHKV=inputs.initial).final_state_BHKV
    for t in range(4, 9):
        o, state = decay_step(q[:, t], k[:, t], v[:, t], g[:, t], state)
        assert_near(o, whole.o_BTHV[:, t], FLOAT64, f"token {t}")
    assert_near(state, whole.final_state_BHKV, FLOAT64, "state")
