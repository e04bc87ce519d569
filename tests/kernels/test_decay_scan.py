"""The chunked scans against the step-by-step definition."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.decay_scan.op import decay_scan, mamba2_scan, mamba2_step
from amfm.kernels.decay_scan.torch_impl import chunked_scan, compose_scan
from tests.helpers.numbers import assert_all_near, assert_bitwise, assert_near
from tests.helpers.scans import SUMS, ScanCase, ScanInputs, make_inputs, run_scan, tolerance_of

# float64: rounding of some 100 additions; the chunked form and the definition differ in order only.
FLOAT64 = 1e-12
# float32: the same sums with 2^-24 a step.
FLOAT32 = 1e-5
# bfloat16 inputs and outputs carry 2^-9 each; A_log and dt collect the rounding of a whole row.
BFLOAT16 = 2e-2

CASES = [
    ScanCase(T=1, H=1, G=1),
    ScanCase(T=1, initial=True),
    ScanCase(T=63, H=1, G=1, lengths=(1, 1, 61)),
    ScanCase(T=100, H=8, G=8, lengths=(1, 39, 1, 59), initial=True),
    ScanCase(T=129, H=8, G=2, chunk=64, lengths=(40, 70, 19)),
    ScanCase(T=129, H=2, G=1, initial=True),
    ScanCase(T=64, chunk=32, lengths=(32, 32), initial=True),
    ScanCase(T=63, kind="decay", lengths=(5, 1, 57), initial=True),
    ScanCase(T=100, kind="decay", P=8, N=24),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_equal_single_steps(case: ScanCase, poisoned_memory: None) -> None:
    inputs = make_inputs(case, torch.float64)
    expected = run_scan(case, inputs, "reference")
    for name, value in run_scan(case, inputs, "torch").items():
        assert_near(value, expected[name], FLOAT64, name)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize(("T", "lengths"), [(1, ()), (32, ()), (33, (7, 26)), (100, ()), (129, (1, 63, 65))])
def test_gradients_of_outputs_alone_equal_single_steps(
    T: int, lengths: tuple[int, ...], initial: bool, poisoned_memory: None
) -> None:
    case = ScanCase(T=T, H=4, G=2, lengths=lengths, initial=initial)
    inputs = make_inputs(case, torch.float64)
    leaves = [*inputs.tensors, inputs.initial] if initial else inputs.tensors
    results = []
    for backend in ("torch", "reference"):
        y, *_ = mamba2_scan(
            *inputs.tensors,
            document_ids_BT=inputs.documents,
            initial_state_BHPN=inputs.initial,
            chunk_size=case.chunk,
            backend=backend,
        )
        results.append([y, *torch.autograd.grad((y * inputs.weights[0]).sum(), leaves)])
    assert_all_near(*results, FLOAT64)


@pytest.mark.parametrize("lengths", [(), (5, 1, 34)])
def test_composition_for_the_compiler_equals_the_written_backward(lengths: tuple[int, ...]) -> None:
    case = ScanCase(T=40, G=2, lengths=lengths, initial=True)
    inputs = make_inputs(case, torch.float64)
    x, dt, _, B, C, D, _ = inputs.tensors
    leaves = [C, B, x, -dt.detach().abs(), dt.detach().abs(), D, inputs.initial.detach().transpose(-1, -2)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    results = []
    for scan in (chunked_scan, compose_scan):
        y, state = scan(*leaves, inputs.documents, 16, torch.float64)
        total = (y * inputs.weights[0]).sum() + (state.transpose(-1, -2) * inputs.weights[1]).sum()
        results.append([y, state, *torch.autograd.grad(total, leaves)])
    assert_all_near(results[1], results[0], FLOAT64)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend: str) -> None:
    """Quick, in blocks of Mamba2: `test_blocks_of_a_kind_share_their_graphs` of tests/model/test_compile.py."""
    case = ScanCase(B=1, T=7, H=2, G=1, chunk=4, lengths=(2, 5))
    inputs = make_inputs(case, torch.float64)
    expected = run_scan(case, inputs, "reference")
    compiled = torch.compile(mamba2_scan, backend=backend, fullgraph=True)
    for name, value in run_scan(case, inputs, "torch", compiled).items():
        assert_near(value, expected[name], FLOAT64, name)


@pytest.mark.parametrize("case", [CASES[3], CASES[8]], ids=str)
def test_bfloat16_stays_near_float64(case: ScanCase) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    exact = make_inputs(case, torch.float64)
    for t, e in zip(inputs.tensors, exact.tensors):
        e.data.copy_(t.data)
    expected = run_scan(case, exact, "reference")
    for name, value in run_scan(case, inputs, "torch").items():
        # On processors that multiply bfloat16, d_dt errs by 1e-2 and its sum over 100 tokens by 3.4e-2 of its norm (with
        # float32 products 2.4e-3 and 1.7e-3).
        tolerance = 3 * BFLOAT16 if name in SUMS else BFLOAT16
        assert_near(value, expected[name], tolerance_of(name, expected, tolerance), name)


def test_gradients_match_finite_differences() -> None:
    case = ScanCase(B=1, T=7, H=2, P=2, G=1, N=3, chunk=4, lengths=(2, 5), initial=True)
    inputs = make_inputs(case, torch.float64)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *rest, initial = tensors
        return mamba2_scan(
            *rest, document_ids_BT=inputs.documents, initial_state_BHPN=initial, chunk_size=4, backend="torch"
        )

    assert torch.autograd.gradcheck(run, (*inputs.tensors, inputs.initial))


def test_general_form_gradients_match_finite_differences() -> None:
    case = ScanCase(B=1, T=6, H=1, P=2, N=2, chunk=4, kind="decay")
    inputs = make_inputs(case, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: decay_scan(*t, chunk_size=4), tuple(inputs.tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_document_never_feels_another(dtype: torch.dtype) -> None:
    case = ScanCase(B=1, T=100, H=4, G=2, chunk=32, lengths=(10, 30, 60))
    inputs = make_inputs(case, dtype)
    before = run_scan(case, inputs, "torch")
    with torch.no_grad():
        for tensor in (inputs.tensors[0], inputs.tensors[1], inputs.tensors[3], inputs.tensors[4]):
            tensor[:, 10:40] = torch.randn_like(tensor[:, 10:40]) * 3
        inputs.weights[0][:, 10:40] = 7.0
    after = run_scan(case, inputs, "torch")
    for name in ("y", "d_x", "d_dt", "d_B", "d_C"):
        assert_bitwise(after[name][:, :10], before[name][:, :10], f"{name} before")
        assert_bitwise(after[name][:, 40:], before[name][:, 40:], f"{name} after")
    assert_bitwise(after["final_state"], before["final_state"], "final_state")
    assert not torch.equal(after["y"][:, 10:40], before["y"][:, 10:40])


def test_packed_documents_equal_documents_alone() -> None:
    case = ScanCase(B=1, T=90, lengths=(33, 1, 56))
    inputs = make_inputs(case, torch.float64)
    y, final, decay = mamba2_scan(*inputs.tensors, document_ids_BT=inputs.documents, chunk_size=32)
    for start, end in ((0, 33), (33, 34), (34, 90)):
        pieces = [t[:, start:end] if t.dim() > 1 else t for t in inputs.tensors]
        alone = mamba2_scan(*pieces, chunk_size=32)
        assert_near(y[:, start:end], alone.y_BTHP, FLOAT64, f"y of {start}..{end}")
    assert_near(final, alone.final_state_BHPN, FLOAT64, "final state")
    assert bool((decay == 0).all())


@pytest.mark.parametrize("lengths", [(), (20, 80)])
def test_two_halves_equal_the_whole(lengths: tuple[int, ...]) -> None:
    case = ScanCase(B=1, T=100, lengths=lengths, initial=True)
    inputs = make_inputs(case, torch.float64)
    whole = mamba2_scan(
        *inputs.tensors, document_ids_BT=inputs.documents, initial_state_BHPN=inputs.initial, chunk_size=32
    )
    state, decay, pieces = inputs.initial, 1.0, []
    for start, end in ((0, 41), (41, 100)):
        documents = None if inputs.documents is None else inputs.documents[:, start:end]
        part = [t[:, start:end] if t.dim() > 1 else t for t in inputs.tensors]
        out = mamba2_scan(*part, document_ids_BT=documents, initial_state_BHPN=state, chunk_size=32)
        state, decay = out.final_state_BHPN, decay * out.total_decay_BH
        pieces.append(out.y_BTHP)
    assert_near(torch.cat(pieces, 1), whole.y_BTHP, FLOAT64, "y")
    assert_near(state, whole.final_state_BHPN, FLOAT64, "final state")
    assert_near(decay, whole.total_decay_BH, FLOAT64, "total decay")


def test_state_and_decay_of_pieces_compose() -> None:
    case = ScanCase(B=1, T=50, initial=True)
    inputs = make_inputs(case, torch.float64)
    with_state = mamba2_scan(*inputs.tensors, initial_state_BHPN=inputs.initial)
    without = mamba2_scan(*inputs.tensors)
    composed = without.total_decay_BH[..., None, None] * inputs.initial + without.final_state_BHPN
    assert_near(composed, with_state.final_state_BHPN, FLOAT64)


def test_steps_continue_a_scan() -> None:
    case = ScanCase(T=9)
    inputs = make_inputs(case, torch.float64)
    x, dt, A_log, B, C, D, bias = inputs.tensors
    whole = mamba2_scan(*inputs.tensors)
    state = mamba2_scan(x[:, :4], dt[:, :4], A_log, B[:, :4], C[:, :4], D, bias).final_state_BHPN
    for t in range(4, 9):
        y, state = mamba2_step(x[:, t], dt[:, t], A_log, B[:, t], C[:, t], D, bias, state)
        assert_near(y, whole.y_BTHP[:, t], FLOAT64, f"token {t}")
    assert_near(state, whole.final_state_BHPN, FLOAT64, "state")


def test_very_long_decay_and_vanishing_step_give_no_nan() -> None:
    case = ScanCase(B=1, T=64, H=2, G=1, chunk=64)
    inputs = make_inputs(case, torch.float32)
    with torch.no_grad():
        inputs.tensors[1][:, :32] = -200.0  # softplus underflows to 0
        inputs.tensors[1][:, 32:] = 300.0  # a decay of e^-300 a token
    for name, value in run_scan(case, inputs, "torch").items():
        assert bool(torch.isfinite(value).all()), name


def steep_documents(dtype: torch.dtype) -> tuple[ScanCase, ScanInputs]:
    """Documents inside one chunk that forget so fast that the decay between two of them would be an infinite power."""
    case = ScanCase(B=2, T=50, H=2, G=1, chunk=32, lengths=(20, 3, 27), initial=True, kind="decay")
    inputs = make_inputs(case, dtype)
    with torch.no_grad():
        inputs.tensors[3].sub_(torch.linspace(0.0, 20.0, case.T, dtype=dtype).flip(0)[:, None])
    return case, inputs


def test_documents_that_forget_at_once_leave_the_next_ones_finite() -> None:
    case, exact = steep_documents(torch.float64)
    expected = run_scan(case, exact, "reference")
    _, inputs = steep_documents(torch.float32)
    for name, value in run_scan(case, inputs, "torch").items():
        assert_near(value, expected[name], FLOAT32, name)
    q, k, v, g = inputs.tensors
    state = inputs.initial.detach().clone()
    leaves = [q, k, v, g, None, None, state]
    for scan in (chunked_scan, compose_scan):
        y, final = scan(*leaves, inputs.documents, case.chunk, torch.float32)
        assert_near(y, expected["y"], FLOAT32, "y")
        assert_near(final, expected["final_state"], FLOAT32, "final_state")
        for gradient in torch.autograd.grad(y.sum() + final.sum(), [q, k, v, g]):
            assert bool(torch.isfinite(gradient).all())


def test_chunk_size_changes_rounding_only() -> None:
    case = ScanCase(T=100, lengths=(30, 70))
    inputs = make_inputs(case, torch.float64)
    reference = mamba2_scan(*inputs.tensors, document_ids_BT=inputs.documents, backend="reference")
    for chunk in (1, 16, 64, 256):
        y = mamba2_scan(*inputs.tensors, document_ids_BT=inputs.documents, chunk_size=chunk).y_BTHP
        assert_near(y, reference.y_BTHP, FLOAT64, f"chunk {chunk}")


def test_one_document_takes_the_path_without_masks() -> None:
    case = ScanCase(T=40)
    inputs = make_inputs(case, torch.float32)
    ids = torch.full((2, 40), 3, dtype=torch.int32)
    assert_bitwise(mamba2_scan(*inputs.tensors, document_ids_BT=ids).y_BTHP, mamba2_scan(*inputs.tensors).y_BTHP)


def test_bfloat16_products_are_possible_where_the_processor_has_them() -> None:
    """The products in bfloat16 run on any CPU, only slowly: the path of fast machines is tried here too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 8).bfloat16() for _ in range(3))
    g = -torch.rand(1, 40, 2)
    exact, _ = chunked_scan(q.double(), k.double(), v.double(), g.double(), None, None, None, None, 16)
    mixed, _ = chunked_scan(q, k, v, g, None, None, None, None, 16, product_dtype=torch.bfloat16)
    assert_near(mixed, exact, BFLOAT16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt_BTH": torch.zeros(2, 5, 3)}, r"dt_BTH must have shape \[2, 5, 4\]; got \[2, 5, 3\]"),
        ({"B_BTGN": torch.zeros(2, 5, 3, 6), "C_BTGN": torch.zeros(2, 5, 3, 6)}, "divide the 4 heads"),
        ({"C_BTGN": torch.zeros(2, 5, 2, 6).double()}, "C_BTGN must be torch.float32"),
        ({"x_BTHP": torch.zeros(2, 5, 4, 3, dtype=torch.int64)}, "x_BTHP must be floating point"),
        ({"document_ids_BT": torch.zeros(2, 4, dtype=torch.int32)}, "document_ids_BT must have shape"),
        ({"document_ids_BT": torch.zeros(2, 5)}, "int32 or int64"),
        ({"initial_state_BHPN": torch.zeros(2, 4, 6, 3)}, r"initial state must have shape \[2, 4, 3, 6\]"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"backend": "cuda"}, "must be one of auto, triton, native, torch, reference; got 'cuda'"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x_BTHP": torch.zeros(2, 5, 4, 3),
        "dt_BTH": torch.zeros(2, 5, 4),
        "A_log_H": torch.zeros(4),
        "B_BTGN": torch.zeros(2, 5, 2, 6),
        "C_BTGN": torch.zeros(2, 5, 2, 6),
        "D_H": torch.zeros(4),
        "dt_bias_H": torch.zeros(4),
    }
    with pytest.raises(ValueError, match=message):
        mamba2_scan(**(arguments | change))
