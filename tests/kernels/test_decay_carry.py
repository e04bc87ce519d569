"""Adding what an entering state leaves in the outputs, against a scan that begins with that state."""

import pytest
import torch

from amfm.kernels.decay_scan.carry import add_carried_state, decay_read
from amfm.kernels.decay_scan.op import decay_scan, mamba2_scan
from tests.helpers.numbers import assert_all_near, relative_rms
from tests.helpers.scans import ScanCase, make_inputs, tolerance_of

# Rounding at the size of the dtype's last digit, for sums that cancel exactly in the direct form.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}

CASES = [
    ScanCase(initial=True),
    ScanCase(initial=True, T=1, B=1),
    ScanCase(initial=True, lengths=(1, 30, 32)),
    ScanCase(initial=True, lengths=(40, 1, 22), H=6, G=3, P=5, N=7),
    ScanCase(initial=True, lengths=(62, 1), B=1, H=2, G=1),
]


def run(case, dtype, *, later):
    """Outputs and all gradients of a scan with a state, or of a scan without one to which the state is added later."""
    inputs = make_inputs(case, dtype)
    _, dt, A_log, _, C, _, bias = inputs.tensors
    initial = None if later else inputs.initial
    documents = inputs.documents
    y = mamba2_scan(
        *inputs.tensors, document_ids_BT=documents, initial_state_BHPN=initial, chunk_size=case.chunk
    ).y_BTHP
    if later:
        y = add_carried_state(y, dt, A_log, C, bias, inputs.initial, document_ids_BT=documents)
    gradients = torch.autograd.grad((y.double() * inputs.weights[0]).sum(), [*inputs.tensors, inputs.initial])
    return dict(zip(["y", *inputs.names, "initial"], [y, *gradients]))


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_state_added_later_errs_no_more_than_one_that_was_there(case, dtype):
    exact, direct, got = (
        run(case, kind, later=later) for kind, later in ((torch.float64, False), (dtype, False), (dtype, True))
    )
    gradients = {f"d_{name}": value for name, value in exact.items()}
    for name, value in exact.items():
        assert got[name].dtype == direct[name].dtype
        error, usual = relative_rms(got[name], value), relative_rms(direct[name], value)
        floor = tolerance_of(f"d_{name}", gradients, FLOOR[dtype])
        assert error <= 2 * usual + floor, f"{name}: error {error:.1e}, of the direct form {usual:.1e}"


def test_other_documents_keep_every_bit():
    case = ScanCase(initial=True, lengths=(20, 43), B=1)
    inputs = make_inputs(case, torch.float32)
    _, dt, A_log, _, C, _, bias = inputs.tensors
    y = mamba2_scan(*inputs.tensors, document_ids_BT=inputs.documents).y_BTHP
    added = add_carried_state(y, dt, A_log, C, bias, inputs.initial, document_ids_BT=inputs.documents)
    assert torch.equal(added[:, 20:], y[:, 20:]) and not torch.equal(added[:, :20], y[:, :20])


def test_a_state_of_another_shape_is_refused():
    inputs = make_inputs(ScanCase(initial=True), torch.float32)
    x, dt, A_log, _, C, _, bias = inputs.tensors
    with pytest.raises(ValueError, match=r"state_BHPN must have shape \[2, 4, 16, 16\]; got \[2, 4, 16, 15\]"):
        add_carried_state(x, dt, A_log, C, bias, inputs.initial[..., :15])


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("lengths", [(), (5, 1, 11)], ids=str)
def test_reading_a_state_later_equals_a_scan_that_begins_with_it(lengths, vector):
    case = ScanCase(T=17, lengths=lengths, initial=True, kind="vector" if vector else "decay")
    inputs = make_inputs(case, torch.float64)
    q, _, _, g = inputs.tensors
    results = []
    for initial in (inputs.initial, None):
        o = decay_scan(*inputs.tensors, document_ids_BT=inputs.documents, initial_state_BHKV=initial).o_BTHV
        if initial is None:
            read = decay_read(q, g, document_ids_BT=inputs.documents)
            o = o + torch.einsum("bthk,bhkv->bthv", read, inputs.initial)
        gradients = torch.autograd.grad((o * inputs.weights[0]).sum(), [*inputs.tensors, inputs.initial])
        results.append([o, *gradients])
    assert_all_near(results[1], results[0], 1e-12, ["o", *inputs.names, "initial"])


def test_reading_is_zero_after_the_first_document_however_fast_it_forgets():
    q, g = torch.ones(1, 6, 1, 2, dtype=torch.bfloat16), torch.full((1, 6, 1), -50.0)
    ids = torch.tensor([[4, 4, 5, 5, 6, 6]], dtype=torch.int32)
    read = decay_read(q, g.requires_grad_(), document_ids_BT=ids)
    assert read.dtype == torch.float32 and bool((read[:, 2:] == 0).all()) and bool((read[:, 0] > 0).all())
    (d_g,) = torch.autograd.grad(read.sum(), [g])
    assert bool(torch.isfinite(d_g).all()) and bool((d_g[:, 2:] == 0).all())


def test_gates_of_another_width_are_refused():
    q = torch.zeros(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"g must have shape \[2, 5, 3, 4\]; got \[2, 5, 3, 1\]"):
        decay_read(q, torch.zeros(2, 5, 3, 1))
