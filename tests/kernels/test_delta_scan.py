"""The gated delta product in chunks against its step-by-step definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from amfm.kernels.delta_scan.op import delta_bytes, delta_flops, delta_scan, delta_step
from amfm.kernels.delta_scan.terms import invert_unit_lower
from amfm.kernels.delta_scan.torch_impl import chunked_delta, compose_delta
from tests.helpers.deltas import DeltaCase, DeltaInputs, call_delta, make_delta_inputs, run_delta
from tests.helpers.numbers import assert_all_near, assert_bitwise, assert_near

# float64: rounding of some hundred additions; the chunked form and the definition differ in order only.
FLOAT64 = 1e-12
# float32: the same sums with 2^-24 a step.
FLOAT32 = 1e-5
# bfloat16 inputs and outputs are rounded to 2^-9 each, 1.7e-3 of their RMS; nothing between them is.
BFLOAT16 = 4e-3

CASES = [
    DeltaCase(T=1, G=1, H=1, initial=True),
    DeltaCase(T=1, N=3, transfer=True),
    DeltaCase(T=63, G=1, H=1, lengths=(1, 1, 61), transfer=True),
    DeltaCase(T=63, G=4, H=4, gated=False, initial=True),
    DeltaCase(T=100, N=2, G=4, lengths=(1, 39, 1, 59), initial=True),
    DeltaCase(T=100, N=3, G=1, chunk=48, initial=True, transfer=True),
    DeltaCase(T=129, chunk=64, lengths=(40, 70, 19), gated=False, initial=True, transfer=True),
    DeltaCase(T=129, N=2, G=1, H=3, chunk=64, lengths=(64, 64, 1), initial=True),
    # Several pieces of all rows and some chunks each.
    DeltaCase(T=150, chunk=16, lengths=(40, 110), initial=True),
    # More heads than a piece of work holds: rows are walked one by one and a chunk at a time.
    DeltaCase(B=3, T=40, G=20, H=40, K=2, V=3, chunk=16, lengths=(16, 3, 21), initial=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_equal_single_steps(case: DeltaCase, poisoned_memory: None, one_thread: None) -> None:
    inputs = make_delta_inputs(case, torch.float64)
    expected = run_delta(case, inputs, "reference")
    for name, value in run_delta(case, inputs, "torch").items():
        assert_near(value, expected[name], FLOAT64, name)


@pytest.mark.parametrize("case", [CASES[4], CASES[6]], ids=str)
def test_composition_for_the_compiler_equals_the_written_backward(case: DeltaCase) -> None:
    inputs = make_delta_inputs(case, torch.float64)
    results = []
    for scan in (chunked_delta, compose_delta):
        rows = (inputs.q, inputs.k, inputs.v, inputs.beta, inputs.g)
        o, final = scan(*rows, inputs.initial, inputs.documents, case.chunk)
        total = (o * torch.linspace(-1.0, 1.0, o.numel(), dtype=o.dtype).view_as(o)).sum() + final.square().sum()
        results.append([o, final, *torch.autograd.grad(total, list(inputs.leaves().values()))])
    assert_all_near(results[1], results[0], FLOAT64)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str) -> None:
    case = DeltaCase(B=1, T=7, N=2, G=1, H=2, chunk=4, lengths=(2, 5), transfer=True)
    inputs = make_delta_inputs(case, torch.float64)
    compiled = torch.compile(call_delta, backend=backend, fullgraph=True)
    expected = call_delta(case, inputs, "reference")
    actual = compiled(case, inputs, "torch")
    for name, value, wanted in zip(expected._fields, actual, expected, strict=True):
        assert value is not None and wanted is not None
        assert_near(value, wanted, FLOAT64, name)


def test_shapes_and_gradients_pass_without_data() -> None:
    case = DeltaCase(T=100, N=2, lengths=(40, 60), initial=True, transfer=True)
    inputs = make_delta_inputs(case, torch.bfloat16)
    leaves = {name: tensor.detach().to("meta").requires_grad_() for name, tensor in inputs.leaves().items()}
    assert inputs.documents is not None
    nowhere = DeltaInputs(**leaves, documents=inputs.documents.to("meta"))
    expected = run_delta(case, inputs, "torch")
    output = call_delta(case, nowhere, "torch")
    for name, value in zip(("o", "final", "read", "transfer"), output, strict=True):
        assert value is not None
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype), name
    total = sum(value.float().sum() for value in output if value is not None)
    assert isinstance(total, Tensor)
    for (name, leaf), gradient in zip(leaves.items(), torch.autograd.grad(total, list(leaves.values())), strict=True):
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype), name


@pytest.mark.parametrize("case", [CASES[4], CASES[5], CASES[6]], ids=str)
def test_bfloat16_stays_near_float64(case: DeltaCase) -> None:
    inputs = make_delta_inputs(case, torch.bfloat16)
    exact = make_delta_inputs(case, torch.float64)
    for name, leaf in exact.leaves().items():
        leaf.data.copy_(inputs.leaves()[name].data)
    expected = run_delta(case, exact, "reference")
    for name, value in run_delta(case, inputs, "torch").items():
        assert_near(value, expected[name], BFLOAT16, name)


@pytest.mark.parametrize(
    "case",
    [
        DeltaCase(B=1, T=6, G=1, H=2, K=2, V=2, chunk=4, lengths=(1, 3, 2), initial=True),
        DeltaCase(B=1, T=5, N=2, G=1, H=1, K=2, V=2, chunk=2, gated=False, transfer=True),
    ],
    ids=str,
)
def test_gradients_match_finite_differences(case: DeltaCase) -> None:
    inputs = make_delta_inputs(case, torch.float64)
    names = list(inputs.leaves())

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        output = call_delta(case, replace(inputs, **dict(zip(names, tensors, strict=True))), "torch")
        return tuple(value for value in output if value is not None)

    assert torch.autograd.gradcheck(run, tuple(inputs.leaves().values()))


def test_gradient_of_beta_is_right_where_beta_is_zero() -> None:
    case = DeltaCase(B=1, T=6, G=1, H=1, K=2, V=2, chunk=4)
    inputs = make_delta_inputs(case, torch.float64)
    with torch.no_grad():
        inputs.beta[:, ::2] = 0.0
    expected = run_delta(case, inputs, "reference")
    assert_near(run_delta(case, inputs, "torch")["d_beta"], expected["d_beta"], FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_document_never_feels_another(dtype: torch.dtype) -> None:
    case = DeltaCase(B=1, T=100, N=2, G=2, H=4, lengths=(10, 30, 60))
    inputs = make_delta_inputs(case, dtype)
    weight = torch.randn(1, 100, 4, 12, dtype=torch.float64)
    before = run_delta(case, inputs, "torch", {"o": weight})
    changed = weight.clone()
    changed[:, 10:40] = 7.0
    with torch.no_grad():
        for tensor in (inputs.q, inputs.v):
            tensor[:, 10:40] = torch.randn_like(tensor[:, 10:40]) * 3
        inputs.k[:, 10:40] = inputs.k[:, 10:40].flip(1)
        inputs.beta[:, 10:40] = 1.9
        assert inputs.g is not None
        inputs.g[:, 10:40] *= 5
    after = run_delta(case, inputs, "torch", {"o": changed})
    for name in ("o", "d_q", "d_k", "d_v", "d_beta", "d_g"):
        assert_bitwise(after[name][:, :10], before[name][:, :10], f"{name} before")
        assert_bitwise(after[name][:, 40:], before[name][:, 40:], f"{name} after")
    assert_bitwise(after["final"], before["final"], "final state")
    assert not torch.equal(after["o"][:, 10:40], before["o"][:, 10:40])


def test_packed_documents_equal_documents_alone() -> None:
    case = DeltaCase(B=1, T=90, N=2, lengths=(33, 1, 56))
    inputs = make_delta_inputs(case, torch.float64)
    packed = call_delta(case, inputs, "torch")
    for start, end in ((0, 33), (33, 34), (34, 90)):
        alone = call_delta(case, inputs.cut(start, end), "torch")
        assert_near(packed.o_BTHV[:, start:end], alone.o_BTHV, FLOAT64, f"o of {start}..{end}")
    assert_near(packed.final_state_BHKV, alone.final_state_BHKV, FLOAT64, "final state")


@pytest.mark.parametrize("lengths", [(), (20, 80)])
@pytest.mark.parametrize("at", [1, 32, 41, 99])
def test_two_parts_equal_the_whole(lengths: tuple[int, ...], at: int) -> None:
    case = DeltaCase(B=1, T=100, N=2, lengths=lengths, initial=True)
    inputs = make_delta_inputs(case, torch.float64)
    whole = call_delta(case, inputs, "torch")
    first = call_delta(case, inputs.cut(0, at, inputs.initial), "torch")
    continues = not lengths or at != lengths[0]
    state = first.final_state_BHKV if continues else None
    second = call_delta(case, inputs.cut(at, 100, state), "torch")
    assert_near(torch.cat([first.o_BTHV, second.o_BTHV], 1), whole.o_BTHV, FLOAT64, "o")
    assert_near(second.final_state_BHKV, whole.final_state_BHKV, FLOAT64, "final state")


@pytest.mark.parametrize("lengths", [(), (30, 20)])
def test_read_and_transfer_carry_a_state_through_a_row(lengths: tuple[int, ...]) -> None:
    case = DeltaCase(T=50, N=2, chunk=16, lengths=lengths, initial=True)
    inputs = make_delta_inputs(case, torch.float64)
    entered = call_delta(case, inputs, "reference")
    start = inputs.initial
    assert start is not None
    empty = call_delta(replace(case, transfer=True), replace(inputs, initial=None), "torch")
    assert empty.read_BTHK is not None and empty.transfer_BHKK is not None
    read = torch.einsum("bthk,bhkv->bthv", empty.read_BTHK, start)
    assert_near(empty.o_BTHV + read, entered.o_BTHV, FLOAT64, "o")
    assert_near(empty.transfer_BHKK @ start + empty.final_state_BHKV, entered.final_state_BHKV, FLOAT64, "final state")
    if lengths:
        assert_bitwise(empty.transfer_BHKK, torch.zeros_like(empty.transfer_BHKK), "transfer past a boundary")
        assert_bitwise(empty.read_BTHK[0, 30:], torch.zeros_like(empty.read_BTHK[0, 30:]), "read past a boundary")


@pytest.mark.parametrize("gated", [True, False])
def test_steps_continue_a_scan(gated: bool) -> None:
    case = DeltaCase(T=9, N=2, gated=gated)
    inputs = make_delta_inputs(case, torch.float64)
    whole = call_delta(case, inputs, "torch")
    state = call_delta(case, inputs.cut(0, 4), "torch").final_state_BHKV
    for t in range(4, 9):
        g = None if inputs.g is None else inputs.g[:, t]
        o, state = delta_step(inputs.q[:, t], inputs.k[:, t], inputs.v[:, t], inputs.beta[:, t], g, state)
        assert_near(o, whole.o_BTHV[:, t], FLOAT64, f"token {t}")
    assert_near(state, whole.final_state_BHKV, FLOAT64, "state")


def test_a_step_of_beta_1_makes_the_state_answer_its_value() -> None:
    case = DeltaCase(B=1, T=40, G=1, H=1, gated=False)
    inputs = make_delta_inputs(case, torch.float64)
    with torch.no_grad():
        inputs.beta.fill_(1.0)
        inputs.q.copy_(inputs.k[:, :, 0])
    assert_near(call_delta(case, inputs, "torch").o_BTHV, inputs.v[:, :, 0], FLOAT64)


def test_equal_keys_and_reflections_lose_no_digits() -> None:
    """beta of nearly 2 on one key flips the state's answer at every step; powers of the system would reach 10^6."""
    case = DeltaCase(B=1, T=64, G=1, H=1, chunk=64, gated=False, initial=True)
    inputs, exact = (make_delta_inputs(case, dtype) for dtype in (torch.float32, torch.float64))
    for each in (inputs, exact):
        with torch.no_grad():
            each.beta.fill_(2.0)
            each.k.copy_(exact.k[:, :1].expand_as(exact.k))
    expected = run_delta(case, exact, "reference")
    for name, value in run_delta(case, inputs, "torch").items():
        assert_near(value, expected[name], FLOAT32, name)


