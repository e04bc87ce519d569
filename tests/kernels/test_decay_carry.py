"""Adding what an entering state leaves in the outputs, against a scan that begins with that state."""

import pytest
import torch

from kernels.decay_scan.carry import add_carried_state
from kernels.decay_scan.op import mamba2_scan
from tests.helpers.numbers import relative_rms
from tests.helpers.scans import ScanCase, make_inputs

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
    for name, value in exact.items():
        assert got[name].dtype == direct[name].dtype
        error, usual = relative_rms(got[name], value), relative_rms(direct[name], value)
        assert error <= 2 * usual + FLOOR[dtype], f"{name}: error {error:.1e}, of the direct form {usual:.1e}"


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
