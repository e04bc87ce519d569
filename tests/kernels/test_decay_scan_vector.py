"""The scan with a gate of each key channel against the step-by-step definition."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.decay_scan.op import decay_scan, decay_step
from amfm.kernels.decay_scan.vector.torch_impl import chunked_vector_scan, compose_vector_scan, cut_gates
from tests.helpers.numbers import assert_all_near, assert_bitwise, assert_near
from tests.helpers.scans import ScanCase, make_inputs, run_scan

# float64: rounding of some 100 additions; the chunked form and the definition differ in order only.
FLOAT64 = 1e-12
# float32: the same sums with 2^-24 a step.
FLOAT32 = 1e-5
# bfloat16 inputs are exact here, but operands of products with v and with states may be rounded to 2^-9.
BFLOAT16 = 1e-2

CASES = [
    ScanCase(T=1, H=1, kind="vector"),
    ScanCase(T=1, kind="vector", initial=True),
    ScanCase(T=63, H=1, kind="vector", lengths=(1, 1, 61)),
    ScanCase(T=100, H=3, P=5, N=7, kind="vector", lengths=(1, 39, 1, 59), initial=True),
    ScanCase(T=129, kind="vector", chunk=64, lengths=(40, 70, 19)),
    # Of these only 64 heads and chunks of 64 x 64 go together: heads, chunks and rows come in several tiles.
    ScanCase(B=1, T=70, H=70, P=3, N=64, kind="vector", chunk=64, lengths=(11, 59)),
    ScanCase(B=2, T=130, H=12, P=3, N=64, kind="vector", chunk=64, initial=True),
    ScanCase(T=129, H=2, kind="vector", initial=True),
    ScanCase(T=64, kind="vector", lengths=(32, 32), initial=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_equal_single_steps(case: ScanCase, poisoned_memory: None, one_thread: None) -> None:
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


@pytest.mark.parametrize("lengths", [(), (5, 1, 34)])
def test_composition_for_the_compiler_equals_the_written_backward(lengths: tuple[int, ...]) -> None:
    case = ScanCase(T=40, kind="vector", lengths=lengths, initial=True)
    inputs = make_inputs(case, torch.float64)
    leaves = [*inputs.tensors, inputs.initial]
    q, k, v, g, initial = leaves
    written = chunked_vector_scan(q, k, v, g, initial, inputs.documents, 16)
    composed = compose_vector_scan(q, k, v, cut_gates(g, inputs.documents), initial, 16, torch.float64)
    results = []
    for o, state in (written, composed):
        total = (o * inputs.weights[0]).sum() + (state * inputs.weights[1]).sum()
        results.append([o, state, *torch.autograd.grad(total, leaves)])
    assert_all_near(results[1], results[0], FLOAT64)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str) -> None:
    case = ScanCase(B=1, T=7, H=2, chunk=4, kind="vector", lengths=(2, 5))
    inputs = make_inputs(case, torch.float64)
    expected = run_scan(case, inputs, "reference")
    compiled = torch.compile(decay_scan, backend=backend, fullgraph=True)
    for name, value in run_scan(case, inputs, "torch", compiled).items():
        assert_near(value, expected[name], FLOAT64, name)


def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones() -> None:
    inputs = make_inputs(ScanCase(T=20, H=3, P=5, kind="vector"), torch.bfloat16)
    values = decay_scan(*(t.detach().to("meta").requires_grad_() for t in inputs.tensors))
    for value, expected in zip(values, decay_scan(*inputs.tensors)):
        assert value.device.type == "meta"
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_stays_near_float64(products: torch.dtype) -> None:
    case = ScanCase(T=100, H=3, P=5, N=16, kind="vector", lengths=(1, 39, 1, 59), initial=True)
    inputs, exact = make_inputs(case, torch.bfloat16), make_inputs(case, torch.float64)
    leaves, doubles = [*inputs.tensors, inputs.initial], [*exact.tensors, exact.initial]
    with torch.no_grad():
        for double, leaf in zip(doubles, leaves):
            double.copy_(leaf)
    expected = run_scan(case, exact, "reference")
    o, state = chunked_vector_scan(*leaves, inputs.documents, 32, products)
    total = (o.double() * exact.weights[0]).sum() + (state.double() * exact.weights[1]).sum()
    gradients = torch.autograd.grad(total, leaves)
    for name, value in zip(("y", "final_state", "d_q", "d_k", "d_v"), (o, state, *gradients)):
        assert_near(value, expected[name], BFLOAT16, name)
    # These two also hold the gradient of the total decay in the other run.
    weights = [*exact.weights[:2], torch.zeros_like(exact.weights[2])]
    exact.weights[:] = weights
    expected = run_scan(case, exact, "reference")
    assert_near(gradients[3], expected["d_g"], BFLOAT16, "d_g")
    assert_near(gradients[4], expected["d_initial"], BFLOAT16, "d_initial")


def test_gradients_match_finite_differences() -> None:
    case = ScanCase(B=1, T=7, H=2, P=2, N=3, chunk=4, kind="vector", lengths=(2, 5), initial=True)
    inputs = make_inputs(case, torch.float64)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *rest, initial = tensors
        return decay_scan(*rest, document_ids_BT=inputs.documents, initial_state_BHKV=initial, chunk_size=4)

    assert torch.autograd.gradcheck(run, (*inputs.tensors, inputs.initial))


@pytest.mark.parametrize("case", [CASES[3], CASES[6]], ids=str)
def test_a_constant_gate_equals_the_gate_of_a_head(case: ScanCase) -> None:
    inputs = make_inputs(case, torch.float64)
    q, k, v, _ = inputs.tensors
    g_BTH = (-torch.rand(case.B, case.T, case.H, dtype=torch.float64)).requires_grad_()
    results = []
    for g in (g_BTH, g_BTH[..., None].expand(-1, -1, -1, case.N)):
        out = decay_scan(q, k, v, g, document_ids_BT=inputs.documents, initial_state_BHKV=inputs.initial, chunk_size=32)
        total = (out.o_BTHV * inputs.weights[0]).sum() + (out.final_state_BHKV * inputs.weights[1]).sum()
        results.append([*out[:2], *torch.autograd.grad(total, (q, k, v, g_BTH))])
    assert_all_near(results[1], results[0], FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_document_never_feels_another(dtype: torch.dtype) -> None:
    case = ScanCase(B=1, T=100, kind="vector", lengths=(10, 30, 60))
    inputs = make_inputs(case, dtype)
    before = run_scan(case, inputs, "torch")
    with torch.no_grad():
        for tensor in inputs.tensors[:3]:
            tensor[:, 10:40] = torch.randn_like(tensor[:, 10:40]) * 3
        inputs.tensors[3][:, 10:40] = -torch.rand_like(inputs.tensors[3][:, 10:40]) * 60
        inputs.weights[0][:, 10:40] = 7.0
    after = run_scan(case, inputs, "torch")
    for name in ("y", "d_q", "d_k", "d_v", "d_g"):
        assert_bitwise(after[name][:, :10], before[name][:, :10], f"{name} before")
        assert_bitwise(after[name][:, 40:], before[name][:, 40:], f"{name} after")
    assert_bitwise(after["final_state"], before["final_state"], "final_state")
    assert not torch.equal(after["y"][:, 10:40], before["y"][:, 10:40])


def test_packed_documents_equal_documents_alone() -> None:
    case = ScanCase(B=1, T=90, kind="vector", lengths=(33, 1, 56))
    inputs = make_inputs(case, torch.float64)
    o, final, decay = decay_scan(*inputs.tensors, document_ids_BT=inputs.documents, chunk_size=32)
    for start, end in ((0, 33), (33, 34), (34, 90)):
        alone = decay_scan(*(t[:, start:end] for t in inputs.tensors), chunk_size=32)
        assert_near(o[:, start:end], alone.o_BTHV, FLOAT64, f"o of {start}..{end}")
    assert_near(final, alone.final_state_BHKV, FLOAT64, "final state")
    assert bool((decay == 0).all())


@pytest.mark.parametrize("lengths", [(), (20, 80)])
@pytest.mark.parametrize("cut", [1, 41])
def test_two_pieces_equal_the_whole(lengths: tuple[int, ...], cut: int) -> None:
    case = ScanCase(B=1, T=100, kind="vector", lengths=lengths, initial=True)
    inputs = make_inputs(case, torch.float64)
    whole = decay_scan(*inputs.tensors, document_ids_BT=inputs.documents, initial_state_BHKV=inputs.initial)
    state, decay, pieces = inputs.initial, 1.0, []
    for start, end in ((0, cut), (cut, 100)):
        documents = None if inputs.documents is None else inputs.documents[:, start:end]
        part = [t[:, start:end] for t in inputs.tensors]
        out = decay_scan(*part, document_ids_BT=documents, initial_state_BHKV=state, chunk_size=32)
        without = decay_scan(*part, document_ids_BT=documents, chunk_size=32).final_state_BHKV
        assert_near(out.total_decay[..., None] * state + without, out.final_state_BHKV, FLOAT64, "composed state")
        state, decay = out.final_state_BHKV, decay * out.total_decay
        pieces.append(out.o_BTHV)
    for name, value, expected in zip(("o", "state", "decay"), (torch.cat(pieces, 1), state, decay), whole):
        assert_near(value, expected, FLOAT64, name)


@pytest.mark.parametrize("lengths", [(), (20, 3, 27)])
def test_gates_that_forget_at_once_keep_float32_near_float64(lengths: tuple[int, ...]) -> None:
    case = ScanCase(T=50, H=2, kind="vector", lengths=lengths, initial=True)
    inputs, exact = make_inputs(case, torch.float32), make_inputs(case, torch.float64)
    with torch.no_grad():
        for g in (inputs.tensors[3], exact.tensors[3]):
            g[:, 5:45, :, ::2] -= 50.0
            g[:, 10:12] = -1e4
    expected = run_scan(case, exact, "reference")
    for name, value in run_scan(case, inputs, "torch").items():
        assert_near(value, expected[name], FLOAT32, name)


def test_a_gate_of_minus_infinity_is_a_boundary() -> None:
    case = ScanCase(B=1, T=60, kind="vector", lengths=(25, 35))
    inputs = make_inputs(case, torch.float32)
    q, k, v, g = inputs.tensors
    cut = g.detach().clone()
    cut[:, 25] = -torch.inf
    documents = decay_scan(q, k, v, g, document_ids_BT=inputs.documents)
    for value, expected in zip(decay_scan(q, k, v, cut), documents):
        assert_bitwise(value, expected)


def test_chunk_size_changes_rounding_only() -> None:
    case = ScanCase(T=100, kind="vector", lengths=(30, 70))
    inputs = make_inputs(case, torch.float64)
    reference = decay_scan(*inputs.tensors, document_ids_BT=inputs.documents, backend="reference")
    for chunk in (1, 2, 16, 64, 256):
        o = decay_scan(*inputs.tensors, document_ids_BT=inputs.documents, chunk_size=chunk).o_BTHV
        assert_near(o, reference.o_BTHV, FLOAT64, f"chunk {chunk}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.zeros(2, 5, 3, 1)}, r"g must have shape \[2, 5, 3, 4\]; got \[2, 5, 3, 1\]"),
        ({"k_BTHK": torch.zeros(2, 5, 3, 6)}, r"k must have shape \[2, 5, 3, 4\]"),
        ({"chunk_size": 48}, "chunk_size=48 must be a power of two for a vector gate; use 16, 32, 64 or 128"),
        ({"initial_state_BHKV": torch.zeros(2, 3, 2, 4)}, r"initial state must have shape \[2, 3, 4, 2\]"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    sizes = {"q_BTHK": (2, 5, 3, 4), "k_BTHK": (2, 5, 3, 4), "v_BTHV": (2, 5, 3, 2), "g": (2, 5, 3, 4)}
    arguments: dict[str, object] = {name: torch.zeros(size) for name, size in sizes.items()}
    with pytest.raises(ValueError, match=message):
        decay_scan(**(arguments | change))


def test_a_step_refuses_a_state_of_another_shape() -> None:
    q, v = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"state_BHKV must have shape \[2, 3, 4, 5\]; got \[2, 3, 5, 4\]"):
        decay_step(q, q, v, torch.zeros(2, 3), torch.zeros(2, 3, 5, 4))