def test_documents_that_forget_at_once_leave_the_next_ones_finite() -> None:
    """Inside one chunk the decay between two such documents would be an infinite power."""
    case = DeltaCase(B=2, T=50, N=2, lengths=(20, 3, 27), initial=True)
    inputs, exact = (make_delta_inputs(case, dtype) for dtype in (torch.float32, torch.float64))
    for each in (inputs, exact):
        assert each.g is not None
        with torch.no_grad():
            each.g.sub_(torch.linspace(0.0, 20.0, case.T, dtype=each.g.dtype).flip(0)[:, None])
    expected = run_delta(case, exact, "reference")
    for name, value in run_delta(case, inputs, "torch").items():
        assert_near(value, expected[name], FLOAT32, name)
    leaves = list(inputs.leaves().values())
    q, k, v, beta, g, initial = leaves
    o, final = compose_delta(q, k, v, beta, g, initial, inputs.documents, case.chunk)
    assert_near(o, expected["o"], FLOAT32, "o of the composition")
    for gradient in torch.autograd.grad(o.sum() + final.sum(), leaves):
        assert bool(torch.isfinite(gradient).all())


def test_chunk_size_changes_rounding_only() -> None:
    case = DeltaCase(T=100, N=2, lengths=(30, 70))
    inputs = make_delta_inputs(case, torch.float64)
    expected = call_delta(case, inputs, "reference").o_BTHV
    for chunk in (1, 7, 16, 64, 256):
        assert_near(call_delta(replace(case, chunk=chunk), inputs, "torch").o_BTHV, expected, FLOAT64, f"chunk {chunk}")


