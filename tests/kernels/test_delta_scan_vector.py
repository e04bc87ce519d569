"""The delta rule with a gate of each key channel, in chunks, against its step-by-step definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from amfm.kernels.common.chunks import cut_gates
from amfm.kernels.delta_scan.op import delta_scan, delta_step
from amfm.kernels.delta_scan.torch_impl import compose_delta
from tests.helpers.deltas import DeltaCase, call_delta, make_delta_inputs, run_delta
from tests.helpers.numbers import assert_bitwise, assert_near

# float64: rounding of some hundred additions; the chunked form and the definition differ in order only.
FLOAT64 = 1e-12
# float32: the same sums with 2^-24 a step.
FLOAT32 = 1e-5

CASES = [
    DeltaCase(T=1, G=1, H=1, channels=True, initial=True),
    DeltaCase(T=63, G=2, H=2, channels=True, lengths=(1, 1, 61), transfer=True),
    DeltaCase(T=100, G=3, H=3, chunk=64, channels=True, lengths=(40, 1, 59), initial=True, transfer=True),
    # More heads than a piece of work holds, and chunks longer than the row.
    DeltaCase(B=3, T=40, G=40, H=40, K=2, V=3, chunk=64, channels=True, lengths=(16, 3, 21), initial=True),
    DeltaCase(T=150, G=4, H=4, chunk=16, channels=True, lengths=(40, 110), initial=True),
    DeltaCase(T=1, G=1, H=1, channels=True, erases=True, initial=True),
    DeltaCase(T=63, G=2, H=2, channels=True, erases=True, lengths=(1, 1, 61), transfer=True),
    DeltaCase(B=3, T=100, G=40, H=40, K=2, V=3, chunk=16, channels=True, erases=True, lengths=(40, 60), initial=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_equal_single_steps(case: DeltaCase, poisoned_memory: None, one_thread: None) -> None:
    inputs = make_delta_inputs(case, torch.float64)
    expected = run_delta(case, inputs, "reference")
    for name, value in run_delta(case, inputs, "torch").items():
        assert_near(value, expected[name], FLOAT64, name)


def test_composition_for_the_compiler_equals_the_definition() -> None:
    case = replace(CASES[2], erases=True)
    x = make_delta_inputs(replace(case, transfer=False), torch.float64)
    expected = run_delta(replace(case, transfer=False), x, "reference")
    assert x.g is not None
    rows = (x.q, x.k, x.v, x.beta, cut_gates(x.g, x.documents))
    o, final = compose_delta(*rows, x.initial, x.documents, case.chunk, x.erase)
    assert_near(o, expected["o"], FLOAT64, "o")
    assert_near(final, expected["final"], FLOAT64, "final state")


def test_equal_gates_of_all_channels_are_the_gate_of_a_head() -> None:
    case = DeltaCase(T=63, G=2, H=2, lengths=(20, 43), initial=True)
    inputs = make_delta_inputs(case, torch.float64)
    assert inputs.g is not None
    spread = replace(inputs, g=inputs.g[..., None].expand(-1, -1, -1, case.K))
    expected, actual = call_delta(case, inputs, "torch"), call_delta(case, spread, "torch")
    assert_near(actual.o_BTHV, expected.o_BTHV, FLOAT64, "o")
    assert_near(actual.final_state_BHKV, expected.final_state_BHKV, FLOAT64, "final state")


def test_a_key_that_erases_in_full_is_the_delta_rule() -> None:
    case = DeltaCase(T=63, G=2, H=2, channels=True, lengths=(20, 43), initial=True)
    inputs = make_delta_inputs(case, torch.float64)
    expected = call_delta(case, inputs, "torch")
    actual = call_delta(case, replace(inputs, erase=inputs.k[:, :, 0]), "torch")
    assert_near(actual.o_BTHV, expected.o_BTHV, FLOAT64, "o")
    assert_near(actual.final_state_BHKV, expected.final_state_BHKV, FLOAT64, "final state")


@pytest.mark.parametrize("strength", [1.0, 5.0, 20.0])
def test_gates_of_any_strength_keep_float32(strength: float) -> None:
    """Down to -20 a token in a chunk of 64: e^-b of its sums would be infinite, and no bound on gates is asked for."""
    case = DeltaCase(T=100, G=2, H=2, chunk=64, channels=True, lengths=(37, 63), initial=True)
    inputs, exact = (make_delta_inputs(case, dtype) for dtype in (torch.float32, torch.float64))
    gates = -strength * torch.rand(2, 100, 2, case.K, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for given in (inputs, exact):
        assert given.g is not None
        given.g.data.copy_(gates)
    expected = run_delta(case, exact, "reference")
    for name, value in run_delta(case, inputs, "torch").items():
        assert_near(value, expected[name], FLOAT32, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_never_feels_another(dtype: torch.dtype) -> None:
    case = DeltaCase(B=1, T=100, G=2, H=2, channels=True, lengths=(10, 30, 60))
    inputs = make_delta_inputs(case, dtype)
    weight = torch.randn(1, 100, 2, 12, dtype=torch.float64)
    before = run_delta(case, inputs, "torch", {"o": weight})
    changed = weight.clone()
    changed[:, 10:40] = 7.0
    with torch.no_grad():
        for tensor in (inputs.q, inputs.v):
            tensor[:, 10:40] = torch.randn_like(tensor[:, 10:40]) * 3
        inputs.beta[:, 10:40] = 1.9
        assert inputs.g is not None
        inputs.g[:, 10:40] *= 50
    after = run_delta(case, inputs, "torch", {"o": changed})
    for name in ("o", "d_q", "d_k", "d_v", "d_beta", "d_g"):
        assert_bitwise(after[name][:, :10], before[name][:, :10], f"{name} before")
        assert_bitwise(after[name][:, 40:], before[name][:, 40:], f"{name} after")
    assert_bitwise(after["final"], before["final"], "final state")


def test_steps_continue_a_scan() -> None:
    case = DeltaCase(T=9, G=2, H=2, channels=True, erases=True)
    inputs = make_delta_inputs(case, torch.float64)
    whole = call_delta(case, inputs, "torch")
    state = call_delta(case, inputs.cut(0, 4), "torch").final_state_BHKV
    assert inputs.g is not None and inputs.erase is not None
    for t in range(4, 9):
        token = (inputs.q[:, t], inputs.k[:, t], inputs.v[:, t], inputs.beta[:, t], inputs.g[:, t])
        o, state = delta_step(*token, state, inputs.erase[:, t])
        assert_near(o, whole.o_BTHV[:, t], FLOAT64, f"token {t}")
    assert_near(state, whole.final_state_BHKV, FLOAT64, "state")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"N": 2}, "needs 1 step a token and a key head for each head; got 2 steps and 2 key heads for 2 heads"),
        ({"G": 1}, "got 1 steps and 1 key heads for 2 heads"),
        ({"chunk": 24}, "chunk_size=24 must be a power of two for a vector gate"),
    ],
)
def test_what_such_gates_cannot_have_is_refused(changes: dict[str, int], message: str) -> None:
    case = replace(DeltaCase(T=5, G=2, H=2, channels=True), **changes)
    with pytest.raises(ValueError, match=message):
        call_delta(case, make_delta_inputs(case, torch.float32), "torch")
    wrong = torch.zeros(2, 5, 2, 7)
    inputs = make_delta_inputs(DeltaCase(T=5, G=2, H=2), torch.float32)
    with pytest.raises(ValueError, match=r"g_BTHK must have shape \[2, 5, 2, 8\]; got \[2, 5, 2, 7\]"):
        delta_scan(inputs.q, inputs.k, inputs.v, inputs.beta, wrong)
    with pytest.raises(ValueError, match=r"erase_BTHK needs a gate of each key channel"):
        delta_scan(inputs.q, inputs.k, inputs.v, inputs.beta, inputs.g, erase_BTHK=inputs.q)
