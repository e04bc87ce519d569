"""The Triton scans, with a gate for each head and for each key channel, in the interpreter against single steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from amfm.kernels.decay_scan import triton_impl
from amfm.kernels.decay_scan.op import decay_scan
from amfm.kernels.decay_scan.triton_impl import scan_triton
from amfm.kernels.decay_scan.vector import triton_impl as vector_triton
from amfm.kernels.decay_scan.vector.triton_impl import scan_vector_triton
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.helpers.registration import assert_registered
from tests.helpers.scans import ScanCase, make_inputs, run_scan, tolerance_of
from tests.kernels.twice import Twice

# float32 against a float64 reference: rounding of some hundred additions.
FLOAT32 = 1e-5
# Gates of q, k and v [1, T, H, 16]: one for each head, one for each key channel.
GATES = pytest.mark.parametrize("channels", [(), (16,)], ids=["heads", "channels"])

CASES = [
    ScanCase(B=1, T=1, H=1, G=1, chunk=16, initial=True),
    pytest.param(ScanCase(B=1, T=63, H=1, G=1, chunk=32, lengths=(1, 1, 61)), marks=pytest.mark.slow),
    ScanCase(B=2, T=40, H=2, G=1, chunk=16, lengths=(3, 30, 7), initial=True),
    pytest.param(ScanCase(B=1, T=100, H=2, G=2, chunk=64, initial=True), marks=pytest.mark.slow),
    pytest.param(ScanCase(B=1, T=129, H=1, G=1, P=8, N=24, chunk=64, lengths=(70, 59)), marks=pytest.mark.slow),
    ScanCase(B=1, T=33, H=1, G=1, P=40, N=72, chunk=32),
    ScanCase(B=1, T=33, H=2, P=20, N=12, chunk=16, kind="decay", lengths=(17, 16), initial=True),
    ScanCase(B=1, T=63, H=2, G=2, P=8, N=8, chunk=64, lengths=(62, 1)),
    ScanCase(B=1, T=63, H=8, G=1, P=8, N=8, chunk=256, lengths=(1, 1, 61)),
    # Chunks of two tiles: documents that end in either, in both, and between them.
    pytest.param(ScanCase(B=1, T=129, H=1, G=1, P=8, N=16, chunk=128), marks=pytest.mark.slow),
    ScanCase(B=1, T=100, H=2, G=1, P=16, N=16, chunk=128, lengths=(40, 30, 30), initial=True),
    pytest.param(
        ScanCase(B=1, T=193, H=2, G=2, P=40, N=16, chunk=128, lengths=(1, 63, 70, 59), initial=True),
        marks=pytest.mark.slow,
    ),
    ScanCase(B=1, T=1, H=1, kind="vector", chunk=16, initial=True),
    ScanCase(B=1, T=63, H=1, kind="vector", chunk=32, lengths=(1, 1, 61)),
    pytest.param(
        ScanCase(B=2, T=40, H=2, kind="vector", chunk=16, lengths=(3, 30, 7), initial=True), marks=pytest.mark.slow
    ),
    # Keys and values over more than one block, neither a power of two.
    ScanCase(B=1, T=40, H=1, P=40, N=72, kind="vector", chunk=32, lengths=(25, 15), initial=True),
    ScanCase(B=1, T=65, H=1, P=5, N=7, kind="vector", chunk=128),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_walk_equals_single_steps_twice_bitwise(case: ScanCase, twice: Twice, poisoned_memory: None) -> None:
    inputs = make_inputs(case, torch.float32)
    exact = make_inputs(case, torch.float64)
    expected = run_scan(case, exact, "reference")
    for name, value in twice(lambda: run_scan(case, inputs, "triton")).items():
        assert_near(value, expected[name], tolerance_of(name, expected, FLOAT32), name)


@pytest.mark.parametrize("lengths", [pytest.param((), marks=pytest.mark.slow), (20, 27)])
@pytest.mark.parametrize("kind", ["mamba2", "vector"])
def test_segments_and_states_made_again_equal_one_walk(
    kind: str, lengths: tuple[int, ...], poisoned_memory: None
) -> None:
    case = ScanCase(B=1, T=47, H=2 if kind == "mamba2" else 1, G=1, chunk=16, lengths=lengths, initial=True, kind=kind)
    inputs = make_inputs(case, torch.float32)
    assert inputs.initial is not None
    scan, leaves, final_weight = scan_vector_triton, [*inputs.tensors, inputs.initial], inputs.weights[1]
    if kind == "mamba2":
        x, dt, _, B, C, D, _ = (t.detach() for t in inputs.tensors)
        initial, final_weight = (
            state.detach().transpose(-1, -2).contiguous() for state in (inputs.initial, final_weight)
        )
        leaves = [leaf.clone().requires_grad_() for leaf in (C, B, x, -dt.abs(), dt.abs(), D, initial)]
        scan = scan_triton
    results = []
    for segment_chunks, keep_states in ((0, True), (0, False), (1, True), (2, False)):
        y, final = scan(*leaves, inputs.documents, 16, segment_chunks, keep_states)
        total = (y * inputs.weights[0]).sum() + (final * final_weight).sum()
        results.append([y, final, *torch.autograd.grad(total, leaves)])
    for other in results[1:]:
        for i, (one, many) in enumerate(zip(results[0], other)):
            assert_near(many, one, FLOAT32, f"tensor {i}")


def test_states_are_kept_for_backward_only_where_asked() -> None:
    q, k, v = (torch.randn(1, 40, 2, 16, requires_grad=True) for _ in range(3))
    g = -torch.rand(1, 40, 2)
    for keep_states, kept in ((True, 1), (False, 0)):
        out = decay_scan(q, k, v, g, chunk_size=16, keep_states=keep_states, backend="triton")
        saved = [x for x in out.o_BTHV.grad_fn.saved_tensors if x is not None and x.shape == (1, 3, 2, 16, 16)]
        assert len(saved) == kept


def test_documents_that_forget_at_once_leave_the_next_ones_finite(poisoned_memory: None) -> None:
    case = ScanCase(B=1, T=50, H=2, G=1, chunk=32, lengths=(20, 3, 27), initial=True, kind="decay")
    inputs, exact = make_inputs(case, torch.float32), make_inputs(case, torch.float64)
    for given in (inputs, exact):
        with torch.no_grad():
            given.tensors[3].sub_(torch.linspace(0.0, 20.0, case.T).flip(0)[:, None])
    expected = run_scan(case, exact, "reference")
    for name, value in run_scan(case, inputs, "triton").items():
        assert_near(value, expected[name], FLOAT32, name)


def test_channels_that_forget_at_once_stay_finite(poisoned_memory: None) -> None:
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


@pytest.mark.parametrize("kind", ["mamba2", "vector"])
def test_a_document_never_feels_another(kind: str) -> None:
    case = ScanCase(B=1, T=40, H=2 if kind == "mamba2" else 1, G=1, chunk=16, lengths=(5, 14, 21), kind=kind)
    inputs = make_inputs(case, torch.float32)
    before = run_scan(case, inputs, "triton")
    with torch.no_grad():
        tokenwise = [name for name, x in zip(inputs.names, inputs.tensors) if x.dim() > 1]
        for tensor in inputs.tensors:
            if tensor.dim() > 1:
                tensor[:, 5:19] = -torch.rand_like(tensor[:, 5:19]) * 3
        inputs.weights[0][:, 5:19] = 7.0
    after = run_scan(case, inputs, "triton")
    for name in ("y", *(f"d_{name}" for name in tokenwise)):
        assert_bitwise(after[name][:, :5], before[name][:, :5], f"{name} before")
        assert_bitwise(after[name][:, 19:], before[name][:, 19:], f"{name} after")
    assert_bitwise(after["final_state"], before["final_state"], "final_state")


@GATES
def test_slices_of_a_wider_projection_are_read_where_they_lie(channels: tuple[int, ...]) -> None:
    wide = torch.randn(1, 20, 3 * 32)
    q, k, v = (part.unflatten(-1, (2, 16)) for part in wide.split(32, dim=-1))
    g = -torch.rand(1, 20, 2, *channels)
    out = decay_scan(q, k, v, g, chunk_size=16, backend="triton")
    expected = decay_scan(q.double(), k.double(), v.double(), g.double(), backend="reference")
    assert_near(out.o_BTHV, expected.o_BTHV, FLOAT32)


@GATES
def test_meta_tensors_pass_through(channels: tuple[int, ...]) -> None:
    q, k, v = (torch.empty(2, 40, 4, 16, device="meta", requires_grad=True) for _ in range(3))
    g = torch.empty(2, 40, 4, *channels, device="meta")
    out = decay_scan(q, k, v, g, chunk_size=16, backend="triton")
    assert out.o_BTHV.shape == (2, 40, 4, 16)
    assert out.final_state_BHKV.shape == (2, 4, 16, 16)


def test_registration_is_complete() -> None:
    case = ScanCase(B=1, T=17, H=1, G=1, chunk=16, kind="decay")
    q, k, v, g = make_inputs(case, torch.float32).tensors
    assert_registered(triton_impl._forward, q, k, v, g, None, None, None, None, 16, 0, True)
    vector = make_inputs(replace(case, kind="vector"), torch.float32).tensors
    assert_registered(vector_triton._forward, *vector, None, None, 16, 0, True)


@pytest.mark.parametrize(
    ("channels", "chunk_sizes"), [((), "16, 32, 64 or a multiple of 128"), ((16,), "16, 32 or a multiple of 64")]
)
def test_sizes_without_a_kernel_are_refused(channels: tuple[int, ...], chunk_sizes: str) -> None:
    q, k, v = (torch.zeros(1, 8, 1, 16) for _ in range(3))
    g = torch.zeros(1, 8, 1, *channels)
    with pytest.raises(ValueError, match=f"chunk_size of {chunk_sizes}; got 24"):
        decay_scan(q, k, v, g, chunk_size=24, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        decay_scan(q.double(), k.double(), v.double(), g.double() if channels else g, backend="triton")
    long = torch.zeros(1, 8, 1, 300)
    with pytest.raises(ValueError, match=r"states of up to 256 (rows|x 256); got 300 x"):
        decay_scan(long, long, v, long if channels else g, backend="triton")