def test_one_document_takes_the_path_without_masks() -> None:
    case = DeltaCase(T=40)
    inputs = make_delta_inputs(case, torch.float32)
    marked = replace(inputs, documents=torch.full((2, 40), 3, dtype=torch.int32))
    assert_bitwise(call_delta(case, marked, "torch").o_BTHV, call_delta(case, inputs, "torch").o_BTHV)


@pytest.mark.parametrize("M", [1, 5, 16, 17, 40, 64, 100])
def test_inverse_of_unit_lower_matrices(M: int) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, M, M, dtype=torch.float64) * M**-0.5
    expected = torch.linalg.inv(matrices.tril(-1) + torch.eye(M, dtype=torch.float64))
    assert_near(invert_unit_lower(matrices), expected, FLOAT64)


def test_floors_count_what_the_formulas_say() -> None:
    sizes = {"B": 1, "T": 2, "N": 3, "G": 1, "H": 2, "K": 4, "V": 8}
    assert delta_flops(**sizes, chunk_size=2) == 2 * delta_flops(**(sizes | {"T": 1}), chunk_size=2)
    # A token: q and o once, k of one head and v of two heads three times, beta and g in float32.
    assert delta_bytes(**sizes) == 2 * (2 * (4 + 16 + 12 + 48) + 4 * (6 + 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_BTNGK": torch.zeros(2, 5, 1, 2, 7)}, r"k_BTNGK must have shape \[2, 5, 1, 2, 6\]; got \[2, 5, 1, 2, 7\]"),
        ({"beta_BTNH": torch.zeros(2, 5, 2, 4)}, r"beta_BTNH must have shape \[2, 5, 1, 4\]"),
        ({"g_BTH": torch.zeros(2, 5, 3)}, r"g_BTH must have shape \[2, 5, 4\]"),
        (
            {"q_BTGK": torch.zeros(2, 5, 3, 6), "k_BTNGK": torch.zeros(2, 5, 1, 3, 6)},
            "key heads of q_BTGK must divide the 4 heads of v_BTNHV; got 3 key heads",
        ),
        ({"q_BTGK": torch.zeros(2, 5, 2, 6).double()}, "q_BTGK must be torch.float32"),
        ({"v_BTNHV": torch.zeros(2, 5, 1, 4, 3, dtype=torch.int64)}, "v_BTNHV must be floating point"),
        ({"v_BTNHV": torch.zeros(2, 5, 4, 3)}, "v_BTNHV must have shape"),
        ({"document_ids_BT": torch.zeros(2, 5)}, "int32 or int64"),
        ({"initial_state_BHKV": torch.zeros(2, 4, 3, 6)}, r"initial state must have shape \[2, 4, 6, 3\]"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"backend": "cuda"}, "must be one of auto, triton, native, torch, reference; got 'cuda'"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "q_BTGK": torch.zeros(2, 5, 2, 6),
        "k_BTNGK": torch.zeros(2, 5, 1, 2, 6),
        "v_BTNHV": torch.zeros(2, 5, 1, 4, 3),
        "beta_BTNH": torch.zeros(2, 5, 1, 4),
    }
    with pytest.raises(ValueError, match=message):
        delta_scan(**(arguments | change))
